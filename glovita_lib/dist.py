"""Ranks, devices, seeds, precision, and what travels between processes: ranks and workers."""

import gc
import multiprocessing.queues
import os
import pickle
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from glovita_lib.errors import UserError, shortened
from glovita_lib.spec_train import Dataloading

# ------------------------------------------------------------------------------------- ranks
#
# One process is world size 1.
#
# torchrun starts the processes; nothing here does. CPU tensors and Python objects travel over gloo,
# CUDA tensors over NCCL.

# How long a rank waits for the others, e.g. for a download of the first one. torchrun ends all
# processes as soon as one of them fails, so a long time never hides a crash.
TIMEOUT = timedelta(hours=2)
WORD = (1 << 64) - 1
DROPOUT = 0  # number of the random stream


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int  # 0 .. world - 1
    world: int
    local_rank: int  # among the processes of this machine
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0


# ---------------------------------------------------------------------- start and stop


def start() -> Ranks:
    """This process's ranks from torchrun's environment; without one a world of size 1.

    Raises:
        UserError: more processes on this machine than GPUs, or an incomplete environment.
    """
    rank, world, local = (
        number_of(name, default)
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = pick_device(local, world)
    if world > 1:
        missing = [
            name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
        ]
        if missing:
            raise UserError(
                f"WORLD_SIZE is {world} but {', '.join(missing)} is not set: start several"
                " processes with torchrun --nproc-per-node N glovita.py SPEC"
            )
        cuda = device.type == "cuda"
        td.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            timeout=TIMEOUT,
            device_id=device if cuda else None,
        )
    return Ranks(rank, world, local, device)


def number_of(name: str, default: int) -> int:
    """An integer of the environment."""
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f"environment variable {name} is {text!r}, expected a number: unset it")
    return int(text) if text else default


def pick_device(local_rank: int, world: int) -> torch.device:
    """cuda:local_rank, else mps for a single process, else cpu."""
    if torch.cuda.is_available():
        devices = torch.cuda.device_count()
        if local_rank >= devices:
            raise UserError(
                f"process {local_rank} of this machine has no GPU of its own, {devices} are"
                f" visible: start torchrun with --nproc-per-node {devices}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("mps" if world == 1 and torch.backends.mps.is_available() else "cpu")


def stop() -> None:
    """Leave the process group, if there is one.

    Models in reference cycles are freed first: one that still holds the group keeps its threads,
    which abort the process if they end behind the interpreter.
    """
    if td.is_initialized():
        gc.collect()
        td.destroy_process_group()


@contextmanager
def session() -> Iterator[Ranks]:
    """`start` and, whatever happens in between, `stop`."""
    ranks = start()
    try:
        yield ranks
    finally:
        stop()


# ---------------------------------------------------------------------- seeds


def hash_seed(*numbers: int) -> int:
    """63-bit hash of counters, the seed of the stream that belongs to them.

    h <- splitmix64(h + n) for each number n, with h = 0 at first; splitmix64 is one output of the
    generator of Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
        state ^= state >> 31
    return state >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_batch(seed: int, epoch: int, place: int) -> None:
    """Seed torch's generators, the stream of dropout and stochastic depth, for one batch, which is
    known by its place in the order of the epoch.

    Only those of devices in use: torch.manual_seed keeps the seed, with a stack trace, for every
    kind of device that may still start, which takes 3 ms a step and memory that only grows.
    """
    number = hash_seed(seed, epoch, place, DROPOUT)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


# ---------------------------------------------------------------------- between ranks


def barrier(ranks: Ranks) -> None:
    """Wait for all ranks."""
    if ranks.world > 1:
        td.all_reduce(torch.zeros(1))  # a CPU tensor: the hosts wait, not the CUDA streams


def broadcast_object(ranks: Ranks, value: Any) -> Any:
    """The first rank's value, on every rank."""
    if ranks.world == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def all_sum(ranks: Ranks, tensor: Tensor) -> Tensor:
    """Sum over ranks; the argument stays as it is."""
    if ranks.world == 1:
        return tensor
    total = tensor.detach().clone()
    td.all_reduce(total)
    return total


def all_mean(ranks: Ranks, tensor: Tensor) -> Tensor:
    """Mean over ranks; the argument stays as it is."""
    return tensor if ranks.world == 1 else all_sum(ranks, tensor) / ranks.world


def any_rank(ranks: Ranks, flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return int(all_sum(ranks, torch.tensor(int(flag)))) > 0


def gather_rows(ranks: Ranks, rows: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Concatenate every rank's rows on the first rank, in rank order.

    rows: name -> (N, ...) CPU tensor of any type; N may differ between ranks and be 0. A rank
    without rows may give {}. Returns None on the other ranks.
    """
    if ranks.world == 1:
        return rows
    shapes: list[Any] | None = [None] * ranks.world if ranks.is_main else None
    td.gather_object({k: (tuple(v.shape), v.dtype) for k, v in rows.items()}, shapes, dst=0)
    if shapes is None:
        for name in sorted(rows):
            if rows[name].numel():
                td.send(as_bytes(rows[name]), dst=0)
        return None
    names = {frozenset(given) for given in shapes if given}
    assert len(names) <= 1, f"the ranks have rows of other names: {names}"
    parts = {name: [value] for name, value in rows.items()}
    for source in range(1, ranks.world):
        for name, (shape, dtype) in sorted(shapes[source].items()):
            part = torch.empty(shape, dtype=dtype)
            if part.numel():
                td.recv(as_bytes(part), src=source)  # shares memory: a fresh tensor is contiguous
            parts.setdefault(name, []).append(part)
    # an empty first part gives way, its trailing shape may be unknown to a rank without rows
    return {name: torch.cat([p for p in ps if len(p)] or ps[:1]) for name, ps in parts.items()}


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a tensor as uint8, so that every type travels."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def main_decides(ranks: Ranks, decide: Callable[[], Any]) -> Any:
    """What `decide` returns or raises on the first rank, which alone calls it, on every rank."""
    result, error = None, None
    if ranks.is_main:
        try:
            result = decide()
        except Exception as failure:
            error = failure
    result, failed = broadcast_object(ranks, (result, as_message(error)))
    if error is not None:
        raise error
    if failed is not None:
        raise rebuild(failed)
    return result


@contextmanager
def main_first(ranks: Ranks) -> Iterator[None]:
    """The first rank runs the block before the others: downloads, caches.

    Where the block fails on the first rank it fails on all.
    """
    if not ranks.is_main:
        failed = broadcast_object(ranks, None)
        if failed is not None:
            raise rebuild(failed)
        yield
        return
    try:
        yield
    except Exception as failure:
        broadcast_object(ranks, as_message(failure))
        raise
    broadcast_object(ranks, None)


def as_message(error: Exception | None) -> tuple[bool, str] | None:
    """An error as it travels: whether it is the user's, and its text, shortened: the
    first rank says all of it."""
    if error is None:
        return None
    if isinstance(error, UserError):
        return True, shortened(str(error), "what the first rank says")
    return False, f"the first rank failed: {type(error).__name__}: {error}"


def rebuild(failed: tuple[bool, str]) -> Exception:
    """The error that `as_message` sent."""
    is_user_error, text = failed
    return UserError(text) if is_user_error else RuntimeError(text)


# ---------------------------------------------------------------------- model


def wrap(model: nn.Module, ranks: Ranks, find_unused_parameters: bool) -> nn.Module:
    """The module to call in training: DistributedDataParallel where several ranks train
    something, else the model itself.

    The state dict is always taken from `model`, whose keys stay as they are. Before each training
    forward the buffers are those of the first rank; before evaluation `sync_buffers` does that.
    """
    if ranks.world == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
        find_unused_parameters=find_unused_parameters,
        gradient_as_bucket_view=True,
    )


def join_batch_norms(model: nn.Module, ranks: Ranks) -> None:
    """Let the batch norms of a model share mean and variance over the ranks, in place; the keys of
    the state dict stay.

    Raises:
        UserError: ranks without GPUs, which torch's cannot join; a batch norm of a kind of its own.
    """
    norms = batch_norms(model)
    if ranks.world == 1 or not norms:
        return
    if ranks.device.type != "cuda":
        raise UserError(
            f"training.sync_batch_norm joins batch norms of GPUs; the ranks compute on"
            f" {ranks.device.type}: leave it out"
        )
    for name, norm in norms.items():
        joined = joined_norm(norm)
        if joined is None:
            raise UserError(
                f"training.sync_batch_norm: {name} ({type(norm).__name__}) is a batch norm of its"
                " own kind, which cannot be joined: leave it out"
            )
        model.set_submodule(name, joined)


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The batch norms of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def joined_norm(norm: nn.Module) -> nn.Module | None:
    """A batch norm that shares its statistics over the ranks, with the tensors of a plain one or of
    timm's with an activation; None of another kind."""
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    if type(norm).__module__.startswith("timm."):  # else timm need not be loaded
        from timm.layers import SyncBatchNormAct, convert_sync_batchnorm

        joined = convert_sync_batchnorm(norm)
        return joined if isinstance(joined, SyncBatchNormAct) else None
    return None


@torch.no_grad()
def sync_buffers(ranks: Ranks, model: nn.Module) -> None:
    """Give every rank the first rank's buffers, so that all evaluate the model that is saved.

    The running statistics of batch normalisation follow each rank's own samples in a forward.
    """
    if ranks.world > 1:
        for buffer in model.buffers():
            td.broadcast(buffer, src=0)


def peak_memory_mb(device: torch.device) -> float | None:
    """Largest memory in use so far, in MiB: of tensors on a GPU, else of the whole process; None
    where the system does not say (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB on Linux


def cores() -> int:
    """Cores that this rank may use."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this platform
        count = os.cpu_count() or 1
    return max(1, count // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


# --------------------------------------------------------------------------------- precision
#
# Autocast types: which one a device gets and the contexts that apply it.


def resolve_precision(name: str, device: torch.device) -> str:
    """ "no", "bf16" or "fp16" for a spec's precision; auto is bf16 on GPUs that compute it
    natively, else "no".

    Raises:
        UserError: fp16 on a CPU, whose kernels lack it.
    """
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "no"
    if name == "fp16" and device.type == "cpu":
        raise UserError(
            'training.precision = "fp16" needs a GPU, this is a CPU; use "auto", "no" or "bf16"'
        )
    return name


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass."""
    if precision == "no":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype)


# -------------------------------------------------------------------------- worker processes

#
# Processes that make batches: what travels to them and back.

TAKEN = "another epoch has taken the workers"
BatchTask = tuple[int, int, np.ndarray]  # epoch, place in its order, rows


class BatchMaker(Protocol):
    """Makes the batch of a task; picklable."""

    def __call__(self, task: BatchTask) -> Any: ...

    def makes_same(self, other: Any) -> bool:
        """Whether another one makes the same batches of the same objects."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A user error that travels from a worker process."""

    text: str


@dataclass(frozen=True, slots=True)
class Piped:
    """A batch that travels through a pipe, as shared memory is used up: slower, but it comes."""

    content: bytes
    nbytes: int  # of its tensors
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerSamples(Dataset[Any]):
    """What DataLoader indexes with the number of a builder and a task, in a worker process: batches
    in shared memory, or what travels instead."""

    builders: tuple[BatchMaker, ...]

    def __getitem__(self, numbered: tuple[int, BatchTask]) -> Any:
        number, task = numbered
        try:
            batch = self.builders[number](task)
        except UserError as error:
            return Failure(str(error))
        found = tensors_in(batch)
        try:
            for tensor in found:
                tensor.share_memory_()
        except RuntimeError as error:  # no room, or too many open files
            nbytes = sum(tensor.nbytes for tensor in found)
            plain = pickle.dumps(batch, protocol=pickle.HIGHEST_PROTOCOL)
            return Piped(plain, nbytes, str(error).splitlines()[0])
        return batch


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a batch: fields of objects, entries of lists and tables."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif is_dataclass(value):
        value = [getattr(value, part.name) for part in fields(value)]
    elif hasattr(value, "__dict__"):
        value = list(vars(value).values())
    if not isinstance(value, list | tuple):
        return []
    return [tensor for part in value for tensor in tensors_in(part)]


class WorkerPool:
    """Worker processes that make the batches of one loader, or of all loaders of a run.

    They start with the first batch that is asked for, knowing the builders that were added until
    then, and start anew for one that was added later: a start costs an import of torch wherever
    processes are not forked. One epoch of one loader is made at a time.
    """

    def __init__(self, spec: Dataloading, device: torch.device) -> None:
        self.spec, self.pinned = spec, spec.pin_memory and device.type == "cuda"
        self.workers = 0
        self._builders: list[BatchMaker] = []
        self._known = 0  # builders that the running processes have
        self._tasks: Iterator[tuple[int, BatchTask]] = iter(())
        self._processes: DataLoader[Any] | None = None
        self._told = False  # that shared memory is small

    def add(self, builder: BatchMaker, workers: int = 0) -> None:
        """Let the processes know a builder; there will be as many as any loader asks for."""
        self.workers = max(self.workers, workers)
        if self.number(builder) is None:
            self._builders.append(builder)

    def number(self, builder: BatchMaker) -> int | None:
        """Place of a builder that makes the same batches; None where there is none."""
        same = (known.makes_same(builder) for known in self._builders)
        return next((number for number, found in enumerate(same) if found), None)

    def batches(self, builder: BatchMaker, tasks: Iterator[BatchTask]) -> Iterator[Any]:
        """Batches of a builder that was added, made ahead, pinned by a thread.

        Raises:
            UserError: a sample cannot be read, a worker died or took longer than the timeout.
        """
        number = self.number(builder)
        assert number is not None, "the builder was not added"
        if number >= self._known:
            self.close()
        mine = self._tasks = ((number, task) for task in tasks)
        loader = self.start() if self._processes is None else self._processes
        try:
            for batch in loader:
                assert self._tasks is mine, TAKEN
                if isinstance(batch, Failure):
                    raise UserError(batch.text)
                yield self.unpiped(batch) if isinstance(batch, Piped) else batch
            assert self._tasks is mine, TAKEN  # the other one may have come to its end
        except RuntimeError as error:
            raise self.explain(error) from error

    def unpiped(self, piped: Piped) -> Any:
        """A batch that came through a pipe; the first time it is said why."""
        if not self._told:
            self._told = True
            size = piped.nbytes / 2**20
            most = size * (self.workers * self.spec.prefetch_factor + 2)  # 2: in use and pinned
            print(
                f"note: shared memory (/dev/shm) is too small for the batches in flight, about"
                f" {most:,.0f} MiB of {size:,.1f} MiB each: those that find no room come through"
                " pipes, which is slower. Enlarge it (docker --shm-size), or lower"
                f" dataloading.num_workers or prefetch_factor ({piped.reason})",
                file=sys.stderr,
            )
        batch = pickle.loads(piped.content)
        return batch.pin_memory() if self.pinned else batch

    def __iter__(self) -> Iterator[tuple[int, BatchTask]]:
        """The tasks of the running epoch: this is DataLoader's sampler."""
        return self._tasks

    def start(self) -> DataLoader[Any]:
        """The worker processes; kept for the next epoch if they are persistent."""
        spec = self.spec
        loader: DataLoader[Any] = DataLoader(
            WorkerSamples(tuple(self._builders)),
            batch_size=None,  # a task is a whole batch
            sampler=self,
            collate_fn=as_it_is,
            num_workers=self.workers,
            persistent_workers=spec.persistent_workers,
            prefetch_factor=spec.prefetch_factor,
            pin_memory=self.pinned,
            timeout=spec.timeout,
            worker_init_fn=begin_worker,
            generator=torch.Generator(),  # leaves the global stream alone
        )
        if spec.persistent_workers:
            self._processes, self._known = loader, len(self._builders)
        return loader

    def explain(self, error: RuntimeError) -> Exception:
        """A user error of what DataLoader says about dead or slow workers; else the error."""
        self.close()
        text = str(error)
        if "timed out" in text:
            return UserError(
                f"no batch came within {self.spec.timeout:g} s: raise dataloading.timeout (0 waits"
                " for ever) or look for slow files"
            )
        if "exited unexpectedly" in text or "is killed by signal" in text:
            return UserError(
                f"a data worker died ({text.splitlines()[0]}), most often for want of memory or of"
                " shared memory (/dev/shm): lower dataloading.num_workers or prefetch_factor"
            )
        return error

    def close(self) -> None:
        """End the processes."""
        self._processes, self._known = None, 0


def as_it_is(batch: Any) -> Any:
    """No collation: a task already is a batch."""
    return batch


def begin_worker(worker: int) -> None:
    """Leave Ctrl-C to the main process, which ends the workers; a batch that cannot be sent ends
    its worker, which the main process notices, instead of being waited for."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    queue = multiprocessing.queues.Queue
    queue._on_queue_feeder_error = staticmethod(end_worker)  # type: ignore[attr-defined]  # private


def end_worker(error: Exception, batch: Any) -> None:
    """End this process for want of a way to send a batch."""
    if not isinstance(error, BrokenPipeError | ConnectionResetError):  # the main process has ended
        print(f"a data worker cannot send a batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)
