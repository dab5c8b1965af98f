"""What an HDF5 file says: its datasets, wherever links lead, and whether their chunks are whole."""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.errors import UserError, listed

HDF5_AT_LEAST = (1, 14)  # stands in setup.cfg; before it there is no list of all chunks
DEFLATE, SHUFFLE, FLETCHER32 = 1, 2, 3  # HDF5's numbers of the filters that are undone here
CHECKSUM = 4  # bytes that the last of them adds
VIRTUAL = (-1,)  # in the place of a chunk: all sources of a virtual dataset


@contextmanager
def open_hdf5(path: str) -> Iterator[Any]:
    """An open h5py file; what the library cannot read in it is the user's mistake.

    Raises:
        UserError: missing, truncated, not HDF5, or damaged; or h5py has an older HDF5.
    """
    import h5py

    if h5py.version.hdf5_version_tuple < HDF5_AT_LEAST:
        raise UserError(
            f"h5py was built with HDF5 {h5py.version.hdf5_version}, at least"
            f" {'.'.join(map(str, HDF5_AT_LEAST))} is needed: pip install --force-reinstall h5py"
        )
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        file = h5py.File(path, "r")
    except BlockingIOError as error:
        raise UserError(f"{path}: another program writes it ({error}); wait for its end") from None
    except OSError as error:
        reason = "truncated" if "truncated" in str(error) else "not an HDF5 file, or a damaged one"
        raise UserError(f"{path}: {reason} ({error})") from None
    with file:
        try:
            yield file
        except (OSError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise UserError(f"{path}: damaged ({said}); write or copy it again") from None


def filter_numbers(dataset: Any) -> list[int]:
    """HDF5's numbers of the filters, in the order of writing."""
    plist = dataset.id.get_create_plist()
    return [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]


# ---------------------------------------------------------------------- chunks
#
# A chunk that gives fewer bytes than its shape asks for is read by the library all the same: what
# lacks is whatever stood in memory.


def chunk_size(dataset: Any) -> int:
    """Bytes of a chunk that is not compressed."""
    return int(np.prod(dataset.chunks)) * dataset.id.get_type().get_size()


def refuse_torn(
    dataset: Any, key: str, start: int, stop: int, seen: set[tuple[int, ...]] | None = None
) -> None:
    """The chunks of rows start..stop give the bytes that they must; what other filters than those
    named above have made is the library's word.

    Args:
        seen: places of the chunks that were looked at, completed.

    Raises:
        UserError: one gives more or fewer.
    """
    seen = set() if seen is None else seen
    if dataset.is_virtual:
        refuse_torn_sources(dataset, seen)
    filters = filter_numbers(dataset) if dataset.chunks and dataset.dtype.kind != "O" else None
    if filters is None or not set(filters) <= {DEFLATE, SHUFFLE, FLETCHER32} or stop <= start:
        return
    size = chunk_size(dataset)
    first = start // dataset.chunks[0] * dataset.chunks[0]
    sides = [range(first, stop, dataset.chunks[0])]
    sides += [range(0, *pair) for pair in zip(dataset.shape[1:], dataset.chunks[1:], strict=True)]
    for place in product(*sides):
        if place in seen:
            continue
        got = bytes_of_chunk(dataset, place, filters)
        if got is not None and got != size:
            last = min(place[0] + dataset.chunks[0], len(dataset)) - 1
            raise UserError(
                f"{dataset.file.filename}: rows {place[0]} to {last} of {key!r} are damaged (their"
                f" chunk holds {got:,} bytes, not {size:,}); write or copy it again"
            )
        seen.add(place)


def refuse_torn_sources(dataset: Any, seen: set[tuple[int, ...]]) -> None:
    """All chunks of the sources of a virtual dataset are whole, see `refuse_torn`."""
    if VIRTUAL in seen:
        return
    path = dataset.file.filename
    for name, wanted in sorted({(s.file_name, s.dset_name) for s in dataset.virtual_sources()}):
        source = path if name == "." else source_path(path, name)
        assert source is not None, "check_sources has found it"
        with open_hdf5(source) as file:
            refuse_torn(file[wanted], wanted, 0, len(file[wanted]))
    seen.add(VIRTUAL)


def read_whole(dataset: Any, key: str) -> np.ndarray:
    """All values of a small dataset.

    Raises:
        UserError: see `refuse_torn`.
    """
    if dataset.ndim:
        refuse_torn(dataset, key, 0, len(dataset))
    return dataset[()]


def bytes_of_chunk(dataset: Any, place: tuple[int, ...], filters: list[int]) -> int | None:
    """How many bytes the chunk at a place gives; None where it was never written, is damaged in a
    way that the library itself finds, or is one that the library reads but cannot be asked about
    (HDF5 1.14 mixes up the places of chunks where the second axis alone may grow)."""
    try:
        info = dataset.id.get_chunk_info_by_coord(place)
        if info.byte_offset is None or not info.size:
            return None
        return bytes_given(dataset, place, info, filters)
    except (OSError, RuntimeError, zlib.error):
        return None


def bytes_given(dataset: Any, place: tuple[int, ...], info: Any, filters: list[int]) -> int:
    """How many bytes a chunk gives, of which the library says that it is there."""
    kept = [k for number, k in enumerate(filters) if not info.filter_mask >> number & 1]
    if DEFLATE not in kept:
        is_edge = any(
            a + b > n for a, b, n in zip(place, dataset.chunks, dataset.shape, strict=True)
        )
        if is_edge and info.size == chunk_size(dataset):  # such may be stored without filters
            return info.size
        return info.size - CHECKSUM * kept.count(FLETCHER32)
    _, data = dataset.id.read_direct_chunk(place)
    for kind in reversed(kept):
        data = data[:-CHECKSUM] if kind == FLETCHER32 else data
        data = zlib.decompress(data) if kind == DEFLATE else data
    return len(data)


# ---------------------------------------------------------------------- links
#
# A feature file may hold its datasets itself or link to other HDF5 files, and what such a file says
# is not the user's word: it must not make the program read any other file as features.

NAME_ANOTHER = "say with data.features_key, data.labels_key ... which one is meant"


def dataset_of(
    file: Any, key: str, *, follow_links: bool, parents: tuple[tuple[str, str], ...] = ()
) -> Any:
    """The dataset of a name, wherever links lead; None if there is none.

    External links and the sources of virtual datasets may lie in HDF5 files in the folder of the
    linking file, or below it.

    Args:
        file: an open h5py file.
        follow_links: whether they may lie elsewhere, too.
        parents: files and names of the virtual datasets that it is a source of.

    Raises:
        UserError: a link that leads nowhere or elsewhere, no array, numbers outside of HDF5 files,
        or a filter that is not installed.
    """
    import h5py

    path = file.filename
    try:
        found = file[key]
    except (KeyError, RuntimeError) as error:  # the second: links that lead in a circle
        if isinstance(error, KeyError) and is_absent(file, key):
            return None
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise UserError(
            f"{path}: {key!r} cannot be opened{aim(file, key)} ({reason}); correct the link, or"
            " copy the dataset into the file"
        ) from None
    if not isinstance(found, h5py.Dataset) or found.shape is None:
        raise UserError(f"{path}: {key!r} is no array; {NAME_ANOTHER}")
    try:
        found.dtype  # noqa: B018
    except TypeError as error:
        raise UserError(f"{path}: {key!r} is of a type that numpy has not ({error})") from None
    if found.file.filename != path:
        refuse_outside(path, key, found.file.filename, follow_links=follow_links)
    if found.external:
        raise UserError(
            f"{path}: {key!r} keeps its numbers in files that are not HDF5"
            f" ({found.external[0][0]}); copy it into the file"
        )
    absent = [code for code in filter_numbers(found) if not h5py.h5z.filter_avail(code)]
    if absent:
        raise UserError(
            f"{path}: {key!r} is compressed with HDF5's filter {absent[0]}, which is not installed;"
            " write it with gzip or without, or name the plugin's folder in HDF5_PLUGIN_PATH"
        )
    if found.is_virtual:
        parents = (*parents, (os.path.realpath(found.file.filename), "/" + key.lstrip("/")))
        check_sources(found, key, follow_links=follow_links, parents=parents)
    return found


def array_of(file: Any, key: str, *, follow_links: bool) -> Any:
    """The dataset of a name, which must have rows.

    Raises:
        UserError: there is none, or as `dataset_of`.
    """
    found = dataset_of(file, key, follow_links=follow_links)
    if found is None:
        raise UserError(
            f"{file.filename}: no dataset {key!r}; the file has {listed(sorted(file), 20)}"
        )
    if found.shape == ():
        raise UserError(f"{file.filename}: {key!r} is no array; {NAME_ANOTHER}")
    return found


def is_absent(file: Any, key: str) -> bool:
    """Whether a name does not stand in the file, not even as a link that leads nowhere."""
    group, parts = file, [part for part in key.split("/") if part not in ("", ".")]
    for part in parts[:-1]:
        if not group.id.links.exists(part.encode()):
            return True
        group = group.get(part)
        if group is None or not hasattr(group, "keys"):  # a link that leads nowhere, or an array
            return group is not None
    return not parts or not group.id.links.exists(parts[-1].encode())


def aim(file: Any, key: str) -> str:
    """Where the first external link of a name leads, in words."""
    import h5py

    names = [part for part in key.split("/") if part not in ("", ".")]
    for end in range(1, len(names) + 1):
        link = file.get("/".join(names[:end]), getlink=True)
        if isinstance(link, h5py.ExternalLink):
            return f", it leads to {link.path!r} of {link.filename}"
        if isinstance(link, h5py.SoftLink):
            return f", it leads to {link.path!r}"
    return ""


def refuse_outside(path: str, key: str, target: str, *, follow_links: bool) -> None:
    """A file that another one refers to lies in its folder or below.

    Raises:
        UserError: it does not, and `follow_links` does not allow that.
    """
    where, own = Path(target).resolve(), Path(path)
    folders = own.parent.resolve(), own.resolve().parent  # of a link to the file, and of the file
    if not follow_links and not any(where.is_relative_to(folder) for folder in folders):
        raise UserError(
            f"{path}: {key!r} lies in another file outside of its folder, {where};"
            " data.follow_links = true reads it all the same"
        )


def check_sources(
    dataset: Any, key: str, *, follow_links: bool, parents: tuple[tuple[str, str], ...]
) -> None:
    """All rows of a virtual dataset have sources that are there and large enough; the library would
    give the fill value instead, or say nothing of use.

    Raises:
        UserError: they have not, or a source is none that may be read, see `dataset_of`.
    """
    path, virtual = dataset.file.filename, dataset.virtual_sources()
    shapes = {}
    for name, wanted in {(s.file_name, s.dset_name) for s in virtual}:
        what = f"{path}: the virtual dataset {key!r} takes rows from {wanted!r} of {name}"
        if "%b" in name + wanted:
            raise UserError(f"{what}, a pattern of names; copy its rows into one dataset")
        source = path if name == "." else source_path(path, name)
        if source is None:
            raise UserError(f"{what}, which is not there; copy it back")
        refuse_outside(path, key, source, follow_links=follow_links)
        if (os.path.realpath(source), "/" + wanted.lstrip("/")) in parents:
            raise UserError(f"{what}, and so from itself")
        with open_hdf5(source) as file:
            found = dataset_of(file, wanted, follow_links=follow_links, parents=parents)
            if found is None:
                raise UserError(f"{what}, which the file has not; copy it back")
            shapes[name, wanted] = found.shape
    mapped = [np.empty((0, 2, dataset.ndim), np.int64)]
    for part in virtual:
        shape = shapes[part.file_name, part.dset_name]
        mapped.append(selected(part.vspace, dataset.shape))
        takes, has = points(mapped[-1]), points(selected(part.src_space, shape))
        if takes != has:
            raise UserError(
                f"{path}: the virtual dataset {key!r} maps {takes:,} numbers to {has:,} of"
                f" {part.dset_name!r} of {part.file_name}, which has the shape {shape}; correct the"
                " mapping, or copy the rows into one dataset"
            )
    if dataset.ndim and len(rows := unmapped_rows(np.concatenate(mapped), dataset.shape)):
        raise UserError(
            f"{path}: {len(rows)} of {len(dataset)} rows of the virtual dataset {key!r}, first row"
            f" {rows[0]}, are not or not wholly mapped to a source; map them, or copy the rows into"
            " one dataset"
        )


def selected(space: Any, shape: tuple[int, ...]) -> np.ndarray:
    """First and last index (N, 2, rank) of the blocks of a selection, cut to an array of a shape;
    none where the selection is one of an array of another rank."""
    from h5py import h5s

    kind, rank = space.get_select_type(), len(shape)
    if kind == h5s.SEL_ALL:
        blocks = np.array([[[0] * rank, [size - 1 for size in shape]]])
    elif kind != h5s.SEL_HYPERSLABS or space.get_simple_extent_ndims() != rank:
        return np.empty((0, 2, rank), np.int64)
    elif space.is_regular_hyperslab():  # which may be without end, and then has no list of blocks
        start, stride, count, block = space.get_regular_hyperslab()
        axes = [
            np.arange(*along)[: min(times, along[1])]
            for *along, times in zip(start, shape, stride, count, strict=True)
        ]
        first = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
        size = [min(pair) for pair in zip(block, shape, strict=True)]
        blocks = np.stack([first, first + size - 1], axis=1)
    else:
        blocks = space.get_select_hyper_blocklist().astype(np.int64)
    blocks[:, 1] = np.minimum(blocks[:, 1], np.array(shape) - 1)
    return blocks[(blocks[:, 0] <= blocks[:, 1]).all(axis=1)]


def points(blocks: np.ndarray) -> int:
    """How many places lie in blocks (N, 2, rank) that do not overlap."""
    return int((blocks[:, 1] - blocks[:, 0] + 1).prod(axis=1).sum())


def unmapped_rows(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Rows of an array that blocks (N, 2, rank) do not cover wholly. Places between two neighbours
    of all ends of blocks along each axis are covered together."""
    ends = blocks + np.array([[0], [1]])
    cuts = [np.unique([0, size, *ends[..., axis].flat]) for axis, size in enumerate(shape)]
    covered = np.zeros([len(cut) - 1 for cut in cuts], bool)
    for block in ends:
        at = [slice(*np.searchsorted(*pair)) for pair in zip(cuts, block.T, strict=True)]
        covered[tuple(at)] = True
    whole = covered.all(axis=tuple(range(1, len(shape))))
    return np.flatnonzero(~np.repeat(whole, np.diff(cuts[0])))


def source_path(path: str, name: str) -> str | None:
    """The file that the library takes for a source of a virtual dataset of `path`, where it is not
    told otherwise by HDF5_VDS_PREFIX; None if there is none. It is sought in this order: as named,
    if absolute; in the folder of `path`; where the program runs; where a link `path` leads. What
    stays of an absolute name that is not there is its last part."""
    relative = os.path.basename(name) if os.path.isabs(name) else name
    folders = (os.path.dirname(path), os.curdir, os.path.dirname(os.path.realpath(path)))
    tried = [name] if os.path.isabs(name) else []
    tried += [os.path.join(folder, relative) for folder in folders]
    return next((place for place in tried if os.path.isfile(place)), None)
