"""Tables: how files are found, and what CSV, JSON and split files may look like."""

import csv
import json
import os

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from glovita_lib.data_splits import read_splits
from glovita_lib.data_tables import (
    Problems,
    SampleFolder,
    csv_labels,
    datalist_labels,
    json_labels,
    walk,
)
from glovita_lib.errors import UserError
from glovita_lib.files import read_cells, read_csv

EXTS = ("png", "jpg")
NAMES = ["a.png", "cat/1.png", "cat/2.PNG", "dog/1.png", "train/x.jpg"]


@pytest.fixture
def images(tmp_path):
    """Digits under NAMES below images/, one beside it, and what does not count."""
    digits = load_digits().images.astype("uint8")
    for number, name in enumerate([*NAMES, "cat/.hidden.png", ".cache/3.png", "../other/b.png"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits[number]).save(path)
    (tmp_path / "images/notes.txt").write_text("no image")
    folder = tmp_path / "images"
    return SampleFolder(folder, walk(folder, EXTS))


def test_walk_finds_images_in_stable_order(images, tmp_path):
    assert images.ids == sorted(NAMES)
    assert walk(images.folder, (".JPG",)) == ["train/x.jpg"]
    (tmp_path / "images/loop").symlink_to(tmp_path / "images")  # does not go round for ever
    (tmp_path / "images/far").symlink_to(tmp_path / "other")
    assert walk(images.folder, EXTS) == sorted([*NAMES, "far/b.png"])
    with pytest.raises(UserError, match="nowhere: no such folder"):
        walk(tmp_path / "nowhere", EXTS)


def test_a_line_end_in_the_name_of_a_file_is_said_to_be_one(tmp_path):
    """Before its label is looked for, which tables of other systems end a line at."""
    with pytest.raises(UserError, match=r'names of image files with line ends.*"n40\\u000d.png"'):
        SampleFolder(tmp_path, ["n1.png", "n40\r.png"])


def test_a_linked_folder_is_there_under_each_of_its_names(images, tmp_path):
    """A class that train and test share, a split that is a link to another one."""
    folder = tmp_path / "images"
    (folder / "train/dog").symlink_to(folder / "dog")
    (folder / "a_link").symlink_to(folder / "train")
    (folder / "dog/up").symlink_to(folder)  # goes back to where it is
    linked = ["a_link/dog/1.png", "a_link/x.jpg", "train/dog/1.png"]
    assert walk(folder, EXTS) == sorted([*NAMES, *linked])


def test_a_folder_that_cannot_be_listed_is_an_error(images, tmp_path, monkeypatch):
    folder, scandir = tmp_path / "images", os.scandir

    def refusing(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError) as caught:
        walk(folder, EXTS)
    head, line = str(caught.value).splitlines()
    assert head.startswith("1 folder that cannot be listed; what is in them would be missing")
    assert line == f"  {folder / 'cat'} (Permission denied)"
    report = []
    assert walk(folder, EXTS, report=report) == ["a.png", "dog/1.png", "train/x.jpg"]
    assert report == [f"1 folder that cannot be listed left out:\n{line}"]
    for number in range(30):
        (folder / f"{number}cat").mkdir()
    walk(folder, EXTS, report=report)  # each of many has its line
    assert len(report[1].splitlines()) == 32 and "31 folders that" in report[1]


@pytest.mark.parametrize("count", [1, 20, 21, 300])
def test_all_samples_that_cannot_be_used_are_named(count):
    lines = [f"  v{number}: cut off" for number in range(count)]
    noun = "volume" if count == 1 else "volumes"
    for strict in (True, False):
        problems, report = Problems(strict, "volume"), []
        for number in range(count):
            problems.add(f"v{number}", "cut off")
        if not strict:
            problems.settle(report)
            assert report == ["\n".join([f"{count} {noun} left out:", *lines])]
            assert problems.of_new(count + 1) == report
        for raising in (problems.settle if strict else None, problems.of_new):
            if raising is None:
                continue
            with pytest.raises(UserError) as caught:
                raising(report if raising == problems.settle else count)
            head, *rest = str(caught.value).splitlines()
            assert head.startswith(f"{count} {noun} ") and head.endswith(":")
            again = [head[:-1]] if count > 20 else []  # a terminal shows the end
            assert rest == [*lines, *again]


@pytest.mark.parametrize("name", ["train/two", "test", "train/dog/more.2024"])
@pytest.mark.parametrize("where", ["missing", "itself", "below a file"])
def test_a_link_to_what_is_not_there_may_be_a_folder_of_images(images, tmp_path, name, where):
    """A class or a split on a disk that is not mounted."""
    link = images.folder / name
    link.parent.mkdir(exist_ok=True)
    target = {
        "missing": tmp_path / "nodisk/two",
        "itself": link,
        "below a file": images.folder / "notes.txt/two",
    }[where]
    link.symlink_to(target)
    with pytest.raises(UserError) as caught:
        walk(images.folder, EXTS)
    said = str(caught.value)
    assert said.startswith("1 folder that cannot be listed; ")
    assert f"mend or remove them:\n  {link} (a link to {target}: " in said
    report = []
    assert walk(images.folder, EXTS, report=report) == sorted(NAMES)
    assert len(report) == 1 and str(link) in report[0] and "left out:\n" in report[0]


def test_a_link_with_the_suffix_of_an_image_is_an_image_wherever_it_leads(images, tmp_path):
    (images.folder / "cat/9.PNG").symlink_to(tmp_path / "nodisk/9.png")
    (images.folder / ".hidden").symlink_to(tmp_path / "nodisk")
    (images.folder / "link.txt").symlink_to(images.folder / "notes.txt")
    assert walk(images.folder, EXTS) == sorted([*NAMES, "cat/9.PNG"])


@pytest.mark.parametrize("name", NAMES)
def test_a_path_in_a_table_is_that_of_the_file(images, name):
    assert images.find(name) == images.find(f"./{name}") == images.find(f".//{name}") == name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cat\\1.png", 'did you mean "cat/1.png"?'),
        (" cat/1.png ", 'did you mean "cat/1.png"?'),
        ("images/cat/1.png", 'did you mean "cat/1.png"?'),
        ("cat/1", 'did you mean "cat/1.png"?'),
        ("cat/1.jpg", 'did you mean "cat/1.png"?'),
        ("images/cat/2", 'did you mean "cat/2.PNG"?'),
        ("cat/2.png", 'did you mean "cat/2.PNG"?'),
        ("dgo/1.png", 'did you mean "cat/1.png"?'),  # the first of two equally near
        ("x.jpg", 'did you mean "train/x.jpg"?'),
        ("/somewhere/else/dog/1.png", 'did you mean "dog/1.png"?'),
        ("trian/xx.jpg", 'did you mean "train/x.jpg"?'),
        ("cat/../a.png", 'did you mean "a.png"?'),
        ("../other/b.png", "no image below"),
        ("notes.txt", "with a suffix of data.allowed_exts"),
        ("cat/.hidden.png", "no image below"),
        ("cat/3.png", ""),  # no misspelt 1 or 2
        ("cat", ""),
        ("", ""),
    ],
)
def test_other_paths_are_no_image_and_the_near_one_is_offered(images, name, hint):
    assert images.find(name) is None
    assert hint in images.hint(name) and bool(hint) == bool(images.hint(name))


def test_absolute_paths_are_no_image(images, tmp_path):
    hints = {"images/dog/1.png": 'did you mean "dog/1.png"?', "other/b.png": "no image below"}
    for path, hint in hints.items():
        name = str(tmp_path / path)
        assert images.find(name) is None and hint in images.hint(name)


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_csv_separators_quotes_and_byte_order_marks(tmp_path, mark):
    path = tmp_path / "a.csv"
    text = f'path{mark} label \na.png{mark}"x{mark}y"\n\n"b.png"{mark} "" \n'
    path.write_text(text.replace(' "" ', '""'), "utf-8-sig")
    assert read_csv(path, ["path"]) == [
        {"path": "a.png", "label": f"x{mark}y"},
        {"path": "b.png", "label": ""},
    ]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("other", [",", ";", "\t"])
def test_separators_inside_of_quotes_count_for_nothing(tmp_path, mark, other):
    """Names of taxonomies hold semicolons: k__B;p__F;c__C."""
    path, name = tmp_path / "a.csv", other.join(["k__B", "p__F", "c__C", "o__L", "f__D"])
    path.write_text(f'id{mark}label{mark}"p_{name}"\na{mark}"{name}"{mark}1\n')
    header = ["id", "label", f"p_{name}"]
    assert read_cells(path, ["id", "label"]) == (header, [["a", name, "1"]])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label\na,b\0\n", "line 2: a NUL character"),
        ("", "no header"),
        ("path,lable\n", 'no column "label"; did you mean "lable"\\?; columns are path, lable'),
        ("path,label,label\n", 'several columns are named "label"'),
        ("path,label\na.png,1,2\n", "line 2: 3 cells, the header has 2"),
        ('path,label\n"a.png,1\n', "not valid CSV"),
        (b"path,label\n\xff,1\n", "not UTF-8 at byte 11"),
    ],
)
def test_bad_csv_files(tmp_path, text, said):
    path = tmp_path / "a.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said):
        read_csv(path, ["path", "label"])


def table_of(images, path, **columns):
    defaults = {"path_columns": ("path",), "label_column": "label"}
    defaults |= {"group_column": None, "split_column": None}
    return csv_labels(path, images, **(defaults | columns))


def test_csv_labels(images, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("path,label,n,who,part\ncat/1.png,x,3,p1,train\nmissing.png,y,4,p2,val\n")
    table = table_of(images, path, group_column="who", split_column="part")
    assert table.labels == {"cat/1.png": "x"} and list(table.missing) == ["missing.png"]
    assert table.groups == {"cat/1.png": "p1"} and table.splits == {"cat/1.png": "train"}
    assert table_of(images, path, label_column=("n", "label")).labels == {"cat/1.png": ("3", "x")}
    path.write_text("path,label\ncat/1.png,x\n./cat/1.png,x\n")
    assert table_of(images, path).labels == {"cat/1.png": "x"}
    path.write_text("path,label\ncat/1.png,x\n./cat/1.png,y\n")
    with pytest.raises(UserError, match="./cat/1.png has two values of label: 'x' and 'y'"):
        table_of(images, path)


def test_json_labels(images, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"cat/1.png": [0, 1], "./dog/1.png": None, "no.png": 3}))
    table = json_labels(path, images)
    assert table.labels == {"cat/1.png": [0, 1], "dog/1.png": None} and list(table.missing) == [
        "no.png"
    ]
    for content, said in (("[1]", "holds a list"), ("{", "a.json, line 1: not valid JSON")):
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            json_labels(path, images)


BAD = {"a\rb": "a\\u000db", "a\nb": "a\\u000ab", "a\r\nb": "a\\u000d\\u000ab"}
BAD |= {"a\tb": "a\\u0009b", "a\x1bb": "a\\u001bb", "a\x7fb": "a\\u007fb"}


def refused_name(read, *arguments, **options):
    """What is said of a name that is not one line of text."""
    with pytest.raises(UserError) as caught:
        read(*arguments, **options)
    said = str(caught.value)
    assert "with line ends or other control characters" in said and said.isprintable()
    return said


@pytest.mark.parametrize(("name", "shown"), BAD.items())
def test_names_in_tables_are_one_line_of_text(images, tmp_path, name, shown):
    """Else a line that names one breaks, or overwrites what stands before it."""
    path = tmp_path / "a.json"
    good = ["cat/1.png", "dog/1.png"]
    for content, fold, what in (
        ({"train": [*good, name], "val": ["a.png"]}, 0, 'paths or ids of "train"'),
        ([{"train": good}, {"train": good, "test": [name]}], 1, 'paths or ids of "test"'),
        ({"0": good, "1": ["x"], "2": [name]}, 0, 'paths or ids of "2"'),
        ({"train": good, name: ["a.png"]}, 0, "names of splits or folds"),
        ({name: {"train": good}}, 0, "names of splits or folds"),
        ({"0": {"train": good, name: []}}, 0, "names of splits"),
    ):
        path.write_text(json.dumps(content))
        said = refused_name(read_splits, path, fold)
        assert said.startswith(f"{path}: {what} with") and f'"{shown}"' in said
    path.write_text(json.dumps({"cat/1.png": 1, name: 2}))
    assert f"{path}: paths with" in (said := refused_name(json_labels, path, images))
    assert f'"{shown}"' in said
    for content, what in (
        ({"train": [{"image": [name], "label": 1}]}, 'paths of "train"'),
        ({name: [{"image": "a.png", "label": 1}]}, "names of splits"),
    ):
        path.write_text(json.dumps(content))
        said = refused_name(datalist_labels, path, images)
        assert said.startswith(f"{path}: {what} with") and f'"{shown}"' in said
    path = tmp_path / "a.csv"
    for column, row in (
        ("path", (name, "x", "p", "train")),
        ("label", ("a.png", name, "p", "val")),
        ("who", ("a.png", "x", name, "val")),
        ("part", ("a.png", "x", "p", name)),
    ):
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerows([("path", "label", "who", "part"), row])
        columns = {"path_columns": ("path",), "label_column": "label"}
        columns |= {"group_column": "who", "split_column": "part"}
        said = refused_name(csv_labels, path, images, **columns)
        assert said.startswith(f'{path}: cells of "{column}" with') and f'"{shown}"' in said


def test_columns_that_are_not_read_may_hold_any_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,note\r\na,"first\r\nsecond\tx"\r\n')
    assert read_csv(path, ["id"]) == [{"id": "a", "note": "first\r\nsecond\tx"}]
    path.write_bytes(b'id,"no\rte"\na,b\n')
    with pytest.raises(UserError, match=r'no column "name".*; columns are id, no\\u000dte'):
        read_csv(path, ["name"])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_lines_end_as_on_any_system(tmp_path, end, last):
    """\\r\\r\\n is what a program leaves that writes \\r\\n as text on Windows."""
    path = tmp_path / "a.csv"
    text = end.join(["id;label", 'a;"x"', "", "b;y"]) + end * last
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_csv(path, ["id"]) == [{"id": "a", "label": "x"}, {"id": "b", "label": "y"}]
    path.write_bytes(f"id{end}a\0".encode())
    line = 2 + (end == "\r\r\n")
    with pytest.raises(UserError, match=f"a.csv, line {line}: a NUL character"):
        read_csv(path, ["id"])
    path.write_bytes(end.encode())
    with pytest.raises(UserError, match="no header"):
        read_csv(path, ["id"])


def test_split_files(tmp_path):
    path = tmp_path / "a.json"
    one, two = {"train": ["a"], "val": []}, {"train": ["b"], "val": ["a"]}
    for content in ([one, two], {"1": two, "0": one}):
        path.write_text(json.dumps(content))
        assert [read_splits(path, fold) for fold in (0, 1)] == [one, two]
        with pytest.raises(UserError, match="data.fold = 2, but .* has the folds 0, 1"):
            read_splits(path, 2)
    path.write_text(json.dumps(one))
    assert read_splits(path, 0) == one
    for content in ("[[1]]", '{"train": "a"}', '{"train": [1.5]}', "3", "{}"):
        path.write_text(content)
        with pytest.raises(UserError, match="expected {split: "):
            read_splits(path, 0)


THREE = {"0": ["a"], "1": ["b"], "2": ["c", "d"]}
SITES = {"site_c": ["c", "d"], "site_a": ["a"], "site_b": ["b"]}


@pytest.mark.parametrize(
    ("content", "fold", "test", "val", "train"),
    [
        (THREE, 0, "a", "b", "cd"),
        (THREE, 2, "cd", "a", "b"),
        (dict(reversed(THREE.items())), 0, "a", "b", "cd"),  # by number, not by place
        ({"2": ["a"], "10": ["b"], "1": ["c"]}, 2, "a", "b", "c"),
        (SITES, "site_c", "cd", "a", "b"),
        (SITES, "site_b", "b", "cd", "a"),
        ({"01": ["a"], "02": ["b"], "03": ["c"]}, "02", "b", "c", "a"),
    ],
)
def test_lists_under_other_names_than_splits_are_folds(tmp_path, content, fold, test, val, train):
    """As in kfold: the fold is test, the next one val, the others train."""
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(content))
    found = read_splits(path, fold)
    assert found == {"train": list(train), "val": list(val), "test": list(test)}
    every = [entry for entries in found.values() for entry in entries]
    assert sorted(every) == sorted(entry for entries in content.values() for entry in entries)
    renamed = read_splits(path, fold, ("fit", "tune", "judge"))
    assert list(renamed) == ["fit", "tune", "judge"] and renamed["judge"] == list(test)


def test_folds_of_splits_go_by_name_too(tmp_path):
    one, two = {"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"north": one, "south": two}))
    assert read_splits(path, "south") == two
    path.write_text(json.dumps([one, two]))
    assert read_splits(path, 1) == two


def test_val_may_be_the_fold_that_is_test(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"0": ["a"], "1": ["b"]}))
    assert read_splits(path, 1, ("train", "test", "test")) == {"train": ["a"], "test": ["b"]}


@pytest.mark.parametrize(
    ("content", "fold", "said"),
    [
        (THREE, 3, "data.fold = 3, but .* has the folds 0, 1, 2: name one of them"),
        (SITES, 0, 'has the folds site_c, site_a, site_b: name one of them, as data.fold = "site_'),
        ({"01": ["a"], "02": ["b"]}, 1, 'has the folds 01, 02: .*, as data.fold = "01"'),
        (SITES, "site", 'data.fold = "site", but .* has the folds site_c'),
        ({"0": ["a"]}, 0, "its one list, 0, is one fold, which leaves none to train on"),
        ({"0": ["a"], "1": ["b"]}, 0, "0 is test, 1 is val, which leaves none to train on"),
        ({**THREE, "3": ["a"]}, 0, "a is in the folds 0 and 3"),
        ({**THREE, "3": []}, 0, "fold 3 is empty"),
        ({"train": ["a"], "val": ["b"]}, 1, "has the splits train, val and no folds"),
        ({"Training": ["a"], "Tuning": ["b"]}, "Tuning", "has the splits Training, Tuning and no"),
        ({"a": {}, "b": {}}, 0, "has the folds a, b"),
        ({"a": {}, "b": []}, "b", '"a" is no list'),
        ([["a"], ["b"]], 0, "expected {split: "),
    ],
)
def test_folds_that_are_not_there(tmp_path, content, fold, said):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        read_splits(path, fold)
