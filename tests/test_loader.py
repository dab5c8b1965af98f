"""Loaders: order, ranks, resume, memory against workers, errors."""

import os
import threading
import time
from dataclasses import dataclass

import h5py
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from glovita_lib import loader, read_hdf5
from glovita_lib.data import ArraySource, Split
from glovita_lib.dist import Ranks, WorkerPool
from glovita_lib.errors import UserError
from glovita_lib.loader import (
    build_loader,
    gather_samples,
    hold,
    to_device,
)
from glovita_lib.read_features import VectorSource
from glovita_lib.read_hdf5 import DatasetRows
from glovita_lib.sampler import EvalOrder
from glovita_lib.spec_train import Dataloading

CPU = torch.device("cpu")
DIGITS = load_digits().images.astype(np.uint8)[:, None] * 15  # (1797, 1, 8, 8)
HELD = Dataloading(batch_size=8)
WORKERS = Dataloading(batch_size=8, in_memory_mb=0, num_workers=2)
INLINE = Dataloading(batch_size=8, in_memory_mb=0, num_workers=0)


@dataclass(frozen=True)
class CornerFit:
    """A 4x4 window at a random corner, the geometry of policies.Fit without its parameters."""

    one_size = True

    def boxes(self, sizes, generator):
        free = torch.as_tensor(sizes) - 4
        corner = (torch.rand(len(sizes), 2, generator=generator) * (free + 1)).floor()
        return torch.cat([corner, torch.full((len(sizes), 2), 4.0)], 1)

    def join(self, parts, samples):
        return torch.stack(parts)

    def one(self, image, box):
        y, x = int(box[0]), int(box[1])
        return torch.from_numpy(image[:, y : y + 4, x : x + 4].astype(np.int64)).byte()


@dataclass(frozen=True)
class RaggedSource:
    """Digits cropped to heights 4 to 8."""

    count: int
    broken: tuple[int, ...] = ()
    uniform = sizes = collate = windows = None
    reads_at_once = False

    def fetch(self, rows):
        bad = [row for row in rows if row in self.broken]
        if bad:
            raise UserError("\n".join(f"image {row}.png cannot be read" for row in bad))
        return [DIGITS[row, :, : 4 + row % 5] for row in rows]

    def nbytes(self):
        return self.count * 64


@dataclass(frozen=True)
class SetSource:
    """Samples that are no images: digit rows of differing number, padded by their own collate."""

    count: int
    uniform = sizes = windows = None
    reads_at_once = False

    def fetch(self, rows):
        return [DIGITS[row, 0, : 1 + row % 8] for row in rows]

    def collate(self, samples):
        return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(s) for s in samples], True)

    def nbytes(self):
        return self.count * 64


def split_of(source, count):
    return Split([str(i) for i in range(count)], np.arange(count), source)


def digits(count=50):
    return split_of(ArraySource(DIGITS, np.arange(count)), count)


def loader_of(
    split,
    spec=HELD,
    *,
    train=True,
    rank=0,
    world=1,
    seed=3,
    batch_size=None,
    fit=None,
    device=CPU,
    pool=None,
):
    ranks = Ranks(rank, world, rank, device)
    return build_loader(
        split,
        spec,
        fit=fit or CornerFit(),
        train=train,
        seed=seed,
        ranks=ranks,
        batch_size=batch_size or spec.batch_size,
        pool=pool,
    )


def rows_of(loader, epoch=0, start=0):
    return [batch.rows.tolist() for batch in loader.epoch(epoch, start)]


def same(a, b):
    return (
        torch.equal(a.inputs, b.inputs)
        and torch.equal(a.targets, b.targets)
        and torch.equal(a.rows, b.rows)
        and a.fitted == b.fitted
    )


def test_epoch_visits_every_sample_once_in_a_new_order():
    loader = loader_of(digits())
    first, second = (sum(rows_of(loader, epoch), []) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second != list(range(50))
    assert first == sum(rows_of(loader_of(digits()), 0), [])
    assert first != sum(rows_of(loader_of(digits(), seed=4), 0), [])


def test_batches_hold_the_samples_of_their_rows():
    for spec in (HELD, INLINE, WORKERS):
        loader = loader_of(digits(), spec)
        for number, batch in enumerate(loader.epoch(2)):
            rows = batch.rows.numpy()
            assert (batch.inputs.numpy() == DIGITS[rows]).all()
            assert (batch.targets.numpy() == rows).all()
            assert not batch.fitted and batch.inputs.dtype == torch.uint8
            assert len(rows) == loader.order.size(number)
            assert (loader.rows(2, number) == rows).all()
        assert number + 1 == len(loader) == 7
        loader.close()


def test_sizes_that_differ_are_fitted_the_same_in_memory_threads_and_workers():
    split = split_of(RaggedSource(50), 50)
    threads, processes, inline = (loader_of(split, spec) for spec in (HELD, WORKERS, INLINE))
    explicit = loader_of(split, Dataloading(batch_size=8, num_workers=1))
    assert threads.held and threads.workers > 0 and explicit.held and not processes.held
    for epoch in (0, 1):  # the second epoch uses the persistent workers again
        runs = [loader.epoch(epoch) for loader in (threads, processes, inline, explicit)]
        for one, two, three, four in zip(*runs, strict=True):
            assert same(one, two) and same(one, three) and same(one, four)
            assert one.fitted and one.inputs.shape[1:] == (1, 4, 4)
    processes.close()
    explicit.close()


@pytest.mark.parametrize("spec", [HELD, WORKERS, INLINE])
def test_resume_continues_with_identical_batches(spec):
    loader = loader_of(split_of(RaggedSource(50), 50), spec)
    whole = list(loader.epoch(1))
    rest = list(loader.epoch(1, 3))
    assert len(whole) == 7 and len(rest) == 4
    assert all(same(a, b) for a, b in zip(whole[3:], rest, strict=True))
    assert not list(loader.epoch(1, 7))
    loader.close()


@pytest.mark.parametrize("spec", [HELD, WORKERS])
def test_an_epoch_left_early_does_not_reach_the_next(spec):
    loader = loader_of(split_of(RaggedSource(50), 50), spec)
    for _ in loader.epoch(0):
        break
    expected = [loader.rows(1, b).tolist() for b in range(len(loader))]
    assert rows_of(loader, 1) == expected
    loader.close()


def test_workers_that_are_not_persistent():
    spec = Dataloading(
        batch_size=8, in_memory_mb=0, num_workers=1, persistent_workers=False, timeout=60
    )
    loader = loader_of(digits(20), spec)
    assert rows_of(loader, 0) == [loader.rows(0, b).tolist() for b in range(3)]
    assert rows_of(loader, 1) == [loader.rows(1, b).tolist() for b in range(3)]


@dataclass(frozen=True)
class ProcessSource(RaggedSource):
    """Digits whose pixels are the number of the process that reads them, modulo 251."""

    def fetch(self, rows):
        return [np.full((1, 4, 4), os.getpid() % 251, np.uint8) for _ in rows]


def test_loaders_of_a_pool_have_the_same_workers():
    def processes(loader):
        return {int(batch.inputs.max()) for batch in loader.epoch(0)}

    pool = WorkerPool(WORKERS, CPU)
    one, two = (loader_of(split_of(ProcessSource(50), 50), WORKERS, pool=pool) for _ in range(2))
    found = processes(one)
    assert len(found) == 2 and found == processes(two)
    one.close()
    two.close()
    assert processes(one) == found  # a loader does not end what others have too
    late = loader_of(split_of(ProcessSource(30), 30), WORKERS, pool=pool)
    again = processes(late)
    assert again.isdisjoint(found) and processes(one) == again
    same_parts = loader_of(late.split, WORKERS, fit=late.builder.fit, pool=pool)
    assert processes(same_parts) == again
    pool.close()
    assert processes(one).isdisjoint(again)
    pool.close()


def test_loaders_of_a_pool_give_their_own_batches():
    pool = WorkerPool(WORKERS, CPU)
    splits = [split_of(RaggedSource(50), 50), split_of(RaggedSource(30, broken=(7,)), 30)]
    train, broken = (loader_of(split, WORKERS, pool=pool) for split in splits)
    val = loader_of(splits[0], WORKERS, train=False, pool=pool)
    for _ in range(2):
        for shared in (train, val):
            alone = loader_of(shared.split, INLINE, train=shared is train)
            for one, two in zip(shared.epoch(1, 2), alone.epoch(1, 2), strict=True):
                assert same(one, two)
        with pytest.raises(UserError, match=r"^image 7\.png cannot be read$"):
            list(broken.epoch(0))
    for taken in (1, len(val)):
        left, other = train.epoch(0), val.epoch(0)
        next(left)
        for batch in range(taken):
            assert next(other).rows.tolist() == val.rows(0, batch).tolist()
        with pytest.raises(AssertionError, match="another epoch has taken the workers"):
            next(left)
    pool.close()


def test_the_global_random_stream_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for spec in (HELD, WORKERS):
        loader = loader_of(split_of(RaggedSource(20), 20), spec)
        list(loader.epoch(0))
        loader.close()
    assert torch.equal(torch.rand(3), expected)


def test_drop_last_and_fixed_order():
    assert len(loader_of(digits(17), Dataloading(batch_size=8, drop_last_train=True))) == 2
    fixed = loader_of(digits(16), Dataloading(batch_size=8, shuffle_train=False))
    assert fixed.rows(9, 1).tolist() == list(range(8, 16))
    spec = Dataloading(drop_last_train=True)
    with pytest.raises(UserError, match="a batch of 32 on each of 1 ranks needs 32"):
        loader_of(digits(31), spec)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 16, 50])
def test_evaluation_shards_are_disjoint_complete_and_in_order(world, count):
    orders = [EvalOrder(count, 4, rank, world) for rank in range(world)]
    rows = [row for o in orders for b in range(len(o)) for row in o.rows(0, b)]
    assert rows == list(range(count))
    assert all(o.size(b) <= 4 for o in orders for b in range(len(o)))


def test_fitting_leaves_the_number_of_cores_as_it_was():
    before = torch.get_num_threads()
    list(loader_of(split_of(RaggedSource(20), 20), INLINE).epoch(0))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("start", [0, 3, 7])
def test_samples_that_live_on_a_device_give_the_same_batches(start):
    loader = loader_of(digits())
    expected = list(loader.epoch(2, start))
    samples = torch.from_numpy(loader.builder.source.samples)
    loader.resident = samples, torch.from_numpy(loader.split.targets)
    found = list(loader.epoch(2, start))
    assert len(found) == 7 - start
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))


def test_shard_that_lives_on_a_device():
    loader = loader_of(digits(), train=False, rank=1, world=2)
    expected = list(loader.epoch(0))
    samples = torch.from_numpy(loader.builder.source.samples)
    loader.resident = samples, torch.from_numpy(loader.split.targets)
    assert all(same(a, b) for a, b in zip(expected, loader.epoch(0), strict=True))
    assert expected[0].rows[0] == 25


def test_real_photos_through_a_real_policy(tmp_path):
    """Photographs of differing sizes, random crops: decoded in workers as in memory."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    from glovita_lib.augment import Augmenter
    from glovita_lib.augment import resolve_augmentation as resolve
    from glovita_lib.encoder import Preprocess
    from glovita_lib.read_image import FileSource, read_headers
    from glovita_lib.spec_augment import ImageAugmentation

    for number, photo in enumerate(load_sample_images().images * 4):
        Image.fromarray(photo[: 100 + 10 * number, :120]).save(tmp_path / f"{number}.jpg")
    paths = [str(tmp_path / f"{number}.jpg") for number in range(8)]
    source = FileSource(
        paths,
        read_headers(paths, threads=1, max_megapixels=1)[0],
        channels=3,
        bit_depth=8,
        max_megapixels=1,
    )
    encoder = Preprocess(64, 64 / 72, "bilinear", (0.5,) * 3, (0.5,) * 3, False)
    resolved = resolve(
        ImageAugmentation(train_policy="default_2d_2"),
        default_policies=("default_2d_2", "shared_default_2d"),
        encoder=encoder,
        channels=3,
        native_size=None,
    )
    fit = Augmenter(resolved, train=True, bit_depth=8).fit
    runs = [
        list(loader_of(split_of(source, 8), spec, fit=fit, batch_size=3).epoch(1))
        for spec in (HELD, WORKERS, INLINE)
    ]
    for one, two, three in zip(*runs, strict=True):
        assert same(one, two) and same(one, three)
        assert one.inputs.shape[1:] == (3, 64, 64) and one.inputs.dtype == torch.uint8
    assert not torch.equal(runs[0][0].inputs[0], runs[0][0].inputs[1])


@pytest.mark.parametrize("spec", [HELD, INLINE])
def test_evaluation_of_a_shard(spec):
    source = RaggedSource(11)
    parts = [
        list(loader_of(split_of(source, 11), spec, train=False, rank=r, world=3).epoch(0))
        for r in range(3)
    ]
    batches = [batch for part in parts for batch in part]
    assert [len(b.rows) for b in batches] == [3, 4, 4]
    assert torch.cat([b.rows for b in batches]).tolist() == list(range(11))
    assert torch.cat([b.targets for b in batches]).tolist() == list(range(11))
    assert all(b.fitted for b in batches)
    for batch in batches:
        for row, image in zip(batch.rows.tolist(), batch.inputs, strict=True):
            windows = [
                DIGITS[row, :, y : y + 4, x : x + 4] for y in range(row % 5 + 1) for x in range(5)
            ]
            assert any((image.numpy() == window).all() for window in windows)


def test_a_rank_without_rows():
    loader = loader_of(digits(1), train=False, rank=0, world=2)
    assert len(loader) == 0 and list(loader.epoch(0)) == []


def test_unlabelled_samples_have_no_targets():
    split = Split(["a", "b"], None, ArraySource(DIGITS, np.arange(2)))
    (batch,) = loader_of(split, train=False).epoch(0)
    assert batch.targets is None and batch.to(CPU).targets is None


def test_sixteen_bits_become_int32():
    wide = DIGITS[:9].astype(np.uint16) * 257
    for spec in (HELD, INLINE):
        (batch,) = loader_of(
            split_of(ArraySource(wide, np.arange(9)), 9), spec, train=False, batch_size=9
        ).epoch(0)
        assert batch.inputs.dtype == torch.int32
        assert (batch.inputs.numpy() == wide).all()


@pytest.mark.parametrize("spec", [HELD, WORKERS, INLINE])
def test_a_source_may_collate_on_its_own(spec):
    loader = loader_of(split_of(SetSource(30), 30), spec)
    for batch in loader.epoch(0):
        rows = batch.rows.numpy()
        assert batch.inputs.shape == (len(rows), 1 + (rows % 8).max(), 8) and not batch.fitted
        for row, padded in zip(rows, batch.inputs.numpy(), strict=True):
            assert (padded[: 1 + row % 8] == DIGITS[row, 0, : 1 + row % 8]).all()
            assert (padded[1 + row % 8 :] == 0).all()
    loader.close()


def test_broken_samples_in_memory_are_listed_together():
    with pytest.raises(UserError) as caught:
        loader_of(split_of(RaggedSource(400, broken=range(3, 400, 7)), 400))
    assert str(caught.value).splitlines() == [
        f"image {row}.png cannot be read" for row in range(3, 400, 7)
    ]


@pytest.mark.parametrize("spec", [WORKERS, INLINE])
def test_a_broken_sample_is_one_line_from_a_worker_too(spec):
    loader = loader_of(split_of(RaggedSource(30, broken=(7,)), 30), spec)
    with pytest.raises(UserError) as caught:
        list(loader.epoch(0))
    assert str(caught.value) == "image 7.png cannot be read"
    loader.close()


@dataclass(frozen=True)
class DyingSource(RaggedSource):
    """A worker that reads it dies, as by the kernel's out-of-memory killer, or hangs."""

    hangs: bool = False

    def fetch(self, rows):
        import os
        import signal
        import time

        if self.hangs:
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("hangs", "said"), [(False, "a data worker died"), (True, "within 1 s")])
def test_dead_and_slow_workers_are_user_errors(hangs, said, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    spec = Dataloading(batch_size=8, in_memory_mb=0, num_workers=1, timeout=1 if hangs else 0)
    loader = loader_of(split_of(DyingSource(8, hangs=hangs), 8), spec)
    with pytest.raises(UserError, match=said):
        list(loader.epoch(0))


@dataclass(frozen=True)
class SizedSource(RaggedSource):
    """Digits whose heights, 4 to 8, are known before they are decoded."""

    @property
    def sizes(self):
        return np.array([(4 + row % 5, 8) for row in range(self.count)])


@dataclass(frozen=True)
class PickyFit(CornerFit):
    """Refuses images lower than 5 pixels."""

    def boxes(self, sizes, generator):
        if (np.asarray(sizes)[:, 0] < 5).any():
            raise UserError("an image is smaller than the crop")
        return super().boxes(sizes, generator)


def test_images_that_are_too_small_are_named_before_decoding():
    split = split_of(SizedSource(150, broken=(1,)), 150)
    with pytest.raises(UserError) as caught:
        loader_of(split, fit=PickyFit())
    assert str(caught.value).splitlines() == [
        f"{identity}: an image is smaller than the crop" for identity in range(0, 150, 5)
    ]


def test_the_memory_limit_counts_the_shard_of_a_rank():
    wide = np.zeros((40, 1, 256, 256), np.uint8)  # 2.5 MiB
    split = split_of(ArraySource(wide, np.arange(40)), 40)
    spec = Dataloading(in_memory_mb=2, num_workers=0)
    assert not loader_of(split, spec, train=False).held
    assert loader_of(split, spec, train=False, rank=1, world=2).held
    assert not loader_of(split, spec, rank=1, world=2).held


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16])
def test_a_gather_copies_the_rows(dtype):
    samples = torch.from_numpy(DIGITS.astype(dtype))
    rows = np.array([3, 1796, 0, 3])
    found = gather_samples(samples, rows, pinned=False)
    assert (found.numpy() == DIGITS[rows]).all() and found.data_ptr() != samples.data_ptr()
    assert gather_samples(samples, rows[:0], pinned=False).shape == (0, 1, 8, 8)


@pytest.fixture
def gpu(monkeypatch):
    """A device that says it is a GPU with no room left; what is made page-locked is noted with
    the thread that does it."""
    noted = []

    def copied(samples, rows, *, pinned):
        noted.append((pinned, threading.current_thread()))
        return gather_samples(samples, rows, pinned=False)

    def pinned(batch):
        noted.append((True, threading.current_thread()))
        return batch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(loader, "gather_samples", copied)
    monkeypatch.setattr(loader.Batch, "pin_memory", pinned)
    return torch.device("cuda"), noted


@pytest.mark.parametrize("source", [ArraySource(DIGITS, np.arange(50)), SetSource(50)])
def test_batches_from_memory_are_page_locked_outside_the_main_thread(gpu, source):
    """What does not live on the GPU is copied into page-locked memory once, and ahead of its use;
    bags and the like are collated and copied there by threads."""
    device, noted = gpu
    split = split_of(source, 50)
    plain, loader = loader_of(split), loader_of(split, device=device)
    assert loader.pinned and loader.resident is None
    for start in (0, 3):
        noted.clear()
        found, expected = list(loader.epoch(1, start)), list(plain.epoch(1, start))
        assert len(found) == 7 - start
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))
        own = [thread for is_pinned, thread in noted if is_pinned]
        assert len(own) >= len(found) and threading.main_thread() not in own


def test_a_batch_is_made_ahead_of_its_use(gpu):
    batches = iter(loader_of(digits(), device=gpu[0]).epoch(0))
    next(batches)
    end = time.monotonic() + 10
    while len(gpu[1]) <= 2 and time.monotonic() < end:  # gather and pin of the first batch
        time.sleep(0.01)
    assert len(gpu[1]) > 2  # and of later ones
    batches.close()


@pytest.mark.parametrize(
    ("shape", "dtype", "free", "lives"),
    [
        ((100, 512), np.float32, 409_600, True),  # 204,800 bytes: half of what is free
        ((100, 512), np.float32, 409_599, False),
        ((100, 2, 16, 16), np.float32, 2_048_000, True),  # a tenth
        ((100, 2, 16, 16), np.float32, 2_047_999, False),
        ((100, 2, 16, 16), np.uint16, 2_048_000, True),  # there as int32
        ((100, 2, 16, 16), np.uint16, 2_047_999, False),
    ],
)
def test_what_lives_on_a_gpu_follows_its_free_memory(shape, dtype, free, lives, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    samples = np.ones(shape, dtype)
    found = to_device(samples, torch.device("cuda"))
    assert (found is not None) == lives
    assert not lives or (found.numpy() == 1).all()
    assert to_device(samples, CPU) is None


@pytest.mark.parametrize("every", [1, 3])
def test_vectors_are_held_with_every_chunk_inflated_once(tmp_path, monkeypatch, every):
    inflated, real = [], read_hdf5.inflate
    monkeypatch.setattr(read_hdf5, "inflate", lambda *a: inflated.append(1) or real(*a))
    opened, real_open = [], read_hdf5.open_hdf5
    monkeypatch.setattr(read_hdf5, "open_hdf5", lambda path: opened.append(1) or real_open(path))
    values = DIGITS.reshape(-1, 64).astype(np.float32)
    storage = {"gzip": {"compression": "gzip"}, "lzf": {"compression": "lzf"}}
    for name, options in storage.items():
        with h5py.File(tmp_path / name, "w") as file:
            file.create_dataset("features", data=values, chunks=(170, 64), **options)
    for name in storage:
        vectors = DatasetRows(tmp_path / name, "features", threads=2)
        source = VectorSource(vectors, np.arange(0, len(values), every))
        opened.clear(), inflated.clear()  # those of the proof
        rows = np.arange(5, len(source.index))
        held = hold(source, rows, fit=None, windows=None, threads=2, shown=False)
        np.testing.assert_array_equal(held.samples, values[::every][5:])
        assert held.uniform == (64,) and not held.fitted
        assert len(opened) == (name == "lzf")
        assert len(inflated) == (11 if name == "gzip" else 0)
