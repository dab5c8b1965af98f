"""Output of a run on the console and to experiment trackers."""

import math
import os
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from glovita_lib.dist import Ranks
from glovita_lib.errors import UserError, shortened
from glovita_lib.files import remove, write_text
from glovita_lib.metric_names import lower_is_better, metric_name, split_name
from glovita_lib.rundir import RunDir
from glovita_lib.spec import ByStruct, Spec
from glovita_lib.spec_train import NoLogger, WandbLogger

if TYPE_CHECKING:
    import wandb

# ----------------------------------------------------------------------------------- console
#
# A progress bar on a terminal, plain lines elsewhere.

SHOWN_CLASSES = 10  # of a metric with a value for each; of more the median and the range


class Bar:
    """Progress of one epoch: tqdm on a terminal, else nothing; each epoch ends with a line."""

    def __init__(self, title: str, total: int, start: int, *, shown: bool) -> None:
        self.bar: Any = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, desc=title, leave=False, unit="batch")

    def advance(self) -> None:
        """One batch is done."""
        if self.bar is not None:
            self.bar.update()

    def show(self, **values: float) -> None:
        """Numbers behind the bar; called only where the device is waited for anyway."""
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self.bar is not None:
            self.bar.close()


class Rate:
    """Progress of a pass over samples: a bar on a terminal, else a line now and then."""

    EVERY = 30.0  # seconds between two lines

    def __init__(self, title: str, total: int, *, shown: bool) -> None:
        self.title, self.total, self.done = title, total, 0
        self.started = self.told = time.perf_counter()
        self.bar: Any = None
        self.shown = shown and not sys.stderr.isatty()
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=title, leave=False, unit="sample", unit_scale=True)

    def add(self, samples: int) -> None:
        """Samples that are done."""
        self.done += samples
        if self.bar is not None:
            self.bar.update(samples)
        now = time.perf_counter()
        if self.shown and now - self.told > self.EVERY:
            self.told = now
            rate = self.done / (now - self.started)
            left = (self.total - self.done) / rate
            say(f"{self.title}: {self.done:,} of {self.total:,}, {rate:,.0f}/s, {left:,.0f} s left")

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self.bar is not None:
            self.bar.close()


class Share:
    """Progress of a computation by the share that is done: a line now and then if it is long."""

    EVERY = 10.0  # seconds between two lines

    def __init__(self, title: str) -> None:
        self.title = title
        self.started = self.told = time.perf_counter()

    def __call__(self, share: float) -> None:
        """A share from 0 to 1 is done."""
        now = time.perf_counter()
        if share < 1 and now - self.told > self.EVERY:
            self.told = now
            left = (now - self.started) * (1 - share) / max(share, 1e-9)
            say(f"{self.title}: {share:.0%} done, about {left:,.0f} s left")


class Meter:
    """Samples per second since the last reading."""

    def __init__(self) -> None:
        self.samples, self.since = 0, time.perf_counter()

    def add(self, samples: int) -> None:
        """Count samples that were trained on."""
        self.samples += samples

    def read(self) -> float:
        """Samples per second since the last reading."""
        now = time.perf_counter()
        rate = self.samples / max(now - self.since, 1e-9)
        self.samples, self.since = 0, now
        return rate


def epoch_line(record: dict[str, Any], *, epochs: int, best_metric: str | None) -> str:
    """One line about an epoch: losses, metrics, learning rate, speed, the best so far.

    >>> record = {"epoch": 1, "train_loss": 0.5, "val_loss": 0.4, "val_f1": 0.9, "lr": 1e-3}
    >>> record |= {"samples_per_s": 1200.0, "seconds": 4.1, "best": 0.9, "best_epoch": 1}
    >>> epoch_line(record, epochs=3, best_metric="val_f1")
    'epoch 2/3 | train loss 0.5000 | val loss 0.4000 f1 0.9000* | lr 0.001 | 1,200/s 4.1 s'
    """
    parts = [f"epoch {record['epoch'] + 1:>{len(str(epochs))}}/{epochs}"]
    for split in ("train", "val"):
        values = {k: v for k, v in record.items() if k.startswith(f"{split}_")}
        if values:
            parts.append(f"{split} " + " ".join(entries(values, record, best_metric)))
    parts.append(f"lr {record['lr']:.3g}")
    parts.append(f"{record['samples_per_s']:,.0f}/s {record['seconds']:.1f} s")
    if best_metric and record.get("best", 0) is None:
        parts.append(f"{best_metric.split('_', 1)[1]} was never defined")
    elif best_metric and record.get("best_epoch") not in (None, record["epoch"]):
        best = decimal(record["best"])
        parts.append(f"best {best} in epoch {record['best_epoch'] + 1}")
    return " | ".join(parts)


def entries(
    values: dict[str, float | None], record: dict[str, Any], best_metric: str | None
) -> Iterator[str]:
    """Metrics of a split; of many classes the median and the range of each metric."""
    families = by_family(values)
    for family, own in families.items():
        if len(own) <= SHOWN_CLASSES:
            yield from (entry(key, value, record, best_metric) for key, value in own.items())
            continue
        if best_metric in own:
            yield entry(best_metric, own[best_metric], record, best_metric)
        yield f"{family} {spread_of(own.values())}"


def by_family(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by logged name, those of the classes of one metric together, under its name."""
    families: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        families.setdefault(metric_name(key), {})[key] = value
    return families


def spread_of(values: Iterable[float | None]) -> str:
    """Median, range and number of values, those that are defined."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return "-"
    middle, low, high = map(decimal, (median(known), min(known), max(known)))
    return f"{middle} ({low} to {high} of {len(known):,})"


def decimal(value: float) -> str:
    """Four decimals; five significant digits of tiny and of large numbers.

    >>> [decimal(value) for value in (0.5, 0.0, 1.2345678e-7, 1234567.89)]
    ['0.5000', '0.0000', '1.2346e-07', '1.2346e+06']
    """
    plain = value == 0 or 1e-3 <= abs(value) < 1e4 or not math.isfinite(value)
    return f"{value:.4f}" if plain else f"{value:.5g}"


def entry(key: str, value: float | None, record: dict[str, Any], best_metric: str | None) -> str:
    """A metric without its split, with a star where it is the best so far."""
    name = key.split("_", 1)[1]
    if value is None or math.isnan(value):
        return f"{name} -"
    star = "*" if key == best_metric and record.get("best_epoch") == record["epoch"] else ""
    return f"{name} {decimal(value)}{star}"


def better(value: float, than: float | None, metric: str, min_delta: float = 0.0) -> bool:
    """Whether a metric improved by more than min_delta; NaN never improves, anything beats
    nothing."""
    if math.isnan(value):
        return False
    if than is None:
        return True
    return value < than - min_delta if lower_is_better(metric) else value > than + min_delta


def say(text: str) -> None:
    """Lines on the console, past a bar where one is shown; at once, also into a file."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)
    else:
        print(text)
    sys.stdout.flush()


def say_notes(notes: Sequence[str], whole: object = None) -> None:
    """What was noted when the data were read, of the first rank: every mode says it.

    Args:
        whole: where notes of many lines are found as a whole; none: nowhere but here.
    """
    for note in notes:
        say(f"  note: {note if whole is None else shortened(note, str(whole))}")


def write_notes(path: Path, notes: Sequence[str]) -> None:
    """The same, with all lines, as a text file beside the results; none where there is nothing to
    note."""
    if notes:
        write_text(path, "".join(f"{note}\n" for note in notes))
    elif path.is_file():
        remove(path)


def two_columns(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


# ---------------------------------------------------------------------------------- trackers
#
# Destinations of a run's numbers beside metrics.jsonl: none, or Weights & Biases.

INIT_TIMEOUT = 30  # seconds for the first answer of the server, then the run goes on offline
KEPT_APART = ("event", "step")  # keys of a record that are no metrics


class Logger(Protocol):
    """Takes records; its errors never end a run."""

    @property
    def run_id(self) -> str | None:
        """Of the backend, by which a continued run finds itself again."""

    def log(self, record: dict[str, Any], step: int) -> None:
        """Numbers at an optimizer step."""

    def conclude(self, split: str, report: dict[str, Any]) -> None:
        """Loss, metrics and intervals of the best model on a split, as metrics_<split>.json has
        them."""

    def finish(self) -> None:
        """Send what is not yet sent."""


class NullLogger:
    """Logs nothing: for no logger, and for all ranks but the first."""

    run_id = None

    def log(self, record: dict[str, Any], step: int) -> None:
        """Do nothing: metrics.jsonl has the record."""

    def conclude(self, split: str, report: dict[str, Any]) -> None:
        """Do nothing: metrics_<split>.json has the report."""

    def finish(self) -> None:
        """Do nothing."""


@ByStruct
def logged_as(spec: Spec, *, run: RunDir, of_folds: bool, dataset: str) -> dict[str, Any]:
    """Under which names and tags a run is logged, by the keys of the logger section; empty without
    a tracker.

    Args:
        of_folds: whether it is the run of one of several folds, which has the tag fold_<k>.
        dataset: tag of the data set.
    """
    return {}


@logged_as.register
def _(spec: WandbLogger, *, run: RunDir, of_folds: bool, dataset: str) -> dict[str, Any]:
    fold = (f"fold_{run.path.name}",) * of_folds
    return {
        "entity": spec.entity,
        "project": spec.project or dataset,
        "group": spec.group or run.group.name,
        "name": spec.name or f"{run.group.name}/{run.path.name}",
        "tags": [*spec.tags, *fold],
    }


@ByStruct
def build_logger(
    spec: Spec,
    *,
    run: RunDir,
    config: dict[str, Any],
    names: dict[str, Any],
    run_id: str | None,
    ranks: Ranks,
) -> Logger:
    """The logger of a spec.

    Args:
        spec: the logger section.
        run: directory of the run.
        config: plain spec, shown by the backend.
        names: what `logged_as` gives.
        run_id: of a continued run; none: the one that its directory keeps, else a new one.
        ranks: all but the first get a silent one.

    Raises:
        UserError: its package is not installed.
    """
    raise AssertionError(f"no logger for {type(spec).__name__}")


@build_logger.register
def _(
    spec: NoLogger,
    *,
    run: RunDir,
    config: dict[str, Any],
    names: dict[str, Any],
    run_id: str | None,
    ranks: Ranks,
) -> Logger:
    return NullLogger()


@build_logger.register
def _(
    spec: WandbLogger,
    *,
    run: RunDir,
    config: dict[str, Any],
    names: dict[str, Any],
    run_id: str | None,
    ranks: Ranks,
) -> Logger:
    return Wandb(spec, run, config, names, run_id) if ranks.is_main else NullLogger()


def tell(line: str) -> None:
    """One line to the console."""
    print(line, file=sys.stderr, flush=True)


class Wandb:
    """A run of Weights & Biases, online where there is a key and an answer, else offline.

    Its files and its id are in the folder wandb of the run directory.
    """

    def __init__(
        self,
        spec: WandbLogger,
        run: RunDir,
        config: dict[str, Any],
        names: dict[str, Any],
        run_id: str | None,
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                'logger.backend = "wandb" needs the package wandb: pip install wandb, or set'
                ' logger.backend = "none"'
            ) from None
        self.wandb = wandb
        self.run: wandb.Run | None = None
        self.run_id = run_id or kept_id(run)
        try:
            init = partial(
                wandb.init,
                id=self.run_id,
                **names,
                config=config,
                dir=str(run.path),
            )
            self.start(spec, init, run.path)
        except Exception as error:  # of the network, the server, the disk, wandb's own process
            self.give_up("could not start", error)

    def start(self, spec: WandbLogger, init: "partial[wandb.Run]", folder: Path) -> None:
        """Begin or continue the run online; where that cannot be, offline."""
        settings = partial(  # made anew for each try: a failed one leaves its marks on them
            self.wandb.Settings, silent=True, console="off", init_timeout=INIT_TIMEOUT
        )
        reason = "logger.offline is set" if spec.offline else self.hindrance()
        if reason is None:
            mode = os.environ.get("WANDB_MODE", "online")
            try:
                self.run = init(mode=mode, resume="allow", settings=settings())
                return
            except Exception as error:
                reason = first_line(error)
                self.wandb.teardown()  # forgets the id, which is tried again offline
        # where resume is not known; sync joins by the id
        self.run = init(mode="offline", settings=settings())
        if not spec.offline:
            files = folder / "wandb" / f"offline-run-*-{self.run_id}"
            tell(f"W&B runs offline ({reason}); send it later with: wandb sync {files}")

    def hindrance(self) -> str | None:
        """Why nothing can be sent, as far as the settings and the key files tell; None: it can."""
        mode = os.environ.get("WANDB_MODE")
        if mode == "disabled":
            return None
        if mode in ("offline", "dryrun"):
            return f"WANDB_MODE is {mode}"
        settings = self.wandb.setup(self.wandb.Settings(silent=True)).settings
        if settings.api_key or settings.identity_token_file or netrc_key(settings.base_url):
            return None
        return "no API key: run wandb login"

    def log(self, record: dict[str, Any], step: int) -> None:
        """Send the numbers of a record; steps that a continued run repeats are known already."""
        if self.run is None:
            return
        values = {k: v for k, v in record.items() if k not in KEPT_APART}
        try:
            self.run.log(self.with_tables(values), step=step)
        except Exception as error:
            self.give_up("stopped", error)

    def with_tables(
        self, values: dict[str, Any], ends: dict[str, Sequence[float | None]] | None = None
    ) -> dict[str, Any]:
        """Numbers as they are sent, those that are known: of many classes as a table, not as as
        many charts, however many of them are defined.

        Args:
            ends: low and high end of the interval of a value, by the name of the value; none: no
                value has one.
        """
        families: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            split, _ = split_name(key)
            name = metric_name(key)
            families.setdefault(f"{split}_{name}" if split else name, {})[key] = value
        sent: dict[str, Any] = {}
        for family, own in families.items():
            if len(own) > SHOWN_CLASSES:
                columns = ["class", "value", *(("low", "high") if ends is not None else ())]
                rows = [
                    [key.removeprefix(f"{family}_"), value, *(ends or {}).get(key, (None, None))]
                    for key, value in own.items()
                ]
                rows = [row[: len(columns)] for row in rows if row[1] is not None]
                sent[family] = self.wandb.Table(columns=columns, data=rows)
                continue
            sent |= own
            for key in own:
                low, high = (ends or {}).get(key, (None, None))
                sent |= {f"{key}_low": low, f"{key}_high": high}
        return {key: value for key, value in sent.items() if value is not None}

    def conclude(self, split: str, report: dict[str, Any]) -> None:
        """Put loss, metrics and the ends of their intervals into the summary of the run, in place
        of those of the last epoch; those of many classes as one table."""
        if self.run is None:
            return
        found = {"loss": report["loss"], **report["metrics"]}
        found = {f"{split}_{name}": value for name, value in found.items()}
        ends = {f"{split}_{name}": interval for name, interval in report["ci95"].items()}
        try:
            self.run.summary.update(self.with_tables(found, ends))
        except Exception as error:
            self.give_up("stopped", error)

    def finish(self) -> None:
        """Hand over what is left and end wandb's own process; during an error the run is marked
        as failed."""
        run, self.run = self.run, None
        if run is None:
            return
        try:
            run.finish(exit_code=0 if sys.exception() is None else 1)
            self.wandb.teardown()
        except Exception as error:
            self.give_up("could not finish", error)

    def give_up(self, what: str, error: Exception) -> None:
        """Say so once and go on without."""
        self.run = None
        with suppress(Exception):
            self.wandb.teardown(exit_code=1)
        tell(f"W&B {what}: {first_line(error)}; the run goes on, metrics.jsonl has everything")


def first_line(error: Exception) -> str:
    """An error in one line."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def kept_id(run: RunDir) -> str:
    """The id that the directory keeps, else a new one that it keeps from now on.

    A run that starts over has lost the old one with its directory's content.
    """
    path = run.path / "wandb" / "run_id"
    if path.is_file():
        return path.read_text("utf-8").strip()
    new = uuid.uuid4().hex[:12]
    write_text(path, new + "\n")
    return new


def netrc_key(base_url: str) -> str | None:
    """The key that wandb login left for a server."""
    import netrc
    from urllib.parse import urlparse

    names = (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")
    for path in (os.path.expanduser(name) for name in names if name):
        with suppress(OSError, netrc.NetrcParseError):
            entry = netrc.netrc(path).authenticators(urlparse(base_url).hostname or "")
            if entry:
                return entry[2]
    return None
