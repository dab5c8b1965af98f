"""What a run says on the console: a bar on a terminal, plain lines elsewhere."""

import math
import sys
import time
from typing import Any

from glovita_lib.metric_names import lower_is_better


class Bar:
    """Progress of one epoch: tqdm on a terminal, else silent (the epoch line says it all)."""

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
        """Leave the terminal clean."""
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
        """Leave the terminal clean."""
        if self.bar is not None:
            self.bar.close()


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

    >>> record = {"epoch": 1, "train_loss": 0.5, "val_loss": 0.4, "val_F1": 0.9, "lr": 1e-3}
    >>> record |= {"samples_per_s": 1200.0, "seconds": 4.1, "best": 0.9, "best_epoch": 1}
    >>> epoch_line(record, epochs=3, best_metric="val_F1")
    'epoch 2/3 | train loss 0.5000 | val loss 0.4000 F1 0.9000* | lr 0.001 | 1,200/s 4.1 s'
    """
    parts = [f"epoch {record['epoch'] + 1:>{len(str(epochs))}}/{epochs}"]
    for split in ("train", "val"):
        values = {k: v for k, v in record.items() if k.startswith(f"{split}_")}
        if values:
            parts.append(
                f"{split} " + " ".join(entry(k, v, record, best_metric) for k, v in values.items())
            )
    parts.append(f"lr {record['lr']:.3g}")
    parts.append(f"{record['samples_per_s']:,.0f}/s {record['seconds']:.1f} s")
    if best_metric and record.get("best_epoch") not in (None, record["epoch"]):
        parts.append(f"best {record['best']:.4f} in epoch {record['best_epoch'] + 1}")
    return " | ".join(parts)


def entry(key: str, value: float | None, record: dict[str, Any], best_metric: str | None) -> str:
    """A metric without its split, with a star where it is the best so far."""
    name = key.split("_", 1)[1]
    star = "*" if key == best_metric and record.get("best_epoch") == record["epoch"] else ""
    number = "-" if value is None or math.isnan(value) else f"{value:.4f}"
    return f"{name} {number}{star}"


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


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
