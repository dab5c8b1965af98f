"""Mode extract: features of every sample of a split, in the order of the data set, as HDF5."""

import tempfile
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from dataclasses import replace as with_fields
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib import dist, files
from glovita_lib.data import Data, Split, outputs_line, skipped
from glovita_lib.errors import UserError
from glovita_lib.extraction import (
    Extractor,
    PendingReadout,
    Readout,
    source_of,
    wanted_splits,
)
from glovita_lib.feature_writer import (
    BlockFiles,
    BlockPlan,
    FrameRows,
    bag_tables,
    feature_file_name,
    group_order,
    left_out,
    notes_of,
    part_to_read,
    put_together,
    recipe_of_features,
    recipe_of_tables,
    refuse_other,
    sample_tables,
)
from glovita_lib.files import Lock
from glovita_lib.loader import Loader
from glovita_lib.loggers import Rate, say, say_notes
from glovita_lib.spec import Loaded
from glovita_lib.spec_root import Root
from glovita_lib.spec_train import Extract

# --------------------------------------------------------------------------------- one split
#
# All ranks extract blocks, then one of them writes the file.
#
# N samples.


@dataclass(frozen=True)
class Job:
    """The extraction of one split."""

    root: Root
    extractor: Extractor
    name: str
    split: Split
    plan: BlockPlan
    parts: BlockFiles
    recipe: dict[str, Any]  # of all that is written beside the features
    augmented: bool
    report: list[str]  # what was noted when the data were read, left-out samples among it

    @property
    def ranks(self) -> dist.Ranks:
        """Ranks of the experiment."""
        return self.extractor.experiment.ranks

    def check(self) -> None:
        """Look at all that can be wrong before anything is computed.

        Raises:
            UserError: a file made otherwise, bags with two labels, samples without coordinates.
        """

        def look() -> None:
            self.is_complete()
            self.tables(self.plan.rows)

        dist.main_decides(self.ranks, look)

    def is_complete(self) -> bool:
        """Whether the file is there already."""
        # Where a broken sample ends the extraction, a file that lacks some is another one.
        complete = {"left_out": 0} if self.root.extract.on_error == "stop" else {}
        return refuse_other(self.parts.target, self.parts.recipe | self.recipe | complete)

    def run(self) -> None:
        """Write what is missing, then the file."""
        lock = Lock(self.parts.lock)
        try:
            if dist.main_decides(self.ranks, lambda: self.prepare(lock)):
                return
            self.write()
            dist.barrier(self.ranks)
            dist.main_decides(self.ranks, self.finish)
        finally:
            lock.release()

    def prepare(self, lock: Lock) -> bool:
        """Whether the file is complete; if not, the folder of the blocks is ready and locked."""
        parts = self.parts
        if not parts.folder.is_dir() and self.is_complete():
            self.say_complete()
            return True
        files.make_folder(parts.folder)
        try:
            lock.acquire()
        except UserError as error:
            raise UserError(str(error).partition(", or start beside it")[0]) from None
        if self.is_complete():  # by another process, or killed before the blocks were removed
            parts.remove()
            self.say_complete()
            return True
        parts.open()
        self.forget_broken()
        return False

    def say_complete(self) -> None:
        """Say that nothing is left to do."""
        say(f"{self.name}: {self.parts.target} is complete; nothing to do")
        for line in left_out(self.parts.target):
            say(f"  left out: {line}")

    def forget_broken(self) -> None:
        """Give samples that could not be read another chance: those of unfinished blocks, and all
        of them where none may be left out."""
        block_of = dict(zip(self.plan.rows.tolist(), self.plan.block_of.tolist(), strict=True))
        for row in skipped(self.parts.folder):
            block = self.parts.path(block_of[row])
            if self.root.extract.on_error == "stop":
                block.unlink(missing_ok=True)
            if not block.is_file():
                (self.parts.folder / f"{row}.txt").unlink()

    def write(self) -> None:
        """Write this rank's share of the blocks that are missing, each while the next is read."""
        pending = dist.broadcast_object(self.ranks, self.parts.pending())
        mine = pending[self.ranks.rank :: self.ranks.world]
        done = self.plan.blocks - len(pending)
        if done:
            say_main(self.ranks, f"{self.name}: {done} of {self.plan.blocks} blocks were finished")
        total = sum(len(self.plan.rows_of(block)) for block in mine)
        rate = Rate(self.name, total, shown=self.ranks.is_main)
        writing: Future | None = None
        with ThreadPoolExecutor(1) as pool:  # left, also by Ctrl-C, when the block is on the disk
            for block, readouts in self.read(mine, rate):
                if writing is not None:
                    writing.result()  # one at a time, lest blocks pile up before a slow disk
                rows = self.plan.rows_of(block)
                writing = pool.submit(self.parts.write, block, rows, readouts)
            if writing is not None:
                writing.result()
        rate.close()

    def finish(self) -> None:
        """Put the blocks together and say what came out."""
        parts, compression = self.parts, self.root.extract.filters
        broken = skipped(parts.folder)
        keep = ~np.isin(self.plan.rows, list(broken))
        rows = self.plan.rows[keep]
        if not len(rows):
            parts.remove()  # mended ones are to be read when it is started again
            lines = "\n".join(broken.values())
            raise UserError(f"{self.name}: none of the {len(keep)} samples could be read\n{lines}")
        tables = self.tables(rows)
        if broken:
            tables["left_out"] = np.array(list(broken.values()), object)
        if self.report:
            tables["notes"] = np.array(self.report, object)
        notes = {**self.recipe, **notes_of(self.root, self.extractor), "left_out": len(broken)}
        frames = FrameRows.of(self.split) if self.root.extract.output == "frames" else None
        shape = put_together(
            parts, tables=tables, compression=compression, keep=keep, notes=notes, frames=frames
        )
        parts.remove()
        size = f"{parts.target.stat().st_size / 2**20:,.1f} MiB"
        count = f"{len(rows):,} of {len(keep):,}" if broken else f"{len(rows):,}"
        what = f"samples in {len(tables['ids']):,} bags" if self.root.extract.bag_by else "samples"
        if frames is not None:
            what = f"clips, the frames of {len(tables['ids']):,} videos"
        say(f"{self.name}: {count} {what}, features {shape}, {size}: {parts.target}")
        for line in broken.values():
            say(f"  left out: {line}")

    def tables(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What is written beside the features of some rows."""
        spec = self.root.extract
        if spec.output == "frames":
            return FrameRows.of(self.split).tables(self.split)
        if spec.bag_by is None:
            return sample_tables(self.split, rows)
        return bag_tables(self.split, rows, spec.coords_file)

    def rehearse(self) -> None:
        """Read one batch out and write nothing."""
        count = self.extractor.experiment.resolved.eval_batch_size
        rows = self.plan.rows[:count]
        with tempfile.TemporaryDirectory() as folder:
            part = part_to_read(self.split, rows, Path(folder), self.extractor)
            with closing(self.loader(part, 0)) as loader:
                batch = next(iter(loader.epoch(0)))
            shape = self.extractor(batch, ids=part.ids, augment=None).features.shape
            broken = skipped(Path(folder))
        say_main(self.ranks, f"{self.name}: one batch gives features {shape}; nothing was written")
        for line in broken.values():
            say_main(self.ranks, f"  left out: {line}")

    def read(self, blocks: list[int], rate: Rate) -> Iterator[tuple[int, list[Readout]]]:
        """Blocks one after another, each with the readouts of its batches.

        One loader serves all blocks, so that decoding never pauses; under a train policy each
        block has its own, as its random draws must not depend on the blocks before it.
        """
        groups = [[block] for block in blocks] if self.augmented else [blocks] if blocks else []
        for group in groups:
            rows = np.concatenate([self.plan.rows_of(block) for block in group])
            split = part_to_read(self.split, rows, self.parts.folder, self.extractor)
            with closing(self.readouts(split, group[0], rate)) as stream:
                for block in group:
                    readouts, missing = [], len(self.plan.rows_of(block))
                    while missing > 0:
                        readouts.append(next(stream))
                        missing -= readouts[-1].samples
                    yield block, readouts

    def readouts(self, split: Split, block: int, rate: Rate) -> Generator[Readout, None, None]:
        """What is read out of the batches of a readable split; each is copied to the host while
        the device computes the next one.

        Args:
            block: that the random draws of a train policy follow from.

        Raises:
            UserError: a sample cannot be read, or its features cannot be stored.
        """
        running: PendingReadout | None = None
        with closing(self.loader(split, block)) as loader:
            for index, batch in enumerate(loader.epoch(0)):
                seed = dist.hash_seed(self.root.seed, block, index) if self.augmented else None
                started = self.extractor.start(batch, augment=seed)
                if running is not None:
                    yield self.settled(running, split.ids, rate)
                running = started
            if running is not None:
                yield self.settled(running, split.ids, rate)

    def settled(self, running: PendingReadout, ids: list[str], rate: Rate) -> Readout:
        """The readout of a batch, when it is there."""
        try:
            readout = self.extractor.finish(running, ids=ids)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None
        rate.add(readout.samples)
        return readout

    def loader(self, split: Split, block: int) -> Loader:
        """Batches of a split, in order, decoded while the encoder computes."""
        return self.extractor.experiment.single_pass(
            split,
            augmented=self.augmented,
            seed=dist.hash_seed(self.root.seed, block),
            ranks=with_fields(self.ranks, rank=0, world=1),  # the rows are shared out already
        )


def say_main(ranks: dist.Ranks, text: str) -> None:
    """A line from the first rank."""
    if ranks.is_main:
        say(text)


# ---------------------------------------------------------------------------------- the mode

BLOCK_BYTES = 256 * 2**20  # of features: a block is kept in memory until it is written


def run(loaded: Loaded[Root], *, dry_run: bool) -> None:
    """Extract the wanted splits; a dry run reads one batch of each and writes nothing."""
    with dist.session() as ranks:
        spec = loaded.root.extract
        experiment, data = source_of(loaded, ranks, frames=spec.output == "frames")
        extractor = Extractor(experiment, spec)
        say_main(ranks, ": ".join(outputs_line(data.subtask, data.class_names, ordered=False)))
        notes = data.report if ranks.is_main else []
        at_end = spec.on_error == "skip" and not dry_run
        whole = None if dry_run else f"the notes of the files in {spec.output_dir}"
        say_notes([heading(note) if at_end else note for note in notes], whole)
        splits = wanted_splits(data, spec.split, "extract.split")
        jobs = [plan_job(loaded.root, extractor, data, *split) for split in splits.items()]
        refuse_one_name(jobs)
        for job in jobs:
            job.check()
        for job in jobs:
            if dry_run:
                job.rehearse()
            else:
                job.run()
        say_notes([note for note in notes if at_end and heading(note) != note], whole)


def heading(note: str) -> str:
    """A note without its list of samples, which comes at the end."""
    head, newline, _ = note.partition("\n")
    return f"{head} listed at the end" if newline else head


# ---------------------------------------------------------------------- jobs


def plan_job(root: Root, extractor: Extractor, data: Data, name: str, split: Split) -> Job:
    """The extraction of one split: file name, order of the samples, recipe."""
    spec, experiment = root.extract, extractor.experiment
    rows = np.arange(len(split)) if spec.bag_by is None else group_order(split)
    batch = experiment.resolved.eval_batch_size
    plan = BlockPlan(rows, block_size(spec, batch, extractor.sample_bytes))
    augmented = name == "train" and not spec.use_eval_transform_for_train
    features = recipe_of_features(root, extractor, data, name, split)
    features["policy"] = "train" if augmented else "test"
    if augmented:  # what its random draws follow from
        features |= {"seed": root.seed, "draws": f"{plan.block} / {batch}"}
    target = Path(spec.output_dir) / feature_file_name(root, extractor, name)
    return Job(
        root=root,
        extractor=extractor,
        name=name,
        split=split,
        plan=plan,
        parts=BlockFiles(target, features, plan),
        recipe=recipe_of_tables(root, data, split),
        augmented=augmented,
        report=data.report,
    )


def block_size(spec: Extract, batch: int, sample_bytes: int) -> int:
    """Samples of a block: whole batches, at least one, with at most BLOCK_BYTES of features.

    It follows from the spec and the model alone, so that all ranks, and a run that goes on after a
    kill, number the blocks alike.
    """
    wanted = -(-spec.block_samples // batch)
    return batch * max(1, min(wanted, BLOCK_BYTES // (batch * sample_bytes)))


def refuse_one_name(jobs: list[Job]) -> None:
    """Every split needs a file of its own.

    Raises:
        UserError: two have the same.
    """
    targets = [job.parts.target for job in jobs]
    if len(set(targets)) < len(targets):
        raise UserError(
            f"extract.output_filename gives {targets[0].name} to several of the splits"
            f" {', '.join(job.name for job in jobs)}: put {{split}} into it, or name one with"
            " extract.split"
        )
