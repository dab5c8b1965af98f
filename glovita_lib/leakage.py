"""What two splits must not share: groups, and files with the same bytes.

N samples.
"""

import hashlib
import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np

from glovita_lib.readers import FILE_THREADS
from glovita_lib.spec import UserError

TAIL = 4096  # last bytes, which tell compressed images of one size apart
SHOWN = 5


def refuse_shared_rows(ids: Sequence[str], rows: dict[str, np.ndarray]) -> None:
    """Refuse a sample in two splits; val and test may be the same samples, if that was asked for.

    Raises:
        UserError: the samples.
    """
    for (first, one), (second, other) in combinations(different(rows).items(), 2):
        shared = np.intersect1d(one, other)
        if len(shared):
            raise UserError(
                f"{len(shared)} samples are in the splits {first} and {second}:"
                f" {some_of([ids[row] for row in shared])}; keep each in one"
            )


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
            for group, splits in list(shared.items())[:SHOWN]
        ]
        raise UserError(
            f"{len(shared)} groups are in more than one split: {'; '.join(shown)}; move each into"
            ' one split or use data.split_source = "kfold"'
        )


def different(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The splits without a test split that is the val split."""
    same = "test" in rows and "val" in rows and np.array_equal(rows["val"], rows["test"])
    return {split: numbers for split, numbers in rows.items() if not (same and split == "test")}


def duplicate_notes(
    paths: Sequence[str], ids: Sequence[str], targets: np.ndarray, rows: dict[str, np.ndarray]
) -> list[str]:
    """Lines on files that are equal byte for byte: across splits (leakage), within a split, and
    with different labels."""
    split = {int(row): name for name, numbers in different(rows).items() for row in numbers}
    used = sorted(split)
    across, within, torn = [], [], []
    for twins in duplicates([paths[row] for row in used], threads=FILE_THREADS):
        members = [used[number] for number in twins]
        shown = " = ".join(f"{ids[row]} ({split[row]})" for row in members[:4])
        (across if len({split[row] for row in members}) > 1 else within).append(shown)
        if len({targets[row].tobytes() for row in members}) > 1:
            torn.append(shown)
    texts = {
        "leakage: {} images are in several splits under different names: {}": across,
        "{} images occur several times within a split: {}": within,
        "{} images occur with different labels: {}": torn,
    }
    return [text.format(len(found), some_of(found)) for text, found in texts.items() if found]


def some_of(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)
    return ", ".join(names[:SHOWN]) + more


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
