"""Data sets of time series: splits, labels, resamples, broken series in one report, and whole
commands on them."""

import importlib.util
import json
import unicodedata

import numpy as np
import pytest
from small_runs import EPOCH

from glovita import main
from glovita_lib.data import order_of_names
from glovita_lib.data_series import padded, unlabelled_series
from glovita_lib.data_splits import resampled
from glovita_lib.datasets import build_data
from glovita_lib.errors import UserError
from glovita_lib.read_series import archive_label
from glovita_lib.spec_data import SeriesData
from glovita_lib.spec_series import SeriesPreparation

AEON = importlib.util.find_spec("aeon")
needs_aeon = pytest.mark.skipif(AEON is None, reason="the files are in aeon")


def made(count, seed, *, ragged=False, channels=1):
    """Series of two classes: slow and fast waves."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        length = int(rng.integers(12, 30)) if ragged else 24
        t = np.arange(length) + rng.uniform(0, 6)
        wave = np.sin(t * (0.4 if number % 2 else 1.2))
        found.append(wave + 0.1 * rng.standard_normal((channels, length)))
    return found


def write_ts(path, series, labels):
    """A .ts file."""
    lines = [":".join(",".join(map(str, c)) for c in s) for s in series]
    text = "\n".join(f"{line}:{label}" for line, label in zip(lines, labels, strict=True))
    names = " ".join(dict.fromkeys(labels))
    path.write_text(f"@timestamps false\n@classLabel true {names}\n@data\n{text}\n")


@pytest.fixture
def root(tmp_path):
    """Train and test of two classes."""
    for name, count, seed in (("train", 16, 0), ("test", 10, 1)):
        labels = ["fast", "slow"] * (count // 2)
        write_ts(tmp_path / f"{name}.ts", made(count, seed), labels)
    return tmp_path


def build(root, **fields):
    fields = {"train_file": "train.ts", "test_file": "test.ts", **fields}
    return build_data(SeriesData(data_root_dir=str(root), **fields), seed=0)


def test_files_and_a_val_that_is_drawn(root):
    data = build(root, val_fraction=0.25)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 12,
        "val": 4,
        "test": 10,
    }
    assert data.class_names == ("fast", "slow") and data.samples.channels == 1
    assert data.splits["val"].targets.sum() == 2
    assert set(data.splits["train"].ids).isdisjoint(data.splits["val"].ids)
    source = data.splits["test"].source
    assert source.uniform == (1, 24) and source.collate is None
    assert source.fetch(np.array([3, 1])).shape == (2, 1, 24)


def test_splits_of_one_file(tmp_path):
    series, labels = made(30, 0), ["a", "b"] * 15
    rows = [
        ",".join([f"s{i}", label, f"p{i // 3}", ["train", "val", "test"][i % 3], *map(str, one[0])])
        for i, (one, label) in enumerate(zip(series, labels, strict=True))
    ]
    header = ",".join(["id", "label", "patient", "split", *(f"t{i}" for i in range(24))])
    (tmp_path / "all.csv").write_text("\n".join([header, *rows]))
    kfold = {"series_file": "all.csv", "train_file": None, "test_file": None}
    columns = {"group_column": "patient", "value_columns": tuple(f"t{i}" for i in range(24))}
    data = build(tmp_path, **kfold, split_source="kfold", **columns)
    groups = {name: set(split.groups) for name, split in data.splits.items()}
    assert not groups["train"] & groups["test"] and len(set.union(*groups.values())) == 10
    data = build(tmp_path, **kfold, split_source="csv", value_columns=columns["value_columns"])
    assert data.splits["val"].ids == [f"s{i}" for i in range(1, 30, 3)]
    splits = {"train": ["s0", "s1", "s2"], "test": ["s5", "s4"]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    value = {"value_columns": columns["value_columns"]}
    data = build(tmp_path, **kfold, split_source="splits_json", **value)
    assert data.splits["test"].ids == ["s5", "s4"]


def test_labels_of_a_table(tmp_path):
    np.save(tmp_path / "x.npy", np.stack(made(6, 0))[:, 0])
    table = "id,label,split\n" + "".join(f"{i},{i % 2 + 0.5},train\n" for i in range(5))
    (tmp_path / "labels.csv").write_text(table)
    fields = {"series_file": "x.npy", "train_file": None, "test_file": None}
    with pytest.raises(UserError, match="labels_file"):
        build(tmp_path, **fields, split_source="kfold")
    data = build(tmp_path, **fields, split_source="csv", labels_file="labels.csv")
    assert data.subtask == "regression" and len(data.splits["train"]) == 5
    assert any("1 of 6 samples" in line for line in data.report)


def test_all_broken_series_are_in_one_report(tmp_path):
    good = "".join(f"g{i},{t},{np.sin(t + i)},a\n" for i in range(3) for t in range(5))
    bad = "one,0,1,a\nflat,0,2,a\nflat,1,2,a\ngap,0,1,a\ngap,1,2,a\ngap,2,5,a\ngap,6,3,a\n"
    bad += "twice,0,1,a\ntwice,0,2,a\ntext,0,1,a\ntext,1,x,a\nslow,0,1,a\nslow,2,3,a\nslow,4,1,a\n"
    (tmp_path / "train.csv").write_text("id,time,v,label\n" + good + bad)
    fields = {"train_file": "train.csv", "test_file": None}
    with pytest.raises(UserError) as error:
        build(tmp_path, **fields)
    head, *lines = str(error.value).splitlines()
    assert "6 samples cannot be used" in head and "data.strict = false" in head
    said = dict(line.strip().removeprefix("train.csv: ").split(": ", 1) for line in lines)
    assert said.keys() == {"one", "flat", "gap", "twice", "text", "slow"}
    for name, part in {
        "one": "a single value",
        "flat": "constant",
        "gap": "a gap from 2 to 6",
        "twice": "occurs twice",
        "text": '"x"',
        "slow": "steps of 2",
    }.items():
        assert part in said[name]
    data = build(tmp_path, **fields, strict=False)
    assert data.splits["train"].ids == ["g0", "g1", "g2"] and "left out" in data.report[0]


@pytest.mark.parametrize("missing", ["?", "NaN", "NA", "n/a", "Null", "None", "<NA>"])
def test_a_missing_label_is_no_class(missing, tmp_path):
    labels = ["a", "b", missing, "a", "b", "a"]
    rows = [f"s{i},{i},{i + 1},{i + 3}" for i in range(6)]
    with_labels = [f"{row},{label}" for row, label in zip(rows, labels, strict=True)]
    (tmp_path / "all.csv").write_text("\n".join(["id,v0,v1,v2,label", *with_labels]))
    (tmp_path / "bare.csv").write_text("\n".join(["id,v0,v1,v2", *rows]))
    named = [f"s{i},{label}" for i, label in enumerate(labels)]
    (tmp_path / "labels.csv").write_text("\n".join(["id,label", *named]))
    write_ts(tmp_path / "train.ts", made(6, 0), labels)
    np.savez(tmp_path / "x.npz", series=np.eye(6), labels=np.array(labels))
    head = "@relation x\n@attribute a real\n@attribute b real\n@attribute class {a,b}\n@data\n"
    cells = "\n".join(f"{i},{i + 1},{label}" for i, label in enumerate(labels))
    (tmp_path / "x.arff").write_text(f"{head}{cells}\n")
    (tmp_path / "x.tsv").write_text("".join(f"{x}\t1\t2\n" for x in labels))
    tables = {"bare.csv": "labels.csv"}
    for name in ("all.csv", "bare.csv", "train.ts", "x.npz", "x.arff", "x.tsv"):
        fields = {"train_file": name, "test_file": None, "labels_file": tables.get(name)}
        with pytest.raises(UserError, match="there is no label") as error:
            build(tmp_path, **fields)
        told = f'("{missing}" of {"s2" if name[-3:] == "csv" else "2"})'
        assert told in str(error.value) and "\n" not in str(error.value)
    data = build(tmp_path, train_file="all.csv", test_file=None, class_names=["a", "b", missing])
    assert tuple(data.class_names) == ("a", "b", missing)
    marks = [f"{row},{i % 2},{'01'[i % 3 > 0]}" for i, row in enumerate(rows)]
    marks[4] = f"{rows[4]},1,{missing}"
    (tmp_path / "marks.csv").write_text("\n".join(["id,v0,v1,v2,p,q", *marks]))
    for subtask in ("multilabel", "regression"):
        fields = {"train_file": "all.csv", "test_file": None, "subtask": subtask}
        with pytest.raises(UserError, match=r"there is no label \(.* of s2\)"):
            build(tmp_path, **fields)
        fields |= {"train_file": "marks.csv", "label_column": ["p", "q"]}
        with pytest.raises(UserError, match=r"there is no label \(.* of s4\)"):
            build(tmp_path, **fields)


def test_a_last_attribute_that_is_no_label_by_its_name_may_be_named(tmp_path):
    head = "@attribute a real\n@attribute b real\n@attribute age numeric\n@data\n"
    (tmp_path / "x.arff").write_text(head + "".join(f"{i},{2 * i + 1},{i}.5\n" for i in range(8)))
    fields = {"train_file": "x.arff", "test_file": None}
    with pytest.raises(UserError, match=r"or the last attribute in data.label_column where it is"):
        build(tmp_path, **fields)
    assert build(tmp_path, **fields, label_column="age").subtask == "regression"


def test_numbers_of_an_archive_are_classes_where_the_spec_says_so(tmp_path):
    head = "@attribute a real\n@attribute b real\n@attribute class numeric\n@data\n"
    rows = "".join(f"{i},{2 * i + 1},{1 + i % 2}\n" for i in range(8))
    (tmp_path / "x.arff").write_text(head + rows)
    fields = {"train_file": "x.arff", "test_file": None}
    assert build(tmp_path, **fields).subtask == "regression"
    data = build(tmp_path, **fields, subtask="multiclass")
    assert data.subtask == "multiclass" and data.class_names == ("1", "2")


def test_a_word_that_is_no_split_is_told_with_its_file(tmp_path):
    rows = [f"s{i},{i},{i + 1},{'ab'[i % 2]},{['train', 'valid'][i % 2]}" for i in range(6)]
    (tmp_path / "x.csv").write_text("\n".join(["id,v0,v1,label,split", *rows]))
    fields = {"train_file": None, "test_file": None, "series_file": "x.csv"}
    with pytest.raises(UserError, match=r"column split of \S*x\.csv: 'valid' \(3 samples\)"):
        build(tmp_path, **fields, split_source="csv")


def test_the_size_of_what_was_read_is_told(tmp_path):
    for ragged, size in ((False, "2 channels, 24 time points"), (True, "2 channels, ")):
        write_ts(tmp_path / "train.ts", made(6, 0, channels=2, ragged=ragged), list("ababab"))
        data = build(tmp_path, test_file=None)
        assert data.sizes_text.startswith(f"train 6; {size}")
    counts = sorted(one.shape[1] for one in made(6, 0, channels=2, ragged=True))
    assert data.sizes_text.endswith(f"; 2 channels, {counts[0]} to {counts[-1]} time points")


def test_series_of_other_channels_are_broken(tmp_path):
    series = [*made(3, 0, channels=2), *made(1, 1, channels=3)]
    write_ts(tmp_path / "train.ts", series, list("abab"))
    with pytest.raises(UserError, match="train.ts: 3: 3 channels, most have 2"):
        build(tmp_path, test_file=None)


def test_lengths_and_missing_values_make_masks(tmp_path):
    series = made(4, 0, ragged=True)
    series[1][:, 3:5] = np.nan
    write_ts(tmp_path / "train.ts", series, list("abab"))
    text = (tmp_path / "train.ts").read_text().replace("nan", "?")
    (tmp_path / "train.ts").write_text(text)
    source = build(tmp_path, test_file=None).splits["train"].source
    assert source.uniform is None
    batch = source.collate(source.fetch(np.arange(4)))
    lengths = [one.shape[1] for one in series]
    assert batch.shape == (4, 2, max(lengths))
    assert batch[:, 1].sum(1).tolist() == [n - 2 * (i == 1) for i, n in enumerate(lengths)]
    for row, length in zip(batch, lengths, strict=True):
        assert not row[:, length:].any()
    assert padded([np.ones((2, 1), np.float32)]).shape == (1, 2, 1)


@needs_aeon
@pytest.mark.parametrize("number", [0, 1, 17])
@pytest.mark.parametrize("name", ["GunPoint", "BasicMotions"])
def test_resamples_are_those_of_aeon(name, number):
    pytest.importorskip("aeon", minversion="1.4")
    resampling = pytest.importorskip("aeon.benchmarking.resampling")
    loaders = pytest.importorskip("aeon.datasets")
    folder = {"package": "aeon", "data_root_dir": "datasets/data", "problem": name}
    spec = SeriesData(**folder, resample=number, preparation=SeriesPreparation(normalize="none"))
    splits = build_data(spec, seed=0).splits
    train, test = (loaders.load_classification(name, split=part) for part in ("train", "test"))
    if number:
        parts = resampling.stratified_resample_data(*train, *test, random_state=number)
    else:
        parts = *train, *test
    for split, values in (("train", parts[0]), ("test", parts[2])):
        source = splits[split].source
        np.testing.assert_array_equal(
            source.fetch(np.arange(len(values))), values.astype(np.float32)
        )


@needs_aeon
def test_indices_of_resamples_equal_those_of_aeon():
    pytest.importorskip("aeon", minversion="1.4")
    resampling = pytest.importorskip("aeon.benchmarking.resampling")
    labels = np.random.default_rng(0).choice(["10", "2", "B", "a"], 60)
    labels[:8] = ["10", "2", "B", "a"] * 2
    train, test = labels[4:34], np.concatenate([labels[:4], labels[34:]])
    for number in range(1, 30):
        ours = resampled(list(train), list(test), number)
        lower = np.char.lower(train), np.char.lower(test)
        theirs = resampling.stratified_resample_data_indices(*lower, random_state=number)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match="a, b"):
        resampled(["a", "c"], ["b", "c"], 1)


# ------------------------------------------------------------------------------- whole commands

PROBE = """
[data]
dataset = "generic_series_dataset"
train_file = "train.ts"
test_file = "test.ts"
[task]
objective = "probe"
methods = ["minirocket", "hydra"]
result_plot = "none"
bootstrap = 0
[logger]
backend = "none"
"""


def command(root, text, *overrides, monkeypatch):
    """Exit code of a command in a folder."""
    monkeypatch.chdir(root)
    (root / "spec.toml").write_text(text)
    return main(["spec.toml", *(["--override", *overrides] if overrides else [])])


def test_a_probe_by_kernels_needs_no_val(root, monkeypatch, capsys):
    assert command(root, PROBE, monkeypatch=monkeypatch) == 0
    folder = root / "experiments" / "generic_series_dataset" / "spec" / "0"
    found = json.loads((folder / "metrics_probe.json").read_text())
    for method in ("minirocket", "hydra"):
        assert found[method]["test"]["metrics"]["acc"] == 1
        errors = [one["squared_error"] for one in found[method]["candidates"]]
        assert found[method]["chosen"]["lowest"] == min(errors)
        assert (folder / f"predictions_{method}_test.csv").is_file()
    assert command(root, PROBE, monkeypatch=monkeypatch) == 0
    assert "was finished before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('task.methods=["knn"]', "cannot judge series"),
        ("data.resample=30", "< 30"),
        ("data.problem=Nothing", "drop one of them"),
        ("data.test_file=none", "no val or test"),
        ("mode=umap", "umap reads a model out, and a probe keeps none"),
        ("mode=extract", "extract reads a model out, and a probe keeps none"),
        ("data.augmentation.train_policy=default_series_3", "train_policy: would be ignored"),
        ("data.preparation.step=1", "has no times"),
        ("data.train_file=absent.ts", "no such file"),
        ("data.package=no_such_package", "pip install"),
    ],
)
def test_mistakes_are_one_line(change, said, root, monkeypatch, capsys):
    assert command(root, PROBE, change, monkeypatch=monkeypatch) == 2
    assert said in capsys.readouterr().err


# ---------------------------------------------------------------------- one meaning in all files


def write_npz(path, labels, seed=0, **entries):
    """Series of two classes with labels as given."""
    np.savez(path, series=np.stack(made(len(labels), seed)), labels=labels, **entries)


def test_labels_and_ids_as_byte_strings_are_text(tmp_path):
    names = np.array(["käse", "brot"] * 8)
    encoded = np.char.encode(names, "utf-8")
    ids = np.array([f"ä{number}".encode() for number in range(16)])
    write_npz(tmp_path / "train.npz", encoded, ids=ids, groups=ids)
    write_npz(tmp_path / "test.npz", names, 1)
    data = build(tmp_path, train_file="train.npz", test_file="test.npz")
    assert data.class_names == ("brot", "käse")
    assert data.splits["train"].ids[0] == data.splits["train"].groups[0] == "ä0"
    for split in data.splits.values():
        assert [data.class_names[target] for target in split.targets] == names.tolist()
    write_npz(tmp_path / "train.npz", np.array([b"k\xe4se"] * 16))
    with pytest.raises(UserError, match=r"labels hold b'k\\xe4se', which is not UTF-8"):
        build(tmp_path, train_file="train.npz", test_file="test.npz")


def test_labels_of_no_length_are_refused_and_arrays_resampled(tmp_path):
    np.savez(tmp_path / "bad.npz", series=np.ones((3, 5)), labels=np.array("cat"))
    with pytest.raises(UserError, match=r"labels of shape \(\) for 3 series"):
        build(tmp_path, train_file="bad.npz", test_file="bad.npz")
    write_npz(tmp_path / "train.npz", np.array(["a", "b"] * 8))
    write_npz(tmp_path / "test.npz", np.array(["a", "b"] * 4), 1)
    data = build(tmp_path, train_file="train.npz", test_file="test.npz", resample=1)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 16, "test": 8}


def write_long(path, columns=("x", "y"), labels=lambda i, t: "ab"[i % 2], ids=lambda i, t: f"s{i}"):
    """Series with a row a time point: channel x is slow where y is fast."""
    waves = {"x": (0.4, 1.2), "y": (1.2, 0.4)}
    rows = [",".join(("id", "time", *columns, "label"))]
    for i in range(12):
        for t in range(20):
            values = [f"{np.sin(waves[name][i % 2] * t + i):.5f}" for name in columns]
            rows.append(",".join((ids(i, t), str(t), *values, labels(i, t))))
    path.write_text("\n".join(rows), encoding="utf-8")


def test_both_unicode_forms_of_a_label_or_an_id_are_one(tmp_path):
    forms = [unicodedata.normalize(form, "ä") for form in ("NFC", "NFD")]
    write_long(tmp_path / "a.csv", labels=lambda i, t: forms[t % 2] if i % 2 else "b")
    write_long(tmp_path / "b.csv", ids=lambda i, t: f"{forms[t % 2]}{i}")
    data = build(tmp_path, train_file="a.csv", test_file=None)
    assert data.sizes_text == "train 12; 2 channels (x, y), 20 time points"
    assert data.class_names == ("b", forms[0]) and len(data.splits["train"]) == 12
    assert len(build(tmp_path, train_file="b.csv", test_file=None).splits["train"]) == 12
    for form in forms:  # of a column
        path = tmp_path / "c.csv"
        write_long(path)
        path.write_text(path.read_text().replace("label", form), encoding="utf-8")
        for named in forms:
            data = build(tmp_path, train_file="c.csv", test_file=None, label_column=named)
            assert data.class_names == ("a", "b") and data.samples.value_columns == ("x", "y")


def test_channels_go_by_name(tmp_path):
    """Columns in another order are the same channels; the spec's order of them counts."""
    write_long(tmp_path / "xy.csv")
    write_long(tmp_path / "yx.csv", ("y", "x"))

    def series(data, split):
        return data.splits[split].source.fetch(np.arange(12))

    files = {"train_file": "xy.csv", "test_file": "yx.csv"}
    for columns in ((), ("x", "y")):
        data = build(tmp_path, **files, value_columns=columns)
        np.testing.assert_array_equal(series(data, "test"), series(data, "train"))
        assert data.samples.value_columns == ("x", "y")
        assert any("matched by name" in line for line in data.report) == (columns == ())
    turned = build(tmp_path, **files, value_columns=("y", "x"))
    np.testing.assert_array_equal(series(turned, "train"), series(data, "train")[:, ::-1])
    assert turned.samples.value_columns == ("y", "x")
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "a.csv").write_text("x,y\n1,5\n2,4\n3,4\n")
    (folder / "b.csv").write_text("y,x\n5,1\n4,2\n4,3\n")
    (tmp_path / "labels.csv").write_text("id,label\na,p\nb,q\n")
    data = build(tmp_path, train_file="one", test_file=None, labels_file="labels.csv")
    first, second = data.splits["train"].source.fetch(np.arange(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("first", "second", "cure"),
    [
        ("x,y", "y,z", "write the same names to both files"),
        ("x,y", "x,z", "or take x alone in data.value_columns"),
        ("x,y", "x,y,z", r"name the values in data.value_columns \(x, y\)"),
        ("x,y,z", "x,y", "write the same names"),
        ("x,y", "Y,z", "write the same names"),
        ("x,y", "Y,X", None),
        ("x,y", "X,Y", None),
        ("x,X", "X,x", None),
        ("x,y", "a,b", None),
    ],
)
@pytest.mark.parametrize("kind", ["long", "folder"])
def test_names_some_of_which_are_the_same_in_both_files_are_refused(
    kind, first, second, cure, tmp_path
):
    """Taken by their places, one channel would stand for another."""
    rng = np.random.default_rng(0)
    for name, head in (("a", first), ("b", second)):
        rows = [",".join(map(str, rng.normal(size=head.count(",") + 1))) for _ in range(8)]
        if kind == "long":
            lines = [f"s{k // 4},{k % 4},{row},pq"[:-1] for k, row in enumerate(rows)]
            (tmp_path / name).write_text("\n".join([f"id,time,{head},label", *lines]))
            (tmp_path / name).rename(tmp_path / f"{name}.csv")
        else:
            (tmp_path / name).mkdir()
            for k in range(2):
                part = "\n".join([head, *rows[4 * k : 4 * k + 4]])
                (tmp_path / name / f"s{k}.csv").write_text(part)
    (tmp_path / "labels.csv").write_text("id,label\ns0,p\ns1,q\n")
    end = ".csv" if kind == "long" else ""
    fields = {"train_file": f"a{end}", "test_file": f"b{end}", "labels_file": "labels.csv"}
    if cure is not None:
        with pytest.raises(UserError, match=cure) as error:
            build(tmp_path, **fields)
        told = str(error.value)
        assert "\n" not in told and first.replace(",", ", ") in told
        assert second.replace(",", ", ") in told and "only some are the same" in told
        return
    data = build(tmp_path, **fields)
    (note,) = [line for line in data.report if "the columns are" in line] or [""]
    by_name = {"Y,X": True, "X,x": True, "a,b": False}.get(second)
    assert note.endswith("matched by name") == (by_name is True)
    assert note.endswith("in which they stand") == (by_name is False)


@pytest.mark.parametrize(
    ("first", "second", "how"),
    [
        ("0.0 0.5 1.0 1.5", "0 0.5 1 1.5", "same"),
        ("0 0.5 1 1.5", "0.00 0.50 1.00 1.50 2.00", "same"),
        ("0 1 2 3", "0.0 1.0 2.0 3.0", "same"),
        ("-0.0 1e1 2e1", "0 10 20", "same"),
        ("0.0 0.333333 0.666667 1.0", "0 0.3333333333 0.6666666667 1", "same"),
        (
            "1700000000000000000 1700000000000000001",
            "1700000000000000000 1700000000000000001",
            "same",
        ),
        ("2024-01-01 2024-01-02", "2024-01-01T00:00 2024-01-02T00:00 2024-01-03T00:00", "same"),
        ("0 1 2 3", "1 2 3 4", "other"),  # pandas and R
        ("1 2 3 4", "0.0 1.0 2.0", "other"),
        ("0.0 0.5 1.0 1.5", "0 1 2 3", "other"),  # an index is no time
        ("2024-01-01 2024-01-02 2024-01-03", "2024-01-02 2024-01-03 2024-01-04", "other"),
        ("2024-01-01 2024-01-02", "0 1", "other"),
        ("0.0 0.5 1.0 1.5", "0.50 1.00 1.50 2.00", "mixed"),
        ("0 1 2 3", "2 3 4 5", "mixed"),
        ("1 2 3 4", "2 3 4 5", "mixed"),
        ("0.5 1.0", "1 0.50", "turned"),
        ("t0 t1 t2", "t1 t2 t3", "mixed"),
        ("t0 t1", "T0 T1 T2", "same"),
    ],
)
def test_time_points_are_compared_as_the_numbers_and_dates_that_they_are(first, second, how):
    first, second = first.split(), second.split()
    assert order_of_names(first, second, is_wide=True) == how
    assert order_of_names(second, first, is_wide=True) == how
    if how == "same" and len(first) == len(second) and first[0][0] != "t":  # names of channels
        assert (order_of_names(first, second, is_wide=False) == "same") == (first == second)


@pytest.mark.parametrize(
    ("first", "second", "note"),
    [
        ("0.0 0.5 1.0 1.5 2.0", "0 0.5 1 1.5 2", ""),
        ("0 1 2 3 4", "1 2 3 4 5", "taken in the order in which they stand"),
        ("2024-01-01 2024-01-02 2024-01-03", "2024-01-02 2024-01-03 2024-01-04", "taken in the"),
    ],
)
@pytest.mark.parametrize("is_bare", [False, True])
def test_a_model_takes_time_points_in_another_writing(tmp_path, first, second, note, is_bare):
    """Also of a table of nothing but time points, whose first line might be values."""
    first, second = first.split(), second.split()
    rng = np.random.default_rng(0)

    def table(name, names, bare):
        values = rng.normal(size=(4, len(names)))
        head = names if bare else ["id", "label", *names]
        rows = [
            ",".join([*([] if bare else [f"s{k}", "pq"[k % 2]]), *(f"{x:.2f}" for x in row)])
            for k, row in enumerate(values)
        ]
        (tmp_path / name).write_text("\n".join([",".join(head), *rows]))
        return values

    table("a.csv", first, bare=False)
    values = table("b.csv", second, bare=is_bare)
    data = build(tmp_path, train_file="a.csv", test_file=None if is_bare else "b.csv")
    found = [line for line in data.report if "the columns are" in line]
    assert not found if is_bare or not note else note in found[0]
    spec = SeriesData(data_root_dir=str(tmp_path))
    split, report = unlabelled_series(str(tmp_path / "b.csv"), data.samples, spec)
    assert bool(note) == any("taken in the order" in line for line in report)
    assert len(split) == 4
    series = split.source.fetch(np.arange(4))[:, 0]
    assert np.corrcoef(series[1], values[1])[0, 1] > 0.999


def test_time_points_some_of_which_are_the_same_are_refused(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 6))

    def table(name, head):
        rows = [",".join([f"s{k}", "pq"[k % 2], *map(str, row)]) for k, row in enumerate(values)]
        (tmp_path / name).write_text("\n".join([f"id,label,{head}", *rows]))

    table("a.csv", "t0,t1,t2,t3,t4,t5")
    for head in ("age,t0,t1,t2,t3,t4", "t1,t2,t3,t4,t5,t6"):
        table("b.csv", head)
        with pytest.raises(UserError, match="only some are the same|named unlike"):
            build(tmp_path, train_file="a.csv", test_file="b.csv")
    table("b.csv", "p0,p1,p2,p3,p4,p5")
    (note,) = build(tmp_path, train_file="a.csv", test_file="b.csv").report[:1]
    assert "taken in the order in which they stand" in note
    values = values[:, :5]
    table("b.csv", "t0,t1,t2,t3,t4")  # shorter ones
    data = build(tmp_path, train_file="a.csv", test_file="b.csv")
    assert not any("columns" in line for line in data.report)
    assert data.samples.time_points == ("t0", "t1", "t2", "t3", "t4", "t5")


def test_time_points_of_wide_tables_go_by_name(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 12))
    for name, order in (("a", np.arange(12)), ("b", np.argsort([str(i) for i in range(12)]))):
        lines = [",".join(["id", "label", *(f"v{i}" for i in order)])]
        lines += [",".join([f"s{i}", "pq"[i % 2], *map(str, values[i, order])]) for i in range(4)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    data = build(tmp_path, train_file="a.csv", test_file="b.csv")
    found = [data.splits[name].source.fetch(np.arange(4)) for name in ("train", "test")]
    np.testing.assert_array_equal(*found)
    assert data.samples.value_columns == ()  # they are no channels


def test_wide_tables_are_resampled_by_their_times_as_long_ones(tmp_path):
    """Whichever time points the files have."""
    rng = np.random.default_rng(0)
    heads = {"train": [0, 10, 1.5, 2.5, 4, 7], "test": [0, 1, 2, 3, 8]}
    for name, head in heads.items():
        values = rng.standard_normal((4, len(head)))
        rows = ["id,label," + ",".join(map(str, head))]
        long = ["id,label,time,x"]
        for i, row in enumerate(values):
            rows.append(f"{name}{i},{'ab'[i % 2]}," + ",".join(map(repr, row.tolist())))
            long += [f"{name}{i},{'ab'[i % 2]},{t},{x}" for t, x in zip(head, row, strict=True)]
        (tmp_path / f"{name}.csv").write_text("\n".join(rows) + "\n")
        (tmp_path / f"{name}_long.csv").write_text("\n".join(long) + "\n")
    preparation, found = SeriesPreparation(step=0.5), {}
    for end in ("", "_long"):
        files = {f"{name}_file": f"{name}{end}.csv" for name in heads}
        found[end] = build(tmp_path, preparation=preparation, **files)
        assert found[end].samples.step == 0.5 and not found[end].samples.time_points
    for name in heads:
        one, other = (data.splits[name].source.fetch(np.arange(4)) for data in found.values())
        for wide, long in zip(one, other, strict=True):
            np.testing.assert_array_equal(wide, long)
    spec = SeriesData(train_file="train.csv")
    new, _ = unlabelled_series(str(tmp_path / "test.csv"), found[""].samples, spec)
    expected = found[""].splits["test"].source.fetch(np.arange(4))
    np.testing.assert_array_equal(new.source.fetch(np.arange(4)), expected)
    with pytest.raises(UserError, match="irregular times, steps from 1 to 3: set data.preparation"):
        build(tmp_path, train_file="train.csv", test_file="test.csv")


def test_groups_that_are_one_number_are_one(tmp_path):
    series = np.random.default_rng(0).standard_normal((4, 9))
    for name, groups in (("train", np.arange(4)), ("test", np.arange(3.0, 7))):
        np.savez(tmp_path / f"{name}.npz", series=series, labels=[0, 1, 0, 1], groups=groups)
    files = {"train_file": "train.npz", "test_file": "test.npz", "group_column": "subject"}
    with pytest.raises(UserError, match=r"1 groups are in more than one split: 3 \(train: 3, test"):
        build(tmp_path, **files)
    np.savez(tmp_path / "test.npz", series=series, labels=[0, 1, 0, 1], groups=np.arange(4) + 0.5)
    assert build(tmp_path, **files).splits["test"].groups == ["0.5", "1.5", "2.5", "3.5"]


def test_a_table_that_counts_rows_from_1_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).standard_normal((6, 9)))
    table = tmp_path / "labels.csv"
    spec = SeriesData(
        data_root_dir=str(tmp_path),
        split_source="kfold",
        n_folds=3,
        series_file="a.npy",
        labels_file=str(table),
    )
    for ids in (range(1, 7), range(6), range(1, 6)):  # the last without the first series
        table.write_text("id,label\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in ids))
        if 6 in ids:
            with pytest.raises(UserError, match="6 series without ids, .* no 0: write 0 to 5"):
                build_data(spec, seed=0)
        else:
            data = build_data(spec, seed=0)
            found = [identity for split in data.splits.values() for identity in split.ids]
            assert set(map(int, found)) == set(ids)


def test_whole_numbers_of_archives_are_one_class_however_written(root):
    write_ts(root / "train.ts", made(16, 0), ["1", "2"] * 8)
    values = ["\t".join(map(str, one[0])) for one in made(10, 1)]
    labels = ["1.0000000e+00", "2.0"] * 5
    lines = [f"{label}\t{row}" for label, row in zip(labels, values, strict=True)]
    (root / "test.tsv").write_text("\n".join(lines))
    data = build(root, test_file="test.tsv")
    assert data.class_names == ("1", "2") and data.splits["test"].targets.tolist() == [0, 1] * 5
    cells = ["1.5", "01", "1_0", "1.0e-1", "x1.0", "-1.0", "1700000001.0"]
    assert list(map(archive_label, cells)) == [*cells[:5], "-1", "1700000001"]


def test_files_without_ids_cannot_share_a_table(root):
    for name, count in (("train", 16), ("test", 10)):
        np.save(root / f"{name}.npy", np.stack(made(count, 0)))
    rows = [f"{number},{'ab'[number % 2]}" for number in range(16)]
    (root / "labels.csv").write_text("\n".join(["id,label", *rows]))
    files = {"train_file": "train.npy", "labels_file": "labels.csv"}
    with pytest.raises(UserError, match=r"has no ids, so row '0' of data.labels_file"):
        build(root, **files, test_file="test.npy")
    whole = build(root, train_file=None, test_file=None, series_file="train.npy", fold=0,
                  labels_file="labels.csv", split_source="kfold", n_folds=4)  # fmt: skip
    assert whole.class_names == ("a", "b")


def test_a_val_that_is_drawn_divides_no_group(root):
    groups = np.array([f"p{number // 4}" for number in range(40)])
    write_npz(root / "train.npz", np.array(["a", "b"] * 20), groups=groups)
    files = {"train_file": "train.npz", "test_file": None, "group_column": "groups"}
    data = build(root, **files, val_fraction=0.3)
    drawn = {name: set(split.groups) for name, split in data.splits.items()}
    assert len(drawn["val"]) == 3 and len(drawn["train"]) == 7
    assert not drawn["val"] & drawn["train"]
    assert sum(map(len, data.splits.values())) == 40
    with pytest.raises(UserError, match="train or val of 10 groups empty"):
        build(root, **files, val_fraction=0.01)
    write_npz(root / "test.npz", np.array(["a", "b"] * 20), 1, groups=np.char.add("q", groups))
    files |= {"test_file": "test.npz"}
    assert len(build(root, **files).splits["test"]) == 40
    with pytest.raises(UserError, match="resample = 1 draws train and test sample by sample"):
        build(root, **files, resample=1)


SMALL_SERIES = (
    """
[data]
dataset = "generic_series_dataset"
data_root_dir = "ROOT"
[model.encoder]
encoder_type = "inception_time"
depth = 3
filters = 4
"""
    + EPOCH
)


def test_a_checkpoint_knows_the_step_of_its_times(command, refused, tmp_path):
    """Series of another rate are refused one by one, or left out; without times they are taken. Of
    a model that resamples they are resampled."""
    write_long(tmp_path / "one.csv", ("x", "y"))
    rows = [line.split(",") for line in (tmp_path / "one.csv").read_text().splitlines()]
    place = rows[0].index("time")
    for name, step in (("four", 4.0), ("near", 1.0005)):
        moved = [[*r[:place], str(float(r[place]) * step), *r[place + 1 :]] for r in rows[1:]]
        lines = [",".join(row) for row in [rows[0], *moved]]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    spec = SMALL_SERIES.replace("ROOT", str(tmp_path))
    spec = spec.replace("[model.encoder]", 'train_file = "one.csv"\n[model.encoder]')
    run = command(spec=spec)
    best = f"infer.checkpoint={run.path / 'checkpoints' / 'best.pt'}"
    asked = ["mode=infer", best, f"infer.output_dir={tmp_path / 'out'}"]
    told = refused(*asked, f"infer.input={tmp_path / 'four.csv'}", spec=spec, lines=13)
    assert "steps of 4 between its times, the model takes 1: train with data.prep" in told
    told = refused(*asked, "data.train_file=none", "data.test_file=four.csv", spec=spec)
    assert "was trained on series of step 1.0, data set" in told and "has step 4.0" in told
    for name in ("one", "near"):
        command(*asked, f"infer.input={tmp_path / name}.csv", spec=spec)
    resampled = command("data.preparation.step=2", "name=two", spec=spec)
    best = f"infer.checkpoint={resampled.path / 'checkpoints' / 'best.pt'}"
    command("mode=infer", best, asked[2], f"infer.input={tmp_path / 'four.csv'}", spec=spec)


def test_one_file_of_a_folder_is_read_as_the_folder(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "one"
    folder.mkdir()
    series = rng.normal(size=(3, 2, 9))
    for k, one in enumerate(series):
        rows = [f"{t},{x},{y}" for t, (x, y) in enumerate(one.T.tolist())]
        (folder / f"p{k}.csv").write_text("\n".join(["time,x,y", *rows]))
        np.save(tmp_path / f"p{k}.npy", one)
    (tmp_path / "labels.csv").write_text("id,label\np0,a\np1,b\np2,a\n")
    fields = {"train_file": "one", "test_file": None, "labels_file": "labels.csv"}
    for marks in (False, True):
        how = SeriesPreparation(mask_channels=marks)
        data = build(tmp_path, **fields, preparation=how)
        (tmp_path / "turned.csv").write_text("y,x\n" + "\n".join(
            f"{y},{x}" for x, y in series[1].T.tolist()
        ))  # fmt: skip
        wanted = data.splits["train"].source.fetch(np.array([1]))
        for path in (folder / "p1.csv", tmp_path / "p1.npy", tmp_path / "turned.csv"):
            split, notes = unlabelled_series(str(path), data.samples, SeriesData())
            np.testing.assert_array_equal(split.source.fetch(np.array([0])), wanted)
            assert split.ids == [path.stem] and bool(notes) == (path.stem == "turned")
    np.save(tmp_path / "all.npy", series)
    assert len(unlabelled_series(str(tmp_path / "all.npy"), data.samples, SeriesData())[0]) == 3
    (tmp_path / "other.csv").write_text("time,a,b\n0,1,2\n1,2,3\n")
    with pytest.raises(UserError, match="or put files of one series each into a folder"):
        unlabelled_series(str(tmp_path / "other.csv"), data.samples, SeriesData())
    np.save(tmp_path / "flat.npy", series[0, 0])
    with pytest.raises(UserError, match=r"flat.npy: flat: 1 channels|flat: 2 channels, the model"):
        unlabelled_series(str(tmp_path / "flat.npy"), data.samples, SeriesData())


def test_a_checkpoint_knows_its_channels(command, refused, tmp_path):
    for name, columns in (("xy", ("x", "y")), ("yx", ("y", "x")), ("ab", ("x", "y"))):
        write_long(tmp_path / f"{name}.csv", columns)
    text = (tmp_path / "ab.csv").read_text().replace("x,y", "a,b", 1)
    (tmp_path / "ab.csv").write_text(text)
    spec = SMALL_SERIES.replace("ROOT", str(tmp_path))
    run = command("data.train_file=xy.csv", spec=spec)
    asked = [
        "mode=infer", f"infer.checkpoint={run.path / 'checkpoints' / 'best.pt'}",
        f"infer.output_dir={tmp_path / 'out'}", "data.train_file=none",
    ]  # fmt: skip
    scores = []
    assert "set data.value_columns" in refused(*asked, "data.test_file=yx.csv", spec=spec)
    for name, head in (("yz", "y,z"), ("xz", "x,z")):
        (tmp_path / f"{name}.csv").write_text(text.replace("a,b", head, 1))
        told = refused(*asked, f"data.test_file={name}.csv", spec=spec)
        assert "of value_columns x, y, data" in told and "set data.value_columns" in told
        given = ["data.test_file=xy.csv", f"infer.input={tmp_path / name}.csv"]
        told = refused(*asked, *given, spec=spec)
        assert "only some are the same: write the same names to both" in told
        extract = ["mode=extract", asked[1].replace("infer", "extract"), "data.train_file=none"]
        extract += [f"data.test_file={name}.csv", "extract.split=test"]
        assert "set data.value_columns" in refused(*extract, spec=spec)
    ways = [["data.test_file=xy.csv"], ["data.test_file=ab.csv"],
            ["data.test_file=yx.csv", 'data.value_columns=["x","y"]'],
            ["data.test_file=xy.csv", f"infer.input={tmp_path / 'yx.csv'}"]]  # fmt: skip
    for way in ways:
        told = command(*asked, *way, spec=spec)
        assert ("matched by name" in told.out) == (way is ways[-1])
        assert ("columns a, b taken for x, y of" in told.out) == (way is ways[1])
        (path,) = (tmp_path / "out").glob("predictions*.csv")
        rows = [line.split(",")[-2:] for line in path.read_text().splitlines()]
        scores.append(rows[1:])
        path.unlink()
    assert all(found == scores[0] for found in scores)
