"""Splits: drawn at random, read from files, and checked for what they share."""

import hashlib
import os
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np

from glovita_lib.errors import UserError, composed, ended, listed, refuse_controls, with_all
from glovita_lib.files import FILE_THREADS, read_json_table

# ------------------------------------------------------------------------------- split files


SPLIT_NAMES = ("train", "val", "test")
SPLIT_WORDS = frozenset(
    ["train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "holdout"]
)
"""What lists of a split file are called where they are splits, whatever the spec calls them."""


def read_splits(
    path: Path, fold: int | str, names: Sequence[str] = SPLIT_NAMES
) -> dict[str, list[str]]:
    """Splits of a JSON file: {split: [path or id, ...]}; a list or {fold: ...} of such objects; or
    {fold: [path or id, ...]}, of which fold `fold` is test, the next one val, the others train.

    Folds named "0", "1", ... go by number, others by name, the next one being the next in the
    file.

    Args:
        names: what the spec calls train, val and test.

    Raises:
        UserError: another form, no such fold, or folds that share a sample or leave none to train
            on.
    """
    content = read_json_table(path)
    form = (
        f"{path}: expected {{split: [path or id, ...]}}, a list or {{fold: ...}} of such objects,"
        " or {fold: [path or id, ...]}"
    )
    if isinstance(content, list):
        content = {str(number): part for number, part in enumerate(content)}
        if not all(isinstance(part, dict) for part in content.values()):
            raise UserError(form)
    if not isinstance(content, dict) or not content:
        raise UserError(form)
    refuse_controls(f"{path}: names of splits or folds", content)
    if all(isinstance(part, dict) for part in content.values()):
        content = content[find_fold(content, fold, path)]
    elif are_splits(content, names):
        if fold != 0:
            raise UserError(
                f"data.fold = {shown_fold(fold)}, but {path} has the splits"
                f" {listed(content)} and no folds: leave data.fold out"
            )
    else:
        return fold_lists(listed_names(content, form, path), fold, path, names)
    return listed_names(content, form, path)


def has_folds(path: Path, names: Sequence[str]) -> bool:
    """Whether a split file holds folds, so that data.fold chooses among them.

    Args:
        names: what the spec calls train, val and test.
    """
    content = read_json_table(path)
    if isinstance(content, list):
        return len(content) > 1
    if all(isinstance(part, dict) for part in content.values()):
        return len(content) > 1
    return not are_splits(content, names)


def are_splits(content: dict[str, object], names: Sequence[str]) -> bool:
    """Whether the lists of a file are splits by their names, no folds."""
    words = SPLIT_WORDS | {name.strip().casefold() for name in names}
    return any(name.strip().casefold() in words for name in content)


def listed_names(content: dict[str, object], form: str, path: Path) -> dict[str, list[str]]:
    """Lists of paths or ids of a file, by name.

    Raises:
        UserError: something else, or one that is not one line of text.
    """
    refuse_controls(f"{path}: names of splits", content)
    found = {}
    for name, entries in content.items():
        if not isinstance(entries, list) or not all(isinstance(e, str | int) for e in entries):
            raise UserError(f'{form}; "{name}" is no list of paths or ids')
        found[name] = [str(entry) for entry in entries]
        refuse_controls(f'{path}: paths or ids of "{name}"', found[name])
    return found


def shown_fold(fold: int | str) -> str:
    """A fold as a spec writes it."""
    return f'"{fold}"' if isinstance(fold, str) else str(fold)


def is_number(name: str) -> bool:
    """Whether a fold's name is a number as it is printed, which 01 is not."""
    return name.isdecimal() and str(int(name)) == name


def in_order(folds: Iterable[str]) -> list[str]:
    """Names of folds by number where all are numbers, else as they stand in the file."""
    names = list(folds)
    return sorted(names, key=int) if all(map(str.isdecimal, names)) else names


def find_fold(content: Iterable[str], fold: int | str, path: Path) -> str:
    """The name of a fold of a file, where a number is meant for folds that are named by numbers.

    Raises:
        UserError: there is none; those that there are.
    """
    names = in_order(content)
    wanted = composed(str(fold))
    for name in names:
        if composed(name) == wanted:
            return name
    first = int(names[0]) if is_number(names[0]) else names[0]
    raise UserError(
        f"data.fold = {shown_fold(fold)}, but {path} has the folds {listed(names)}: name one of"
        f" them, as data.fold = {shown_fold(first)}"
    )


def fold_lists(
    content: dict[str, list[str]], fold: int | str, path: Path, names: Sequence[str]
) -> dict[str, list[str]]:
    """Splits of folds that are lists: `fold` is test, the next one val, the others train; with one
    name for val and test `fold` is both.

    Raises:
        UserError: no such fold, one without samples, samples in two, or too few of them.
    """
    test = find_fold(content, fold, path)
    order = in_order(content)
    train_name, val_name, test_name = names
    if len(order) == 1:
        called = listed(dict.fromkeys(names))
        raise UserError(
            f"{path}: its one list, {test}, is one fold, which leaves none to train on; give 3"
            f" lists at least, or lists called {called}"
        )
    val = order[(order.index(test) + 1) % len(order)] if val_name != test_name else test
    others = [name for name in order if name not in (test, val)]
    if not others:
        raise UserError(
            f"{path}: its lists {listed(content)} are folds: {test} is test, {val} is val, which"
            f" leaves none to train on; give 3 lists at least, or call them {', '.join(names)}"
        )
    where: dict[str, str] = {}
    for name, entries in content.items():
        if not entries:
            raise UserError(f"{path}: fold {name} is empty: leave it out, or list its samples")
        for entry in map(composed, entries):
            if where.setdefault(entry, name) != name:
                raise UserError(
                    f"{path}: {entry} is in the folds {where[entry]} and {name}: keep it in one"
                )
    train = [entry for name in others for entry in content[name]]
    return {train_name: train, val_name: content[val], test_name: content[test]}


# ------------------------------------------------------------------- random splits and folds
#
# Pure functions of arrays and a seed.
#
# N samples. A stratum is what a split shall keep the proportions of: a class, or a quantile of a
# regression target.

# Streams of the seed, so that one draw does not depend on another.
VAL, FRACTION, FOLDS = 1, 2, 3

WHOLE_COHORT = 'data.split_source = "splits_json" with all ids as test in data.split_file'
"""How a trained model is asked about all samples of other data."""


def strata(targets: np.ndarray, subtask: str, *, kept: bool = True, bins: int = 10) -> np.ndarray:
    """Stratum (N,) int64 of each sample; all in one stratum where proportions are not `kept`.

    multiclass, framewise: the class, that of most frames. multilabel: the rarest of the sample's
    labels, which is the one a split most easily loses. regression: the quantile bin of the target,
    of the mean standardised target if there are several; at least 5 samples a bin.
    """
    if not kept or not len(targets):
        return np.zeros(len(targets), np.int64)
    if subtask in ("multiclass", "framewise"):
        return targets.astype(np.int64)
    if subtask == "multilabel":
        order = np.argsort(targets.sum(0), kind="stable")  # rarest label first
        positive = targets[:, order] > 0
        return np.where(positive.any(1), order[positive.argmax(1)], targets.shape[1])
    spread = targets.std(0)
    score = ((targets - targets.mean(0)) / np.where(spread > 0, spread, 1)).mean(1)
    count = max(1, min(bins, len(targets) // 5))
    edges = np.quantile(score, np.linspace(0, 1, count + 1)[1:-1])
    return np.searchsorted(edges, score, side="right")


def draw_stratified(
    labels: np.ndarray, count: int, *, seed: int, keep: str
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` of N samples at random in the proportions of their strata.

    Args:
        labels: stratum (N,) of each sample; all equal draws without strata.
        keep: "rest" leaves each stratum a sample that is not drawn, as a held-out set must not take
            the last sample of a class from training; "drawn" draws at least one of each stratum;
            both as far as the counts allow.

    Returns:
        Sorted rows that were drawn and sorted rows of the rest. A larger count of the same seed
        draws from the same random order of each stratum.
    """
    values, stratum = np.unique(labels, return_inverse=True)
    sizes = np.bincount(stratum, minlength=len(values))
    low = np.minimum(sizes, 1) if keep == "drawn" else np.zeros_like(sizes)
    high = np.maximum(sizes - 1, 0) if keep == "rest" else sizes
    counts = apportion(sizes, count, low=low, high=high)
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(stratum[order], kind="stable")]  # random within each stratum
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    drawn = rank < np.repeat(counts, sizes)
    return np.sort(order[drawn]), np.sort(order[~drawn])


def apportion(
    sizes: np.ndarray,
    count: int,
    *,
    low: np.ndarray | None = None,
    high: np.ndarray | None = None,
) -> np.ndarray:
    """Shares of `count` proportional to `sizes` by largest remainder, their sum `count` or, where
    that is less, that of the sizes.

    Args:
        low: least share of each, up to its size; unset, or where there is no room for all, 0.
        high: largest share of each; unset, or where that leaves some of `count` over, its size.

    >>> apportion(np.array([70, 29, 1]), 10, low=np.array([1, 1, 1]))
    array([7, 2, 1])
    """
    count = min(count, int(sizes.sum()))
    if low is None or low.sum() > count:
        low = np.zeros_like(sizes)
    if high is None or high.sum() < count:
        high = sizes
    exact = sizes * (count / max(1, sizes.sum()))
    shares = np.clip(np.floor(exact).astype(np.int64), low, high)
    while (missing := count - int(shares.sum())) != 0:
        step = 1 if missing > 0 else -1
        free = np.flatnonzero(shares < high if step > 0 else shares > low)
        wanting = np.argsort(-step * (exact - shares)[free], kind="stable")
        shares[free[wanting[: abs(missing)]]] += step
    return shares


def folds(
    labels: np.ndarray, n_folds: int, *, seed: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """Fold (N,) of each sample; folds are disjoint, of nearly equal size, and each has nearly its
    share of every stratum. All samples of a group are in one fold.

    Raises:
        UserError: fewer samples, or groups, than folds.
    """
    units = len(labels) if groups is None else len(set(groups))
    if units < n_folds:
        what = "samples" if groups is None else "groups"
        raise UserError(
            f"data.n_folds = {n_folds}, but there are only {units} {what}: at most {units} folds;"
            f" to ask a trained model about all of them, {WHOLE_COHORT}"
        )
    if groups is None:
        return deal(labels, n_folds, seed)
    return grouped(labels, n_folds, seed, groups)


def deal(labels: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """Deal shuffled samples out like cards, one stratum after the other: folds differ by at most
    one sample, in total and in each stratum."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(order)) % n_folds
    return fold


def grouped(labels: np.ndarray, n_folds: int, seed: int, groups: np.ndarray) -> np.ndarray:
    """Greedy stratified folds of whole groups: the least balanced groups first, each into the fold
    where the strata stay most even, then the smaller one (as scikit-learn's StratifiedGroupKFold).

    No fold stays empty: the last groups go to the empty folds.
    """
    stratum = np.unique(labels, return_inverse=True)[1]
    names, member = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), stratum.max() + 1))
    np.add.at(counts, (member, stratum), 1)
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-counts[order].std(1), kind="stable")]
    total = counts.sum(0)
    filled = np.zeros((n_folds, counts.shape[1]))
    chosen = np.empty(len(names), np.int64)
    for done, group in enumerate(order):
        empty = np.flatnonzero(filled.sum(1) == 0)
        candidates = empty if len(empty) >= len(names) - done else np.arange(n_folds)
        chosen[group] = best = evenest(filled, counts[group] / total, candidates)
        filled[best] += counts[group] / total
    return chosen[member]


def evenest(filled: np.ndarray, share: np.ndarray, candidates: np.ndarray) -> int:
    """The candidate fold whose choice leaves the smallest spread of strata between the folds."""
    spreads = []
    for fold in candidates:
        trial = filled.copy()
        trial[fold] += share
        spreads.append((round(float(trial.std(0).mean()), 12), float(trial[fold].sum()), fold))
    return int(min(spreads)[2])


def fold_splits(fold_of: np.ndarray, fold: int, n_folds: int) -> dict[str, np.ndarray]:
    """Rows of train, val and test: fold `fold` is test, the next one val, the others train."""
    test, val = fold_of == fold, fold_of == (fold + 1) % n_folds
    masks = {"train": ~(test | val), "val": val, "test": test}
    return {name: np.flatnonzero(mask) for name, mask in masks.items()}


def resampled(
    train: Sequence[str], test: Sequence[str], number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of train and test among those of both, one behind the other, in a resample of the
    published results on the UCR and UEA archives (aeon's stratified_resample_data_indices): each
    class is shuffled, and train gets as many of it as it had. Number 0 is the split as it is.

    Args:
        train, test: class of each sample in words; sorted as text, they are drawn in that order.

    Raises:
        UserError: a class is in one of them alone.
    """
    words = np.array([*train, *test])
    lower = np.char.lower(words)  # as aeon reads labels; Unicode's order then decides
    if len(np.unique(lower)) == len(np.unique(words)):
        words = lower
    first, second = words[: len(train)], words[len(train) :]
    if not number:
        return np.arange(len(first)), np.arange(len(first), len(words))
    classes, counts = np.unique(first, return_counts=True)
    alone = np.setxor1d(classes, second)
    if len(alone):
        raise UserError(
            f"data.resample = {number}: the classes {listed(alone)} are in train or in test alone,"
            " and resamples keep the number of each class in both"
        )
    rng = np.random.RandomState(number)
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for name, count in zip(classes, counts, strict=True):
        rows = np.flatnonzero(words == name)
        rng.shuffle(rows)
        parts[0].append(rows[:count])
        parts[1].append(rows[count:])
    return np.concatenate(parts[0]), np.concatenate(parts[1])


# ----------------------------------------------------------------------------------- leakage
#
# What two splits must not share: groups, and files with the same bytes.
#
# N samples.

TAIL = 4096  # last bytes, which tell compressed images of one size apart


def in_one_form(names: Iterable[str], first: dict[str, str] | None = None) -> list[str]:
    """Names, each in the Unicode form in which it stands first, and numbers without decimals that
    are 0 (2.0 as 2), so that groups of one name are one.

    Args:
        first: composed name -> first form, of names that stand before these; completed by them.
    """
    first = {} if first is None else first
    names = (WITH_ZEROS.sub(r"\1", name) for name in names)
    return [first.setdefault(composed(name), name) for name in names]


WITH_ZEROS = re.compile(r"^([+-]?\d+)\.0*$", re.ASCII)


def refuse_shared_rows(ids: Sequence[str], rows: dict[str, np.ndarray]) -> None:
    """Refuse a sample in two splits; val and test may be the same samples, if that was asked for.

    Raises:
        UserError: the samples.
    """
    for (first, one), (second, other) in combinations(different(rows).items(), 2):
        shared = np.intersect1d(one, other)
        if len(shared):
            names = [ids[row] for row in shared]
            text = (
                f"{len(shared)} samples are in the splits {first} and {second}:"
                f" {listed(names, 5)}; keep each in one"
            )
            raise UserError(ended(with_all(text, names, 5)))


def refuse_shared_groups(
    ids: Sequence[str], groups: Sequence[str | None], rows: dict[str, np.ndarray]
) -> None:
    """Refuse a group (patient, slide) with samples in two splits; val and test may be the same
    samples, if that was asked for. A sample of group None is in none.

    Raises:
        UserError: the groups, with a sample in each of their splits.
    """
    where: dict[str, dict[str, str]] = {}
    for split, numbers in different(rows).items():
        for row in numbers:
            if groups[row] is not None:
                where.setdefault(groups[row], {}).setdefault(split, ids[row])
    shared = {group: splits for group, splits in where.items() if len(splits) > 1}
    if shared:
        shown = [
            f"{group} ({', '.join(f'{split}: {identity}' for split, identity in splits.items())})"
            for group, splits in shared.items()
        ]
        text = (
            f"{len(shared)} groups are in more than one split: {listed(shown, 5, '; ')}; move each"
            ' into one split or use data.split_source = "kfold"'
        )
        raise UserError(ended(with_all(text, shown, 5)))


def different(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The splits without a test split that is the val split."""
    same = "test" in rows and "val" in rows and np.array_equal(rows["val"], rows["test"])
    return {split: numbers for split, numbers in rows.items() if not (same and split == "test")}


def duplicate_notes(
    paths: Sequence[str],
    ids: Sequence[str],
    targets: np.ndarray,
    rows: dict[str, np.ndarray],
    *,
    noun: str,
) -> list[str]:
    """Lines on files that are equal byte for byte: across splits (leakage), within a split, and
    with different labels."""
    split = {int(row): name for name, numbers in different(rows).items() for row in numbers}
    used = sorted(split)
    across: list[str] = []
    within: list[str] = []
    torn: list[str] = []
    for twins in duplicates([paths[row] for row in used], threads=FILE_THREADS):
        members = [used[number] for number in twins]
        shown = listed((f"{ids[row]} ({split[row]})" for row in members), 4, " = ")
        (across if len({split[row] for row in members}) > 1 else within).append(shown)
        if len({targets[row].tobytes() for row in members}) > 1:
            torn.append(shown)
    texts = {
        "leakage: {} {}s are in several splits under different names: {}": across,
        "{} {}s occur several times within a split: {}": within,
        "{} {}s occur with different labels: {}": torn,
    }
    return [
        with_all(text.format(len(found), noun, listed(found, 5)), found, 5)
        for text, found in texts.items()
        if found
    ]


def duplicates(paths: Sequence[str], *, threads: int) -> list[list[int]]:
    """Numbers of files that are equal byte for byte, in groups of two or more.

    Only files of equal size are opened, and only those with equal ends are read as a whole.
    """
    with ThreadPoolExecutor(threads) as pool:

        def divided(groups: list[list[int]], key: Callable[[str], Hashable]) -> list[list[int]]:
            """Groups divided by a key of their files; what is alone then is left out."""
            members = [number for group in groups for number in group]
            keys = dict(zip(members, pool.map(key, [paths[i] for i in members]), strict=True))
            parts: dict[Hashable, list[int]] = {}
            for place, group in enumerate(groups):
                for number in group:
                    parts.setdefault((place, keys[number]), []).append(number)
            return [part for part in parts.values() if len(part) > 1]

        groups = divided([list(range(len(paths)))], os.path.getsize)
        return divided(divided(groups, tail), digest)


def tail(path: str) -> bytes:
    """Last bytes of a file."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        return file.read()


def digest(path: str) -> bytes:
    """Hash of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()
