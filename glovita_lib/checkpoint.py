"""Checkpoints, and weights from files into networks."""

import errno
import os
import pickle
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from torch import Tensor, nn

from glovita_lib.errors import UserError, listed, reason
from glovita_lib.files import atomic_path, atomic_write

# ------------------------------------------------------------------------------- checkpoints
#
# Checkpoints: tensors and plain values in one file, the same bytes for the same state.

MARK, VERSION = "glovita_checkpoint", 1
ZIP = b"PK\x03\x04"  # how a file of torch.save begins


def save(path: Path | str, state: dict[str, Any]) -> None:
    """Write a state of tensors and plain values (None, bool, int, float, str, list, tuple, dict).

    Equal states give equal bytes, whatever the file is called.

    Raises:
        UserError: disk full, read-only ...; the previous file is as it was.
        TypeError: a value of another type, by its key.
    """
    content = canonical({MARK: VERSION, **state}, "")
    with atomic_write(path) as file:
        stream = Stream(file)
        try:
            torch.save(content, stream)  # type: ignore[arg-type]  # it needs no more than write
        except RuntimeError as error:  # torch hides what went wrong with the file
            raise stream.error or error from None


class Stream:
    """A file that remembers why a write failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        """Hand on to the file."""
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Hand on to the file."""
        self.file.flush()


def canonical(value: Any, key: str) -> Any:
    """A copy whose pickle depends on its value alone.

    Pickle writes an object that it meets again as a reference, so equal strings must be one object
    and containers never; tensors share no memory, are on the CPU and have the strides of their
    shape.
    """
    if isinstance(value, dict):
        return {
            canonical_key(name, key): canonical(entry, f"{key}.{name}" if key else str(name))
            for name, entry in value.items()
        }
    if isinstance(value, list | tuple):
        kind = list if isinstance(value, list) else tuple
        return kind(canonical(entry, f"{key}[{i}]") for i, entry in enumerate(value))
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, float):  # numpy.float64
        return float(value)
    if type(value) is str:
        return sys.intern(value)
    raise TypeError(f"checkpoint key {key} is a {type(value).__name__}, not a plain value")


def canonical_key(name: Any, key: str) -> str | int:
    """A key of a dict: a string, or an integer as in an optimizer's state."""
    if type(name) not in (str, int):
        raise TypeError(f"checkpoint key {key} has an entry named by a {type(name).__name__}")
    return canonical(name, key)


def link(src: Path | str, dst: Path | str) -> None:
    """Make dst the file that src is now, without copying where the disk allows it.

    A later `save` to src replaces its name and leaves dst alone.
    """
    with atomic_path(dst) as temporary:
        try:
            os.link(src, temporary)
        except (AttributeError, OSError) as error:  # not every platform and disk has links
            own = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOENT)
            if getattr(error, "errno", None) in own:
                raise
            shutil.copyfile(src, temporary)


def load(path: Path | str, map_location: str | torch.device) -> dict[str, Any]:
    """The state that `save` wrote.

    Raises:
        UserError: missing, truncated, or not written by `save`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} {absence(path)}")
    damaged = UserError(
        f"checkpoint {path} is truncated or damaged ({path.stat().st_size:,} bytes): give another"
        " one, or remove the run's folder to train again"
    )
    try:
        with open(path, "rb") as file:
            start = file.read(len(ZIP))
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    if start != ZIP:
        raise damaged if ZIP.startswith(start) else UserError(foreign(path, "is of another format"))
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(foreign(path, "holds other things than tensors and values")) from None
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the reader meets damage with errors of many types
        raise damaged from None
    if not isinstance(state, dict) or MARK not in state:
        raise UserError(foreign(path, "was not written by glovita"))
    if state.pop(MARK) != VERSION:
        raise UserError(f"checkpoint {path} is of a newer version of glovita: update glovita")
    return state


def absence(path: Path) -> str:
    """Why a path is no file, and the checkpoints beside or below it."""
    folder = path if path.is_dir() else path.parent
    found = sorted(folder.rglob("*.pt")) if folder.is_dir() else []
    what = "is a folder" if path.is_dir() else "does not exist"
    if found:
        return f"{what}: give one of {listed(found, 8)}"
    return f"{what}: train the spec first, or give the path of a file such as best.pt"


def foreign(path: Path, what: str) -> str:
    """The message about a file of another program."""
    return (
        f"{path} is no checkpoint of a run (it {what}): give checkpoints/best.pt of a run; weights"
        ' of other programs are read by model.encoder.weights = "<file>"'
    )


def load_model(model: nn.Module, state_dict: dict[str, Tensor], path: Path | str) -> None:
    """Load weights strictly.

    Raises:
        UserError: they are those of another architecture; the first differences are named.
    """
    own = model.state_dict()
    shapes = [
        f"{key} {tuple(state_dict[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    differences = {
        "missing": [key for key in own if key not in state_dict],
        "unexpected": [key for key in state_dict if key not in own],
        "of another shape": shapes,
    }
    if any(differences.values()):
        parts = [
            f"{len(keys)} {what} ({listed(keys, 3)})" for what, keys in differences.items() if keys
        ]
        raise UserError(
            f"checkpoint {path} is of another architecture than the spec's model, tensors:"
            f" {', '.join(parts)}; use the spec that it was trained with"
        )
    model.load_state_dict(state_dict)


# ------------------------------------------------------------------------ weights from files
#
# Weights from files into networks: by name, or by order and shape.
#
# A file may come from anywhere: from this program, from timm, torchvision or the network's authors,
# wrapped in a checkpoint, with prefixes before its names. Files hold tensors only; nothing in them
# is executed.

WRAPPERS = ("ema", "model_ema", "state_dict", "model_state_dict", "model_state", "model", "teacher")
POSITIONS = ("pos_embed", "pos_embedding")
COUNTER = "num_batches_tracked"  # of BatchNorm; files of old torch versions lack it
Tensors = dict[str, Tensor]
ADAPTER = re.compile(r"(^|\.)(adapter|added|shared)\.")  # children that PEFT methods add
Converter = Callable[[Tensors, nn.Module], Tensors]


@dataclass(frozen=True)
class LoadTarget:
    """What is loaded into: a network and what is known about it."""

    net: nn.Module
    classifier: tuple[str, ...] = ()  # names of the classifiers that were taken off
    n_prefix: int = 0  # prefix tokens in a position embedding
    first_conv: str | None = None  # name of the convolution that sees the input
    converter: Converter | None = None  # from the names of the network's authors


@dataclass
class Mismatch:
    """Where a file and a network differ."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def table(self) -> str:
        """A line per tensor; long lists are cut."""
        lines = []
        for title, names in (
            ("missing in the file", self.missing),
            ("not in the network", self.unexpected),
            ("another shape", self.shapes),
        ):
            if names:
                lines.append(f"  {title:20}  " + listed(names, 8, f"\n  {title:20}  "))
        return "\n".join(lines)


# -------------------------------------------------------------------- files


def read_tensors(path: str | Path) -> Tensors:
    """The tensors of a pth, pt or safetensors file, out of their wrappers.

    Raises:
        UserError: no such file, not readable, holds other things than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'weights = "{path}": no such file')
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    while isinstance(content, dict):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            break
        inner = next((k for k in WRAPPERS if isinstance(content.get(k), dict) and content[k]), None)
        if inner is None:
            break
        content = content[inner]
    if not isinstance(content, dict) or not any(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f'weights = "{path}": holds no tensors under names')
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def read_safetensors(path: Path) -> Tensors:
    """Tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f'weights = "{path}": not a whole safetensors file ({error})') from error


def read_torch(path: Path) -> Any:
    """Content of a file of torch.save."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f'weights = "{path}": not a torch file of tensors only; save its state_dict alone, as'
            " torch.save(state_dict, path) or as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f'weights = "{path}": not a whole torch file ({reason(error)})') from error


# -------------------------------------------------------------------- by name


def load_weights(target: LoadTarget, path: str | Path, *, by_order: bool) -> None:
    """Load a file into a network: every tensor of it, or an error.

    Classifier tensors of the file are left out where the network's classifier was taken off;
    position embeddings are interpolated to the network's grid, first kernels to its channels.

    Raises:
        UserError: with a table of missing and unexpected names and other shapes.
    """
    tensors = read_tensors(path)
    if by_order:
        tensors = rename_by_order(tensors, target, path)
    load_tensors(target, tensors, source=f'weights = "{path}"')


def load_tensors(target: LoadTarget, tensors: Tensors, *, source: str) -> None:
    """Load named tensors into a network, as `load_weights`; `source` opens the error."""
    state = target.net.state_dict()
    fitted = fit_to_network(tensors, target, state)
    found = mismatch_of(fitted, state)
    if found:
        converted = library_names(tensors, target)
        if converted is not None:
            fitted = fit_to_network(converted, target, state)
            found = mismatch_of(fitted, state)
    if any(ADAPTER.search(name) for name in found.unexpected):
        raise UserError(
            f"{source} holds adapters of a PEFT run beside its base: take the adapter.safetensors"
            ' beside it, or fold them in with mode = "infer", infer.merge = true and infer.export ='
            ' "merged.safetensors", and take that file'
        )
    if found:
        raise UserError(
            f"{source} does not fit {type(target.net).__name__}:\n{found.table()}\n"
            "  take the file of this very model, or weights_order = true if only names differ"
        )
    counters = {name: state[name] for name in state if name.endswith(COUNTER)}
    target.net.load_state_dict({**counters, **fitted})


def library_names(tensors: Tensors, target: LoadTarget) -> Tensors | None:
    """Tensors under the library's names; None where the library does not know theirs."""
    if target.converter is None:
        return None
    try:
        with torch.no_grad():
            return target.converter(dict(tensors), target.net)
    except (KeyError, IndexError, RuntimeError, AttributeError, AssertionError):
        return None


def fit_to_network(tensors: Tensors, target: LoadTarget, state: Tensors) -> Tensors:
    """Tensors without prefix and classifier, position embeddings and first kernel fitted."""
    tensors = without_prefix(tensors, state)
    classifier = tuple(f"{name}." for name in target.classifier)
    kept = {n: t for n, t in tensors.items() if n in state or not n.startswith(classifier)}
    return {name: fit_shape(name, t, state.get(name), target) for name, t in kept.items()}


def without_prefix(tensors: Tensors, names: Iterable[str]) -> Tensors:
    """Cut off the prefix behind which most names of the network stand in the file.

    Tensors elsewhere belong to other parts of a larger model (its head, a text tower): left out.
    """
    names = set(names)
    prefixes: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in names:
                prefixes[".".join(parts[:start])] += 1
    if not prefixes:
        return tensors
    prefix, _ = min(prefixes.items(), key=lambda item: (-item[1], len(item[0])))
    if not prefix:
        return tensors
    start = len(prefix) + 1
    return {key[start:]: t for key, t in tensors.items() if key.startswith(f"{prefix}.")}


def fit_shape(name: str, tensor: Tensor, wanted: Tensor | None, target: LoadTarget) -> Tensor:
    """Interpolate a position embedding, sum or repeat the input channels of the first kernel."""
    from timm.layers import resample_abs_pos_embed

    if wanted is None or tensor.shape == wanted.shape:
        return tensor
    if name.split(".")[-1] in POSITIONS and tensor.ndim == wanted.ndim == 3:
        grids = [(t.shape[1] - target.n_prefix) ** 0.5 for t in (tensor, wanted)]
        if tensor.shape[2] == wanted.shape[2] and all(grid == int(grid) > 0 for grid in grids):
            side = int(grids[1])
            return resample_abs_pos_embed(tensor, [side, side], num_prefix_tokens=target.n_prefix)
    same_kernel = tensor.ndim == 4 and tensor.shape[:1] + tensor.shape[2:] == (
        wanted.shape[:1] + wanted.shape[2:]
    )
    if same_kernel and name == f"{target.first_conv}.weight":
        return fit_channels(tensor, wanted.shape[1])
    return tensor


def fit_channels(kernel: Tensor, channels: int) -> Tensor:
    """A kernel (O, I, kh, kw) for other input channels: the sum for one, else repeated and scaled
    by I / channels (timm's adapt_input_conv, for any I; that of timm before 1.0.31 knows I = 3)."""
    if channels == 1:
        return kernel.float().sum(1, keepdim=True).to(kernel.dtype)
    own = kernel.shape[1]
    repeated = kernel.float().repeat(1, -(-channels // own), 1, 1)[:, :channels]
    return (repeated * (own / channels)).to(kernel.dtype)


def mismatch_of(tensors: Tensors, state: Tensors) -> Mismatch:
    """Differences between a file and a network."""
    missing = [n for n in state if n not in tensors and not n.endswith(COUNTER)]
    shapes = [
        f"{name}: file {tuple(tensors[name].shape)}, network {tuple(state[name].shape)}"
        for name in tensors
        if name in state and tensors[name].shape != state[name].shape
    ]
    return Mismatch(missing, [name for name in tensors if name not in state], shapes)


# -------------------------------------------------------------------- by order


def rename_by_order(tensors: Tensors, target: LoadTarget, path: str | Path) -> Tensors:
    """Give the tensors of a file the names of the network's in the same place.

    The last parts of the names (weight, bias, running_mean ...) must agree. Where the network's
    classifier was taken off, the file may end with a classifier's one or two tensors.

    Raises:
        UserError: naming the first place where file and network differ.
    """
    ours = [(n, t) for n, t in target.net.state_dict().items() if not n.endswith(COUNTER)]
    theirs = [(n, t) for n, t in tensors.items() if not n.endswith(COUNTER)]
    rest = theirs[len(ours) :]
    one_layer = len({name.rpartition(".")[0] for name, _ in rest}) <= 1 and len(rest) <= 2
    if len(theirs) < len(ours) or (rest and not (target.classifier and one_layer)):
        raise UserError(
            f'weights = "{path}": {len(theirs)} tensors, {type(target.net).__name__} has'
            f" {len(ours)}; weights_order needs a file of the same network"
        )
    for (our_name, our), (their_name, their) in zip(ours, theirs, strict=False):
        kinds = our_name.rpartition(".")[2], their_name.rpartition(".")[2]
        fitted = fit_shape(our_name, their, our, target)
        if kinds[0] != kinds[1] or our.shape != fitted.shape:
            raise UserError(
                f'weights = "{path}": {their_name} {tuple(their.shape)} stands in the place of'
                f" {our_name} {tuple(our.shape)}; weights_order needs the same network in the same"
                " order"
            )
    pairs = zip(ours, theirs, strict=False)
    return {our_name: their for (our_name, _), (_, their) in pairs}
