"""New images without labels, for inference."""

from pathlib import Path

from glovita_lib.readers import FILE_THREADS, FileSource, read_headers
from glovita_lib.samples import Split
from glovita_lib.spec import UserError
from glovita_lib.tables import Problems, read_csv, walk


def build_unlabelled(
    path: str, *, channels: int, bit_depth: int, allowed_exts: tuple[str, ...]
) -> Split:
    """New images without labels: of a folder and all below it in sorted order, of a CSV file with a
    column `path` (relative to the CSV file's folder) in its order, or a single image.

    Raises:
        UserError: nothing there, no image, or images that are missing or broken, all together.
    """
    where = Path(path)
    if where.is_dir():
        ids = walk(where, allowed_exts)
        paths = [str(where / name) for name in ids]
    elif where.suffix.lower() == ".csv":
        ids = [row["path"] for row in read_csv(where, ["path"])]
        paths = [str(where.parent / name) for name in ids]
    elif where.exists():
        ids, paths = [where.name], [path]
    else:
        raise UserError(f"{path}: no such file or folder, expected images, or a CSV of their paths")
    if not ids:
        raise UserError(f"{path}: no image with a suffix of {', '.join(allowed_exts)}")
    headers, broken = read_headers(paths, threads=FILE_THREADS)
    problems = Problems(strict=True)
    for number, line in broken.items():
        problems.add(paths[number], line.removeprefix(f"{paths[number]}: "))
    if problems.lines:
        raise UserError(problems.text(f"of {len(ids)} cannot be read:"))
    source = FileSource(paths, headers, channels=channels, bit_depth=bit_depth)
    return Split(ids=ids, targets=None, source=source)
