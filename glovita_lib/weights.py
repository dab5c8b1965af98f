"""Weights from files into networks: by name, or by order and shape.

A file may come from anywhere: from this program, from timm, torchvision or the network's authors,
wrapped in a checkpoint, with prefixes before its names. Files hold tensors only; nothing in them
is executed. Which tensors of a file are the network is found out here; how they are renamed and
fitted to its size and channels is the rule of the library that the network comes from.
"""

import json
import re
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import dropwhile, takewhile
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from glovita_lib.errors import UserError, in_package, listed, meant, reason

COUNTER = "num_batches_tracked"  # of BatchNorm; files of old torch versions lack it
POSITIONS = ("pos_embed", "pos_embedding")
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # parts of names
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # also in camel case
AVERAGED = re.compile(  # in the names of the network that counts; not moments of an optimizer
    r"(?<!\bno )(?<!\bnon )(?<!\bnot )(?<!\bwithout )(?<!\bexp )(?<!\bsquare )(?<!\bgrad )"
    r"\b(ema|swa|avg|averaged?|polyak|shadow|momentum|teacher|target)\b(?! buffer)"
)
TWINS = {"_k": "_q", "_m": ""}  # ends of names of a momentum encoder and of the one it follows
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
FIRST = 1_000  # rank of a network that the spec names: above any number of words
NESTED = 4  # dicts in dicts, at most
Tensors = OrderedDict[str, Tensor]
ADAPTER = re.compile(r"(^|\.)(adapter|added|shared)\.")  # children that PEFT methods add
Loading = Callable[[nn.Module, Tensors], object]


def load_directly(net: nn.Module, tensors: Tensors) -> None:
    """The loading of a network without a library: names and shapes as they are."""
    net.load_state_dict(tensors)


@dataclass(frozen=True)
class LoadTarget:
    """What is loaded into: a network and what is known about it."""

    net: nn.Module
    loading: Loading = load_directly
    """The library's own loading of tensors under names, which ends in net.load_state_dict."""
    classifier: tuple[str, ...] = ()
    """Names of the classifiers that were taken off."""
    whole: Callable[[], frozenset[str]] = frozenset
    """Names of the tensors of the network with its classifier, some of which are not below the
    names above; asked only where a file has tensors too many."""
    first_conv: tuple[str, ...] = ()
    """Names of the convolutions that see the input."""
    by_order: bool = False
    """Whether the spec may ask for tensors by their order, with weights_order."""
    taken: dict[str, Any] = field(default_factory=dict)
    """What loading has found where the spec leaves it open: `weights_key`, where in a file the
    network stands, or `published`, the library's name of the weights."""


@dataclass
class Mismatch:
    """Where a file and a network differ."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    refusal: str = ""
    """What the library says."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes or self.refusal)

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.shapes)

    def table(self) -> str:
        """A line per tensor; long lists are cut."""
        lines = []
        for title, names in (
            ("the library says", [self.refusal] if self.refusal else []),
            ("missing in the file", self.missing),
            ("not in the network", self.unexpected),
            ("another shape", self.shapes),
        ):
            if names:
                lines.append(f"  {title:20}  " + listed(names, 8, f"\n  {title:20}  "))
        return "\n".join(lines)


# -------------------------------------------------------------------- files


@dataclass(frozen=True, slots=True)
class FileNetwork:
    """Tensors of a file that may be one network."""

    name: str
    """Where it stands in the file; empty for the whole file."""
    tensors: Tensors
    """Under the names that they have there, with torch's versions of their modules."""
    is_named: bool = False
    """Whether the spec names this very place."""

    @property
    def place(self) -> str:
        """Its name in a message."""
        return self.name or "the network at the top"

    def rank(self, beside: set[str]) -> int:
        """How many words of its name say that it is an average, or the teacher, those of a dict
        around several networks being words of each; of MoCo's two encoders beside each other it is
        encoder_k, of ALBEF's and BLIP's visual_encoder_m. What the spec names comes before all."""
        if self.is_named:
            return FIRST
        twins = {re.sub(rf"{end}(?=\.|$)", of, self.name) for end, of in TWINS.items()}
        return averages_in(self.name) + bool((twins - {self.name}) & beside)


def read_networks(path: str | Path) -> list[FileNetwork]:
    """The dicts of tensors in a pth, pt or safetensors file, in their order.

    Raises:
        UserError: no such file, not readable, holds other things than tensors.
    """
    inside = in_package(str(path))  # what is installed stands here as a path
    path = Path(path)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)
        held = f"name one of its files: {listed(files, 8)}" if files else "it holds no such file"
        raise UserError(f'weights = "{path}" is a folder, not a file of weights; {held}')
    if not path.is_file():
        cure = "" if inside is None else f", as its package is not installed: {inside.cure}"
        raise UserError(f'weights = "{path}": no such file{cure}')
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    found = list(dicts_of_tensors(content, "", NESTED))
    if not found:
        raise UserError(f'weights = "{path}": holds no tensors under names')
    return found


def dicts_of_tensors(content: Any, name: str, depth: int) -> Iterator[FileNetwork]:
    """Dicts that hold tensors under names, the states of optimizers left out."""
    if not isinstance(content, dict):
        return
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        yield FileNetwork(name, unwrapped(tensors, getattr(content, "_metadata", None)))
    for key, value in named.items():
        if depth and not key.startswith("optim"):
            yield from dicts_of_tensors(value, f"{name}.{key}".lstrip("."), depth - 1)


def unwrapped(tensors: Mapping[str, Tensor], versions: dict[str, Any] | None) -> Tensors:
    """Tensors without what torch puts into their names: torch.compile, FullyShardedDataParallel and
    activation checkpointing anywhere, DistributedDataParallel in front.

    Args:
        versions: of the modules, as torch keeps them beside a state dict.
    """
    return with_versions(
        with_dots({bare(key): tensor for key, tensor in tensors.items()}),
        None if versions is None else {bare(f"{key}.")[:-1]: v for key, v in versions.items()},
    )


def with_dots(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in which an average that stands beside its network under names without dots, as
    those of latent diffusion's LitEma do (model_ema.modelconvweight), has that network's names."""
    dotted = {name.replace(".", dot): name for name in tensors if "." in name for dot in ("", "_")}

    def spelled(name: str) -> str:
        where, _, last = name.rpartition(".")
        return f"{where}.{dotted[last]}" if last in dotted and averages_in(where) else name

    return {spelled(name): tensor for name, tensor in tensors.items()}


def averages_in(name: str) -> int:
    """How many words of a name say that it is an average, or the teacher."""
    return len(AVERAGED.findall(" ".join(WORD.findall(name)).lower()))


def bare(key: str) -> str:
    """A name without the parts that torch puts into it."""
    parts = (part for part in key.split(".") if part not in WRAPPERS)
    return ".".join(dropwhile("module".__eq__, parts))


def with_versions(tensors: Mapping[str, Tensor], versions: dict[str, Any] | None) -> Tensors:
    """Tensors with the versions of their modules, where they are known."""
    state = Tensors(tensors)
    if versions is not None:
        vars(state)["_metadata"] = versions
    return state


def versions_of(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Versions of the modules of tensors, as torch keeps them beside a state dict."""
    return getattr(tensors, "_metadata", None)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f'weights = "{path}": not a whole safetensors file ({error})') from error


def beside_tensors(path: str | Path) -> dict[str, Any]:
    """What a file says beside its tensors: the top of a torch file; of an export or an adapter of
    this program `spec` and `resolved`, as in its checkpoints. Nothing where that cannot be read:
    whoever loads the file says so."""
    from safetensors import SafetensorError, safe_open

    try:
        if Path(path).suffix != ".safetensors":
            content = read_torch(Path(path), mapped=True)
            return content if isinstance(content, dict) else {}
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if "glovita_adapter" in metadata:
            return json.loads(metadata["glovita_adapter"])
        model = json.loads(metadata.get("model", "{}"))
        return {"spec": {"model": model}, "resolved": model}
    except (UserError, SafetensorError, OSError, ValueError):
        return {}


def as_run_built(path: str | Path) -> bool | None:
    """Whether a run has built the encoder of its checkpoint, export or adapter file as published
    weights ask for; None of files of others."""
    made = beside_tensors(path)
    try:
        encoder, facts = made["spec"]["model"]["encoder"], made["resolved"].get("encoder_facts")
        asked = bool(encoder.get("pretrained") or encoder.get("weights"))
        return (facts or {}).get("published", asked)
    except (KeyError, TypeError, AttributeError):  # another's file
        return None


def plain_values() -> list[Any]:
    """Types of values that hold data only, beside those that torch knows."""
    rebuild = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in np.typecodes["All"]}
    old = [(rebuild, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [Namespace, np.dtype, *kinds, *old]


def read_torch(path: Path, *, mapped: bool = False) -> Any:
    """Content of a file of torch.save; what training programs like to put beside the weights,
    parsed arguments and numbers of NumPy, is read along.

    Args:
        mapped: whether tensors are read only where they are looked at, where the format allows it.
    """
    try:
        mapped = mapped and zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(plain_values()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        raise UserError(
            f'weights = "{path}": not a torch file of tensors only; save its state_dict alone, as'
            " torch.save(state_dict, path) or as safetensors"
        ) from error
    except (*LIBRARY_ERRORS, EOFError, OSError) as error:
        raise UserError(f'weights = "{path}": not a whole torch file ({reason(error)})') from error


# -------------------------------------------------------------------- by name


def load_file(
    target: LoadTarget, path: str | Path, *, key: str | None = None, by_order: bool = False
) -> str | None:
    """Load a file into a network: every tensor of it, or an error.

    Classifier tensors of the file are left out where the network's classifier was taken off; the
    library's own loading renames tensors and fits them to the network's size and channels. Of
    several networks in a file the averaged one, or the teacher, is taken.

    Args:
        key: where in the file the network stands; none looks everywhere.
        by_order: whether tensors are matched by order and shape, not by name.

    Returns:
        Which network of the file was taken, where it holds several.

    Raises:
        UserError: with a table of missing and unexpected names and other shapes; or the file holds
            several networks, none of which comes first.
    """
    networks = read_networks(path)
    source, names = f'weights = "{path}"', frozenset(target.net.state_dict())
    if key is not None:
        networks = networks_below(networks, key, names, source)
    most = max(len(network.tensors) for network in networks)
    networks = [network for network in networks if 2 * len(network.tensors) >= most]
    if by_order:
        named = renamed_by_order(networks, target, source)
    else:
        named = [part for network in networks for part in parts_of(network, names)]
    if key is not None:
        named = [replace(network, is_named=network.name == key) for network in named]
    return load_one_of(target, named, source=source)


def networks_below(
    networks: list[FileNetwork], key: str, names: frozenset[str], source: str
) -> list[FileNetwork]:
    """What stands in a file at a key or below it: the path of a dict, a prefix of names of tensors,
    or both; the empty key is the tensors at the top.

    Raises:
        UserError: nothing, with the networks that there are.
    """
    found = []
    for network in networks:
        if network.name == key or (key and network.name.startswith(f"{key}.")):
            found.append(network)
        elif not network.name or key.startswith(f"{network.name}."):
            prefix = bare(key[len(network.name) :].lstrip("."))
            if (part := behind(network, prefix)).tensors:
                found.append(replace(part, name=key))
    if not found:
        parts = [part for network in networks for part in parts_of(network, names)]
        places = list(dict.fromkeys(part.name for part in parts))
        shown = listed((f'"{place}"' for place in places), 8)
        raise UserError(
            f'{source}: nothing stands at model.encoder.weights_key = "{key}"{meant(key, places)};'
            f" the file has {shown}"
        )
    return found


def load_tensors(target: LoadTarget, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Load named tensors into a network, as `load_weights`; `source` opens the error."""
    network = FileNetwork("", with_versions(tensors, versions_of(tensors)))
    load_one_of(target, [network], source=source)
    del target.taken["weights_key"]  # there is no file


def load_one_of(target: LoadTarget, networks: list[FileNetwork], *, source: str) -> str | None:
    """Load the one of several candidates that fits a network; which, where several do."""
    tried = [(network, *load_candidate(target, network.tensors)) for network in networks]
    fitting = [(network, state) for network, found, state in tried if not found]
    if not fitting:
        nearest, found, _ = min(tried, key=lambda one: len(one[1]))
        if len({network.place for network in networks}) > 1:
            source = f"{source}: {nearest.place}, the nearest of its networks,"
        refuse(target, found, source)
    chosen, state = first_of(fitting, source)
    names = {network.name for network in networks}
    for network, found, _ in tried:  # an average that lacks something is not passed over
        first = network.rank(names) > chosen.rank(names)
        if found and first and 2 * len(found) < len(network.tensors):
            refuse(target, found, f"{source}: {network.name}, which comes before {chosen.place},")
    if chosen is not tried[-1][0]:
        load_candidate(target, chosen.tensors)
    refuse_nan(state, source)
    target.taken["weights_key"] = chosen.name
    others = [network.place for network, other in fitting if not equal(state, other)]
    if chosen.is_named or not others:
        return None
    return (
        f"{source}: {chosen.place} is loaded, not {listed(others, 3)}; model.encoder.weights_key"
        " names another"
    )


def first_of(
    networks: list[tuple[FileNetwork, Tensors]], source: str
) -> tuple[FileNetwork, Tensors]:
    """The averaged network, or the teacher, of several, each with what it gives the network.

    Raises:
        UserError: none of them comes first.
    """
    beside = {network.name for network, _ in networks}
    rank = max(network.rank(beside) for network, _ in networks)
    best = [(network, state) for network, state in networks if network.rank(beside) == rank]
    if all(equal(best[0][1], state) for _, state in best[1:]):
        return best[0]
    names = listed((network.place for network, _ in best), 8, " and ")
    raise UserError(
        f"{source} holds {len(best)} networks that fit, {names}, and no name says which is the"
        " averaged one or the teacher: choose one, as"
        f' model.encoder.weights_key = "{best[0][0].name}"'
    )


def equal(one: Tensors, other: Tensors) -> bool:
    """Whether names and tensors are the same, NaN like NaN."""
    return one.keys() == other.keys() and all(
        t.dtype == other[n].dtype
        and (torch.equal(t, other[n]) or torch.equal(without_nan(t), without_nan(other[n])))
        for n, t in one.items()
    )


def without_nan(tensor: Tensor) -> Tensor:
    """A tensor and, behind it, where it is NaN, with 0 there."""
    is_nan = tensor.isnan()
    return torch.stack([torch.where(is_nan, 0, tensor), is_nan.to(tensor.dtype)])


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def refuse_nan(tensors: Tensors, source: str) -> None:
    """Raise an error that names the tensors of a file that hold NaN; masks may be infinite."""
    floats = {name: t for name, t in tensors.items() if t.dtype in FLOATS and not t.is_meta}
    # the sum is NaN where a value is, and seldom else
    found = [name for name, t in floats.items() if t.sum().isnan() and t.isnan().any()]
    if found:
        raise UserError(
            f"{source}: {len(found)} of {len(tensors)} tensors hold NaN ({listed(found, 3)}), as a"
            " training that diverged leaves them: take another file"
        )


def refuse(target: LoadTarget, found: Mismatch, source: str) -> NoReturn:
    """The error about a file that does not fit."""
    if any(ADAPTER.search(name) for name in found.unexpected):
        raise UserError(
            f"{source} holds adapters of a PEFT run beside its base: take the adapter.safetensors"
            ' beside it, or fold them in with mode = "infer", infer.merge = true and infer.export ='
            ' "merged.safetensors", and take that file'
        )
    if "model.encoder." in found.refusal:  # names and shapes are no matter, it says what to set
        raise UserError(f"{source}: {found.refusal}")
    cure = ", or weights_order = true if only names differ" if target.by_order else ""
    raise UserError(
        f"{source} does not fit {type(target.net).__name__}:\n{found.table()}\n"
        f"  take the file of this very model{cure}"
    )


def load_candidate(target: LoadTarget, tensors: Tensors) -> tuple[Mismatch, Tensors]:
    """Load tensors as the library does; where they and the network differ, and what was loaded."""
    net, own = target.net, target.net.state_dict()
    tensors = without_counters(tensors, own)
    try:
        state = without_classifier(handed_over(target, tensors), target)
    except LIBRARY_ERRORS as error:
        found = mismatch_of(without_classifier(tensors, target), own)
        found.refusal = reason(error)
        return found, tensors
    found = mismatch_of(state, own)
    if dropped := [name for name in found.missing if name in tensors]:
        found.refusal = f"{listed(dropped, 3)} cannot be fitted to the network's input"
    if found.shapes or found.refusal:
        return found, state
    counters = {name: own[name] for name in own if name.endswith(COUNTER)}
    whole = with_versions({**counters, **state}, versions_of(state))
    try:  # the network's own classes know names of older versions of themselves
        try:
            keys = net.load_state_dict(whole, strict=False)
        except ValueError:  # MNASNet reads no state without its version
            keys = net.load_state_dict(with_versions(whole, versions_of(own)), strict=False)
    except LIBRARY_ERRORS as error:
        return Mismatch(refusal=reason(error)), state
    return Mismatch(list(keys.missing_keys), list(keys.unexpected_keys)), state


LIBRARY_ERRORS = (
    *(KeyError, IndexError, AttributeError, TypeError, ValueError),
    *(RuntimeError, AssertionError, ArithmeticError),
)
"""What a library raises at names and shapes that it does not expect."""


def handed_over(target: LoadTarget, tensors: Tensors) -> Tensors:
    """What the library's loading gives the network's load_state_dict: renamed, and fitted to its
    size and channels."""
    state = Tensors()

    def record(tensors: Mapping[str, Tensor], *_: Any, **__: Any) -> Any:
        nonlocal state
        state = with_versions(tensors, versions_of(tensors))
        return SimpleNamespace(missing_keys=[], unexpected_keys=[])

    own = vars(target.net)
    own["load_state_dict"] = record  # in front of the method of its class
    try:
        with torch.no_grad():
            target.loading(target.net, with_versions(tensors, versions_of(tensors)))
    finally:
        del own["load_state_dict"]
    return with_versions(
        {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)},
        versions_of(state),
    )


def without_counters(tensors: Tensors, own: Iterable[str]) -> Tensors:
    """Tensors without scalars at the top that are none of `own`: steps, and how many were averaged
    (torch's AveragedModel). timm's converter of Next-ViT goes by order, where they would count."""
    kept = {n: t for n, t in tensors.items() if t.ndim or "." in n or n in own}
    return with_versions(kept, versions_of(tensors))


def without_classifier(tensors: Tensors, target: LoadTarget) -> Tensors:
    """Tensors without those of the classifiers that the network has lost, and without counters."""
    own = target.net.state_dict().keys()
    below = tuple(f"{name}." for name in target.classifier)
    children = dict(target.net.named_children())  # a scalar below none of them only counts
    spare = {n for n in tensors if n not in own and not n.startswith(below)}
    spare -= {n for n in spare if not tensors[n].ndim and n.partition(".")[0] not in children}
    lost = target.whole() if spare else frozenset()
    kept = {n: t for n, t in tensors.items() if n in own or (n in spare and n not in lost)}
    return with_versions(kept, versions_of(tensors))


def mismatch_of(tensors: Tensors, own: Mapping[str, Tensor]) -> Mismatch:
    """Differences between a file and a network."""
    missing = [n for n in own if n not in tensors and not n.endswith(COUNTER)]
    shapes = [
        f"{name}: file {tuple(tensors[name].shape)}, network {tuple(own[name].shape)}"
        for name in tensors
        if name in own and tensors[name].shape != own[name].shape
    ]
    return Mismatch(missing, [name for name in tensors if name not in own], shapes)


# -------------------------------------------------------------------- prefixes


def parts_of(network: FileNetwork, names: frozenset[str]) -> Iterator[FileNetwork]:
    """What in a dict of tensors may be the network with these names: all of it, and what stands
    behind a prefix behind which many of the names are found.

    Tensors elsewhere belong to other parts of a larger model (its head, a text tower, another
    copy of the network): left out.
    """
    counts = prefixes(network.tensors, names)
    most = max(counts.values(), default=0)
    several = [prefix for prefix, count in counts.items() if 2 * count >= most]
    shared = shared_prefix(network.tensors)
    for prefix in dict.fromkeys(["", *([shared] if shared else []), *several]):
        part, start = behind(network, prefix), len(prefix) + bool(prefix)
        inside = [p for p in several if p != prefix and f"{p}.".startswith(prefix and f"{prefix}.")]
        inner = tuple(f"{p}."[start:] for p in inside)
        tensors = {
            name: tensor
            for name, tensor in part.tensors.items()
            if name in names or not name.startswith(inner)
        }
        if tensors:
            yield replace(part, tensors=with_versions(tensors, versions_of(part.tensors)))


def behind(network: FileNetwork, prefix: str) -> FileNetwork:
    """The tensors whose names begin with a prefix, under the rest of their names."""
    if not prefix:
        return network
    start = len(prefix) + 1
    tensors = {
        key[start:]: tensor
        for key, tensor in network.tensors.items()
        if key.startswith(f"{prefix}.")
    }
    versions = versions_of(network.tensors)
    if versions is not None:
        inside = {k: v for k, v in versions.items() if f"{k}.".startswith(f"{prefix}.")}
        versions = {key[start:]: version for key, version in inside.items()}
    place = f"{network.name}.{prefix}".lstrip(".")
    return FileNetwork(place, with_versions(tensors, versions))


def prefixes(tensors: Iterable[str], names: frozenset[str]) -> Counter[str]:
    """Prefixes behind which names of a network stand, and how many of them."""
    counts: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in names:
                counts[".".join(parts[:start])] += 1
    return counts


def shared_prefix(tensors: Iterable[str]) -> str:
    """The prefix that all names share, for names that only the library knows."""
    parts = zip(*(key.split(".")[:-1] for key in tensors), strict=False)
    return ".".join(same[0] for same in takewhile(lambda part: len(set(part)) == 1, parts))


def fit_kernel(kernel: Tensor, channels: int) -> Tensor:
    """A kernel (O, I, kh, kw) for other input channels: the sum for one, else repeated and scaled
    by I / channels (timm's adapt_input_conv, for any I; that of timm before 1.0.31 knows I = 3)."""
    if channels == 1:
        return kernel.float().sum(1, keepdim=True).to(kernel.dtype)
    own = kernel.shape[1]
    repeated = kernel.float().repeat(1, -(-channels // own), 1, 1)[:, :channels]
    return (repeated * (own / channels)).to(kernel.dtype)


# -------------------------------------------------------------------- by order


def renamed_by_order(
    networks: list[FileNetwork], target: LoadTarget, source: str
) -> list[FileNetwork]:
    """Those of several dicts of tensors that have the order of the network, under its names.

    Raises:
        UserError: none has.
    """
    named, errors = [], []
    for network in networks:
        try:
            named.append(rename_by_order(network, target, source))
        except UserError as error:
            errors.append(error)
    if not named:
        raise errors[0]
    return named


def rename_by_order(network: FileNetwork, target: LoadTarget, source: str) -> FileNetwork:
    """Give the tensors of a file the names of the network's in the same place.

    The last parts of the names (weight, bias, running_mean ...) must agree. Where the network's
    classifier was taken off, the file may end with a classifier's one or two tensors.

    Raises:
        UserError: naming the first place where file and network differ.
    """
    ours = [(n, t) for n, t in target.net.state_dict().items() if not n.endswith(COUNTER)]
    tensors = without_counters(network.tensors, {name for name, _ in ours})
    theirs = [(n, t) for n, t in tensors.items() if not n.endswith(COUNTER)]
    rest = theirs[len(ours) :]
    one_layer = len({name.rpartition(".")[0] for name, _ in rest}) <= 1 and len(rest) <= 2
    if len(theirs) < len(ours) or (rest and not (target.classifier and one_layer)):
        raise UserError(
            f"{source}: {len(theirs)} tensors, {type(target.net).__name__} has {len(ours)};"
            " weights_order needs a file of the same network"
        )
    pairs = list(zip(ours, theirs, strict=False))
    for (our_name, our), (their_name, their) in pairs:
        kinds = our_name.rpartition(".")[2], their_name.rpartition(".")[2]
        if kinds[0] != kinds[1] or not may_fit(our_name, our, their, target):
            raise UserError(
                f"{source}: {their_name} {tuple(their.shape)} stands in the place of"
                f" {our_name} {tuple(our.shape)}; weights_order needs the same network in the same"
                " order"
            )
    renamed = Tensors((our_name, their) for (our_name, _), (_, their) in pairs)
    return FileNetwork(network.name, renamed)


def may_fit(name: str, our: Tensor, their: Tensor, target: LoadTarget) -> bool:
    """Whether a tensor has the shape of the network's, or one that libraries fit to it: position
    embeddings of another grid, first kernels for other channels."""
    if our.shape == their.shape:
        return True
    if name.split(".")[-1] in POSITIONS:
        return our.ndim == their.ndim and our.shape[-1] == their.shape[-1]
    same_size = our.shape[:1] + our.shape[2:] == their.shape[:1] + their.shape[2:]
    return same_size and name in {f"{conv}.weight" for conv in target.first_conv}


def weights_hash(network: nn.Module) -> str:
    """SHA-256 over names, shapes and values of a network."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
