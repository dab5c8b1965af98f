"""Numbers and times of a time series, as cells of tables have them, and what is done to it before
a model or a kernel sees it: its times are looked at, it is resampled to steps, standardised, and
its missing values filled in.

C channels, T time points.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from glovita_lib.errors import composed
from glovita_lib.spec_series import SeriesPreparation

MISSING = frozenset(["", "?", "nan", "na", "n/a", "null", "none"])
WHOLE = re.compile(r"[+-]?\d+")
DATE = re.compile(
    r"(\d{4}-\d\d(?:-\d\d(?:[T ]\d\d(?::\d\d(?::\d\d(?:\.\d+)?)?)?)?)?)"
    r"\s*(Z|[+-]\d\d(?::?\d\d)?)?"
)
"""A date and its time of day (ISO 8601), and the zone."""
SECONDS = {"s": 1, "m": 60, "h": 3600, "D": 86400, "W": 604800}
PARTS = {unit: 1000**k for k, unit in enumerate(("ms", "us", "ns", "ps", "fs", "as"), 1)}
"""Units of dates: their seconds, and how many of the finer ones make one."""
REGULAR = 1e-3  # share of a step by which it may differ where times are regular
FINEST = 1000  # time points that resampling may make of each one
LONGEST = 10_000_000  # time points that it may make of a series of fewer


# --------------------------------------------------------------------------------------- cells


def numbers(cells: Sequence[str]) -> np.ndarray | str:
    """Cells (T,) as float64, NaN where one is missing; else what is wrong with them."""
    try:
        if "_" not in (text := ",".join(cells)) and "?" not in text and ",," not in text:
            return np.array(cells, np.float64)
    except ValueError:
        pass
    values = np.full(len(cells), np.nan)
    for place, cell in enumerate(cells):
        stripped = cell.strip()
        if stripped.lower() in MISSING:
            continue
        try:
            values[place] = float("" if "_" in stripped else stripped)
        except ValueError:
            return f'"{stripped}" (value {place}) is no number'
    return values


def time_numbers(cells: Sequence[str]) -> np.ndarray | str:
    """Times (T,): whole numbers as int64, others as float64, dates as datetime64 (of those with a
    zone the time at UTC), so that no digit is lost; else what is wrong with them."""
    stripped = [cell.strip() for cell in cells]
    if any(cell.lower() in (*MISSING, "nat") for cell in stripped):
        return "a time is missing"
    values = numbers(stripped)
    if isinstance(values, np.ndarray):
        if not np.isfinite(values).all():
            return "a time is missing"
        whole = all(map(WHOLE.fullmatch, stripped)) and np.abs(values).max(initial=0) < 2**62
        return np.array(list(map(int, stripped)), np.int64) if whole else values
    found = [DATE.fullmatch(cell) for cell in stripped]
    dates = [date for date in found if date]
    if None in found:
        place = found.index(None)
        told = f'time "{stripped[place]}" (value {place}) is'
        if not dates:
            return f"{told} neither a number nor a date such as 2024-01-31 12:00:00"
        return f'{told} no date, as "{dates[0][0]}" is'
    fits = [1678 < int(date[1][:4]) < 2262 for date in dates]  # what 64 bits of ns hold
    digits = [len(date[1].partition(".")[2].rstrip("0")) for date in dates]
    if max(digits) > 9:
        place = digits.index(max(digits))
        return f'time "{stripped[place]}" (value {place}) has digits beyond nanoseconds'
    if max(digits) > 6 and not all(fits):
        place, fine = fits.index(False), dates[digits.index(max(digits))][0]
        span = f'beside nanoseconds as of "{fine}" years are 1679 to 2261'
        return f'time "{stripped[place]}" (value {place}): {span}'
    unit = "ns" if all(fits) else "us"
    written = [date[1].replace(" ", "T") for date in dates]
    ahead = [zone_minutes(date[2] or "Z") for date in dates]
    try:
        return np.array(written, f"datetime64[{unit}]") - np.array(ahead, "timedelta64[m]")
    except ValueError as error:
        return f"a time is no date: {error}"


def in_one_writing(one: Sequence[str], other: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the time points of two tables as they are compared: where those of both are numbers
    or those of both dates, these in one writing, as 0 and 0.0, and where they are the same but for
    a small share of the step (rounding), those of the first; else as they stand, composed."""
    first, second = time_numbers(one), time_numbers(other)
    shared = min(len(one), len(other))
    if isinstance(first, str) or isinstance(second, str) or not shared:
        return list(map(composed, one)), list(map(composed, other))
    if (first.dtype.kind == "M") != (second.dtype.kind == "M"):
        return list(map(composed, one)), list(map(composed, other))
    if first.dtype != second.dtype:
        form = "datetime64[us]" if first.dtype.kind == "M" else "float64"
        first, second = first.astype(form), second.astype(form)
    if first.dtype.kind == "f" and shared > 1:
        step = np.abs(np.diff(first[:shared])).min()
        if (np.abs(first[:shared] - second[:shared]) <= REGULAR * step).all():
            second[:shared] = first[:shared]
        first, second = first + 0.0, second + 0.0  # of -0.0 too
    return list(map(str, first.tolist())), list(map(str, second.tolist()))


def are_other_windows(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether the time points of two tables may be taken for each other in order though some have
    the same names: dates; or an index (all whole numbers from 0 or 1 on), which tells no times,
    beside another one or times of another step."""
    first, second = time_numbers(one), time_numbers(other)
    if isinstance(first, str) or isinstance(second, str) or not (len(first) and len(second)):
        return False
    if first.dtype.kind == "M" or second.dtype.kind == "M":
        return first.dtype.kind == second.dtype.kind
    by_one = [bool((np.diff(when) == 1).all()) for when in (first, second)]
    index = [step and when[0] in (0, 1) for step, when in zip(by_one, (first, second), strict=True)]
    return all(index) or (any(index) and not all(by_one))


def zone_minutes(zone: str) -> int:
    """By how much the clock of a zone, "Z" or "+01:00", is ahead of UTC."""
    if zone == "Z":
        return 0
    digits = zone[1:].replace(":", "").ljust(4, "0")
    minutes = 60 * int(digits[:2]) + int(digits[2:])
    return -minutes if zone[0] == "-" else minutes


# --------------------------------------------------------------------------------- preparation


@dataclass(frozen=True, slots=True)
class PreparedSeries:
    """A series as models see it."""

    values: np.ndarray  # (C, T) float32
    there: np.ndarray  # (T,) bool, where a channel has a value at least
    step: float | None = field(default=None)  # distance of its times, where it has some


def prepare(
    values: np.ndarray, times: np.ndarray | None, spec: SeriesPreparation
) -> PreparedSeries | str:
    """A series (C, T) prepared, or the line that says why it cannot be used."""
    values = np.asarray(values, np.float64)
    if np.isinf(values).any():
        channel, place = np.argwhere(np.isinf(values))[0]
        return f"an infinite value in channel {channel} at time point {place}"
    there = ~np.isnan(values)
    if not there.any():
        return "no value"
    end = int(np.flatnonzero(there.any(0))[-1]) + 1  # beyond it a table is filled up
    values, there = values[:, :end], there[:, :end]
    step = None
    if times is not None:
        times = times[:end]
        if not np.isfinite(times).all():
            return "a time is missing"
        when, steps = since_first(times), apart(times[1:], times[:-1])
        if line := time_problem(times, steps, spec.step):
            return line
        step = float(np.median(steps)) if end > 1 else None
    if there.sum() < 2 or end < 2:
        return "a single value: a series has two time points at least"
    low, high = np.nanmin(values), np.nanmax(values)
    spread = [np.ptp(channel[own]) for channel, own in zip(values, there, strict=True) if own.any()]
    if not any(spread):
        return "constant" + (f": every value is {low:g}" if low == high else " in every channel")
    if spec.step is not None:
        assert times is not None  # data_series refuses a step without them
        if line := too_fine(end, when, spec.step):
            return line
        values, there, step = *at_steps(values, there, when, spec.step), spec.step
        if values.shape[1] < 2:
            return f"shorter than data.preparation.step = {spec.step:g}"
    if spec.normalize == "zscore":
        values = standardized(values, there)
    filled = np.stack([fill(v, own, spec.fill) for v, own in zip(values, there, strict=True)])
    if spec.mask_channels:
        filled = np.concatenate([filled, there])
    if np.abs(filled).max() > np.finfo(np.float32).max:
        return f"values up to {max(-low, high):g}, too large for float32"
    return PreparedSeries(filled.astype(np.float32), there.any(0), step)


def since_first(times: np.ndarray) -> np.ndarray:
    """Times (T,) since the first one, see `apart`."""
    return apart(times, times[:1])


def apart(later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    """later - earlier as float64, each rounded once, whatever type times have; of dates in seconds,
    months and years counting from their first days."""
    kind = later.dtype.kind
    if kind == "f":
        return later.astype(np.float64) - earlier.astype(np.float64)
    if kind != "M":
        return whole_apart(later, earlier)
    if np.datetime_data(later.dtype)[0] in ("Y", "M"):
        later, earlier = later.astype("datetime64[D]"), earlier.astype("datetime64[D]")
    unit, count = np.datetime_data(later.dtype)
    ticks = whole_apart(later.astype(np.int64), earlier.astype(np.int64)) * count
    return ticks / PARTS[unit] if unit in PARTS else ticks * SECONDS[unit]


def whole_apart(later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    """later - earlier of whole numbers of any type as float64."""
    if not later.size:
        return np.empty(0)
    most = max(int(later.max()), int(earlier.max()))
    if most - min(int(later.min()), int(earlier.min())) < 2**63:
        # int64 wraps round, so that a difference that fits in is right
        return (later.astype(np.int64) - earlier.astype(np.int64)).astype(np.float64)
    return np.array(later.astype(object) - earlier.astype(object), np.float64)


def too_fine(count: int, when: np.ndarray, step: float) -> str | None:
    """What a step that is far too small for a series of `count` times since the first one would
    make of it."""
    made = float(when[-1]) / step + 1
    most = max(2 * count, min(FINEST * count, LONGEST))
    if made <= most:
        return None
    return (
        f"data.preparation.step = {step:g} makes {made:.3g} time points of its {count}, which reach"
        f" over {when[-1]:g}: {most} are the most; is the step in the unit of the times"
        " (of dates seconds)?"
    )


def time_problem(times: np.ndarray, steps: np.ndarray, step: float | None) -> str | None:
    """What is wrong with times (T,) that are `steps` (T - 1,) apart, of which regular ones are
    asked for without a step."""
    if (steps == 0).any():
        return f"time {time_text(times[np.flatnonzero(steps == 0)[0]])} occurs twice"
    if (steps < 0).any():
        return f"times do not ascend at {time_text(times[np.flatnonzero(steps < 0)[0] + 1])}"
    if step is not None or len(steps) < 2:
        return None
    usual = float(np.median(steps))
    rounding = 2 * np.spacing(np.abs(times).max()) if times.dtype.kind == "f" else 0
    wrong = np.flatnonzero(np.abs(steps - usual) > REGULAR * usual + rounding)
    if not len(wrong):
        return None
    first = wrong[0]
    share = steps / usual
    cure = "set data.preparation.step to resample"
    if (np.abs(share - np.round(share)) <= 2 * REGULAR + rounding / usual).all():
        ends = f"from {time_text(times[first])} to {time_text(times[first + 1])}"
        return f"a gap {ends}, steps are {usual:g}: {cure}"
    return f"irregular times, steps from {steps.min():g} to {steps.max():g}: {cure}"


def time_text(time: Any) -> str:
    """A time with all its digits, a date without those that are zero."""
    if isinstance(time, np.datetime64):
        text = str(time).replace("T", " ")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return repr(time.item()).removesuffix(".0")


def at_steps(
    values: np.ndarray, there: np.ndarray, times: np.ndarray, step: float
) -> tuple[np.ndarray, np.ndarray]:
    """Series (C, T) at times a step apart from the first one on, linear between observations; there
    is a value where an observation is less than a step away."""
    count = int(np.floor((times[-1] - times[0]) / step * (1 + 1e-9))) + 1
    grid = times[0] + step * np.arange(count)
    found, near = np.full((len(values), count), np.nan), np.zeros((len(values), count), bool)
    for channel, own in enumerate(there):
        if not own.any():
            continue
        known = times[own]
        found[channel] = np.interp(grid, known, values[channel, own])
        after = np.searchsorted(known, grid)
        left = np.abs(grid - known[np.clip(after - 1, 0, None)])
        right = np.abs(known[np.clip(after, None, len(known) - 1)] - grid)
        near[channel] = np.minimum(left, right) < step * (1 - 1e-9)
    return np.where(near, found, np.nan), near


def standardized(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Channels (C, T) of mean 0 and deviation 1 over the values that are there; constant ones 0."""
    eps = float(np.finfo(np.float64).eps)
    count = np.maximum(there.sum(1, keepdims=True), 1)
    known = np.where(there, values, 0)
    mean = known.sum(1, keepdims=True) / count
    known = np.where(there, values - mean, 0)
    variance = np.square(known).sum(1, keepdims=True) / count
    # by rounding alone, see data.is_constant
    constant = variance <= count * eps * variance + np.square(count * eps * mean)
    scaled = known / np.where(constant, 1, np.sqrt(variance))
    return np.where(there & ~constant, scaled, np.where(there, 0, np.nan))


def fill(values: np.ndarray, there: np.ndarray, rule: str) -> np.ndarray:
    """A channel (T,) with missing values filled in."""
    if there.all():
        return values
    if rule == "zero" or not there.any():
        return np.where(there, values, 0)
    places = np.flatnonzero(there)
    if rule == "linear":
        return np.interp(np.arange(len(values)), places, values[places])
    before = np.searchsorted(places, np.arange(len(values)), side="right") - 1
    return values[places[np.clip(before, 0, None)]]
