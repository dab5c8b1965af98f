"""Labels: every way they are written, and what is wrong with them."""

import csv
import json
import math
import unicodedata

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from sklearn.preprocessing import MultiLabelBinarizer

from glovita_lib.data import Outputs, are_ordered
from glovita_lib.data_labels import encode, is_missing, untrained
from glovita_lib.data_subtask import LabelRules, Labels
from glovita_lib.datasets import build_data
from glovita_lib.errors import UserError
from glovita_lib.metrics_classification import Scores
from glovita_lib.prediction_files import read_predictions, write_prediction_files
from glovita_lib.spec_data import PrecomputedData


def encoded(labels, subtask="multiclass", *, names=None, classes=None, columns=None, mark="|"):
    ids = [f"{number}.png" for number in range(len(labels))]
    rules = LabelRules(subtask, names, classes, columns, mark)
    _, found, (targets,), _ = encode([Labels(labels, ids)], rules)
    return targets, found


@pytest.mark.parametrize(
    ("labels", "targets", "names"),
    [
        (["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog")),
        ([2, 0, 1], [2, 0, 1], ("0", "1", "2")),
        (["10", "9", "2"], [2, 1, 0], ("2", "9", "10")),  # by value
        ([1.0, 3.0], [0, 1], ("1", "3")),
        (["1.0", 1, "1", 1.0], [1, 0, 0, 0], ("1", "1.0")),
        ([-1, 1], [0, 1], ("-1", "1")),
        ([True, False], [1, 0], ("false", "true")),
        (["a", 1], [1, 0], ("1", "a")),
        (["007", "7"], [0, 1], ("007", "7")),
        (["3_4", "4_3", "1_1", "11"], [1, 2, 0, 3], ("1_1", "3_4", "4_3", "11")),
        (["+1", "1", "-0", "0"], [2, 3, 0, 1], ("-0", "0", "+1", "1")),
        (["grade 10", "grade 9", "-2", "1.5"], [3, 2, 0, 1], ("-2", "1.5", "grade 9", "grade 10")),
        ([".5mg", ".25mg", "1mg"], [1, 0, 2], (".25mg", ".5mg", "1mg")),
        (["$.5", "$.25", "No.10", "No.5"], [1, 0, 3, 2], ("$.25", "$.5", "No.5", "No.10")),
        (["1", "2", "3", "normal"], [0, 1, 2, 3], ("1", "2", "3", "normal")),
        (["0.5", "1e3", "nan"], [0, 1, 2], ("0.5", "1e3", "nan")),
        ([" cat ", "cat"], [0, 0], ("cat",)),
    ],
)
def test_multiclass_without_names(labels, targets, names):
    found, classes = encoded(labels)
    assert found.dtype == np.int64 and found.tolist() == targets and classes == names


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize(
    "labels",
    [
        ["0", "2", "0"],
        [0, 2, 0],
        np.array([0, 2, 0]),
        np.array([0.0, 2, 0]),
        np.array(["0", "2"]),
    ],
    ids=["cells", "json", "array", "floats", "text"],
)
def test_whole_numbers_below_num_classes_are_indices_wherever_they_stand(labels, classes):
    targets, names = encoded(labels, classes=classes)
    assert targets.tolist() == [0, 2, 0][: len(labels)]
    assert names == tuple(map(str, range(classes)))


@pytest.mark.parametrize("labels", [["a", "b"], ["1", "3"], ["-1", "0"], ["00", "1"], ["1", "b"]])
def test_other_labels_are_all_the_classes_that_there_are(labels):
    with pytest.raises(UserError, match="num_classes = 3, but the data have 2 classes"):
        encoded(labels, classes=3)


def test_multiclass_with_names():
    names = ("dog", "cat", "cow")
    assert encoded(["cat", "dog"], names=names)[0].tolist() == [1, 0]
    assert encoded([2, 0], names=names)[0].tolist() == [2, 0]  # indices
    assert encoded(["5", "3"], names=("5", "3"))[0].tolist() == [0, 1]  # names before indices
    assert encoded(["cat"], names=names, classes=3)[1] == names


def test_labels_that_are_no_class():
    with pytest.raises(UserError) as caught:
        encoded(["cat", "dgo", "cow", "dgo"], names=("dog", "cat"))
    text = str(caught.value)
    assert text.startswith('label not in class list: "dgo" (1.png); did you mean "dog"?')
    assert '"cow" (2.png)' in text and text.endswith("data.class_names: dog, cat")
    with pytest.raises(UserError, match=r'"3" \(1.png\)'):
        encoded([0, 3], names=("a", "b", "c"))
    with pytest.raises(UserError, match="a name occurs twice"):
        encoded(["a"], names=("a", "a"))
    with pytest.raises(UserError, match="there is no label; wrong: 1.png, 2.png"):
        encoded(["a", " ", math.nan])
    with pytest.raises(UserError, match='several labels .* "multilabel".*; wrong: 1.png'):
        encoded([1, [0, 1]])


@pytest.mark.parametrize("classes", [1, 3])
def test_num_classes_that_is_wrong(classes):
    with pytest.raises(UserError, match=f"num_classes = {classes}, but the data have 2 classes"):
        encoded(["a", "b"], classes=classes)


LISTS = [["cat", "dog"], [], ["cow"], ["dog", "cow"]]


def test_multilabel_names_as_scikit_learn_encodes_them():
    binarizer = MultiLabelBinarizer()
    expected = binarizer.fit_transform(LISTS)
    for labels in (LISTS, ["|".join(names) for names in LISTS]):
        found, names = encoded(labels, "multilabel")
        assert (found == expected).all() and names == tuple(binarizer.classes_)
        assert found.dtype == np.float32
    found, names = encoded(
        ["dog; cow", "", "cat"], "multilabel", mark=";", names=("cow", "dog", "cat")
    )
    assert found.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]] and names == ("cow", "dog", "cat")
    with pytest.raises(UserError, match='"bird" .1.png'):
        encoded(["dog", "bird"], "multilabel", names=("cow", "dog"))
    with pytest.raises(UserError, match="no sample has a label: give"):
        encoded(["", ""], "multilabel")


def test_multilabel_zeros_and_ones():
    hot = [[0, 1, 1], [0, 0, 0]]
    found, names = encoded(hot, "multilabel")
    assert found.tolist() == hot and names == ("0", "1", "2")
    assert encoded(hot, "multilabel", names=("a", "b", "c"))[1] == ("a", "b", "c")
    # indices, not zeros and ones: of differing lengths, or not one for each class
    assert encoded([[0, 1], [2]], "multilabel")[0].tolist() == [[1, 1, 0], [0, 0, 1]]
    two = encoded([[0, 1], [1, 0]], "multilabel", names=("a", "b", "c"))[0]
    assert two.tolist() == [[1, 1, 0], [1, 1, 0]]
    with pytest.raises(UserError, match="expected a list of class names.*wrong: 0.png"):
        encoded([[[1]], ["a"]], "multilabel")


def test_multilabel_columns():
    labels = [("1", "0"), ("0.0", "TRUE")]
    found, names = encoded(labels, "multilabel", columns=("a", "b"))
    assert found.tolist() == [[1, 0], [0, 1]] and names == ("a", "b")
    found, names = encoded(labels, "multilabel", columns=("a", "b"), names=("b", "a"), classes=2)
    assert found.tolist() == [[0, 1], [1, 0]] and names == ("b", "a")
    with pytest.raises(UserError, match="every cell of a, b must be 0 or 1; wrong: 1.png"):
        encoded([("1", "0"), ("2", "0")], "multilabel", columns=("a", "b"))
    with pytest.raises(UserError, match="must hold the same names"):
        encoded(labels, "multilabel", columns=("a", "b"), names=("a", "c"))


def test_regression():
    found, names = encoded(["1.5", 2, "-3e2"], "regression")
    assert found.tolist() == [[1.5], [2], [-300]] and found.dtype == np.float64
    assert encoded(["1700000000.1", 1e39], "regression")[0].tolist() == [[1700000000.1], [1e39]]
    assert names == ("target",)
    found, names = encoded([[1, 2], [3, 4]], "regression")
    assert found.tolist() == [[1, 2], [3, 4]] and names == ("target_0", "target_1")
    assert encoded([[1, 2]], "regression", names=("x", "y"))[1] == ("x", "y")
    found, names = encoded([("1", "2")], "regression", columns=("x", "y"), names=("y", "x"))
    assert found.tolist() == [[2, 1]] and names == ("y", "x")
    for wrong in ("high", "nan", "inf", [], None, {"a": 1}, "3_4", "1e400", 10**400):
        with pytest.raises(UserError, match="a finite number.*wrong: 1.png"):
            encoded([1, wrong], "regression")
    with pytest.raises(UserError, match="samples have 1 or 2 regression targets"):
        encoded([1, [1, 2]], "regression")
    with pytest.raises(UserError, match="the labels have 2 columns, but there are 1 names .x."):
        encoded([[1, 2]], "regression", names=("x",))
    with pytest.raises(UserError, match="num_classes = 2, but the data have 1 targets"):
        encoded([1], "regression", classes=2)


def test_what_is_no_label():
    for label in (None, math.nan, "", "  ", ("1", "")):
        assert is_missing(label, "multiclass") and is_missing(label, "regression")
    assert not is_missing("", "multilabel")  # none of the classes
    assert is_missing(None, "multilabel") and is_missing(("1", ""), "multilabel")
    assert not is_missing(0, "multiclass") and not is_missing([], "multilabel")


# ---------------------------------------------------------------------- several files


def several(
    *values,
    subtask=None,
    names=None,
    classes=None,
    columns=None,
    stated=None,
    trained=None,
    predicts=None,
):
    """Subtask, names and targets of the labels of several files, a.h5, b.h5, ..."""
    stated = stated or [(None, None)] * len(values)
    files = [
        Labels(labels, [f"s{i}" for i in range(len(labels))], f"{letter}.h5", *said)
        for letter, labels, said in zip("abc", values, stated, strict=False)
    ]
    rules = LabelRules(subtask, names, classes, columns, trained=trained, predicts=predicts)
    found, names, targets, _ = encode(files, rules)
    return found, names, [part.tolist() for part in targets]


def test_the_kind_of_labels_is_decided_over_all_files():
    """A class that only one file has does not make indices of the names of another."""
    words, numbers = np.array(["1", "3", "normal"]), np.array([1, 3])
    names = ("1", "3", "normal")
    assert several(words, numbers) == ("multiclass", names, [[0, 1, 2], [0, 1]])
    assert several(words.tolist(), ["3", "1"]) == ("multiclass", names, [[0, 1, 2], [1, 0]])
    tables = [("0", "2")], [("1", "0.5")]
    assert several(*tables, columns=("a", "b")) == (
        "regression",
        ("a", "b"),
        [[[0, 2]], [[1, 0.5]]],
    )
    assert several(["2", "3"], ["2.5"])[0] == "regression"
    assert several(["2", "3"], ["2.5"], ["no"])[:2] == ("multiclass", ("2", "2.5", "3", "no"))
    assert several(["1_0", "2_5"])[:2] == ("multiclass", ("1_0", "2_5"))
    assert several([("0", "1")], [("true", "0.0")], columns=("a", "b"))[0] == "multilabel"


def test_whole_numbers_of_arrays_are_indices():
    first, second = np.array([0, 4], np.uint8), np.array([1])
    assert several(first, second) == ("multiclass", tuple("01234"), [[0, 4], [1]])
    assert several(first, second, classes=6)[1] == tuple("012345")
    assert several(np.array([True, False]))[1:] == (("0", "1"), [[1, 0]])
    named = several(second, names=("5", "1"))  # of a name that is a number too
    assert named == ("multiclass", ("5", "1"), [[1]])
    with pytest.raises(UserError, match=r'^b.h5: label not in class list: "7" \(s1\); data.class'):
        several(first[:1], np.array([0, 7]), names=("x", "y"))
    whole = np.array([0.0, 2.0])  # of another tool, which knows one kind of number
    assert several(whole, subtask="multiclass")[1:] == (("0", "1", "2"), [[0, 2]])
    with pytest.raises(UserError, match="the label 1700000000 as the index of a class makes"):
        several(np.array([0, 1700000000]))
    with pytest.raises(UserError, match="a.h5: several labels for one sample"):
        several(np.eye(2), subtask="multiclass")


STRAYS = [
    (["0.5", "1.25", "nan", "3"], '"nan" of s2) beside 3 that are'),
    (["0.5", "1.25", "x", "3"], '"x" of s2) beside 3'),
    (["0", "1", "2", "NA"], '"NA" of s3) beside 3'),
    (["0.", "1.", " N/A "], '" N/A " of s2) beside 2'),
    (["0.5", "inf"], '"inf" of s1) beside 1'),
    (["0,5", "1,25", "2,0"], 'decimal comma ("0,5" of s0'),
    (["0.5", "1,25"], 'decimal comma ("1,25" of s1'),
]


@pytest.mark.parametrize(("cells", "said"), STRAYS, ids=range(len(STRAYS)))
@pytest.mark.parametrize("kind", [list, np.array])
def test_text_in_a_column_of_numbers_is_named(cells, said, kind):
    """Of a table, and of an array of text in a feature file, whatever the head predicts."""
    for predicts in (None, "numbers"):
        with pytest.raises(UserError) as got:
            several(kind(cells), predicts=predicts)
        assert said in str(got.value) and "\n" not in str(got.value)
    names = several(kind(cells), subtask="multiclass")[1]
    assert len(names) == len(cells)


def test_words_beside_whole_numbers_are_classes():
    for cells in (["1", "2", "normal"], ["none", "mild", "NA"], ["nan", "NaN"], ["1,a", "2,b"]):
        assert several(cells)[0] == "multiclass"
    assert several(["0.5", "nan"], names=("0.5", "nan"))[1] == ("0.5", "nan")
    assert several(["0.5", "nan"], classes=2)[1] == ("0.5", "nan")


def test_text_of_an_array_is_numbers_where_all_of_it_is():
    assert several(np.array(["0.5", "1.25"]))[::2] == ("regression", [[[0.5], [1.25]]])
    assert several(np.array(["2", "10"]))[1:] == (("2", "10"), [[0, 1]])


def test_a_regression_names_the_cell_that_is_no_number():
    with pytest.raises(UserError, match=r'finite number.*wrong: s1 \("nan"\)$'):
        several(["0.5", "nan"], subtask="regression")


def test_text_in_columns_is_told_as_whole_numbers_are():
    for words in ([["a"], ["b"]], [["a", "b"], ["b", "c"]], [["1"], ["no"]]):
        array = np.array(words, object)
        with pytest.raises(
            UserError, match=r"a.h5: .*\(2, \d\) are names; store classes as \(N,\)"
        ):
            several(array)
    with pytest.raises(UserError, match=r"a.h5: labels of shape \(2, 1\): store classes as \(N,\)"):
        several(np.array([["a"], ["b"]], object), subtask="multiclass")
    with pytest.raises(UserError, match=r"\(2, 1\) are whole numbers; store classes as"):
        several(np.array([["1"], ["2"]], object))
    assert several(np.array([["0", "1"], ["1", "1"]], object))[0] == "multilabel"
    found = several(np.array([["0.5"], ["1.25"]], object))
    assert found == ("regression", ("target",), [[[0.5], [1.25]]])
    with pytest.raises(UserError, match=r"finite number.*wrong: s1"):
        several(np.array([["0.5"], ["nan"]], object))


def enum_labels(numbers, **names):
    return np.array(numbers, dtype=h5py.enum_dtype(names, basetype="i2"))


def test_an_hdf5_enum_states_the_class_names():
    """In the order of its numbers, whichever these are, also of files without an enum."""
    first = enum_labels([6, 0, 6], emu=6, dog=3, cat=0)
    assert several(first) == ("multiclass", ("cat", "dog", "emu"), [[2, 0, 2]])
    other = enum_labels([1, -1], cat=-1, dog=0, emu=1)
    assert several(first, other)[1:] == (("cat", "dog", "emu"), [[2, 0, 2], [2, 0]])
    assert several(first, np.array([3, 0]))[1:] == (("cat", "dog", "emu"), [[2, 0, 2], [1, 0]])
    assert several(first, names=("Katze", "Hund", "Emu"))[1:] == (
        ("Katze", "Hund", "Emu"),
        [[2, 0, 2]],
    )
    assert several(first, names=("emu", "dog", "cat"))[1:] == (("emu", "dog", "cat"), [[0, 2, 0]])
    assert several(first, subtask="regression")[1:] == (("target",), [[[6], [0], [6]]])
    trained = Outputs("multiclass", ("dog", "emu", "cat"))
    _, _, (targets,), _ = encode(
        [Labels(first, ["x", "y", "z"])], LabelRules(None, None, None, None, trained=trained)
    )
    assert targets.tolist() == [1, 2, 1]
    swapped = enum_labels([0, 1, 2], emu=0, dog=1, cat=2)
    assert several(first, swapped)[1:] == (("cat", "dog", "emu"), [[2, 0, 2], [2, 1, 0]])
    with pytest.raises(UserError, match=r"no number of the HDF5 enum \(0 cat, 1 dog\); wrong: s1"):
        several(enum_labels([0, 7], cat=0, dog=1))
    with pytest.raises(UserError, match="different class_names"):
        several(first, enum_labels([0], cat=0, dog=3))


def test_the_class_names_of_a_file_with_an_enum():
    labels = enum_labels([1, 2, 1], cat=1, dog=2)
    rules = LabelRules(None, None, None, None)
    for names, targets in ((("dog", "cow", "cat"), [2, 0, 2]), (("a", "b", "c"), [1, 2, 1])):
        _, found, (got,), _ = encode([Labels(labels, ["x", "y", "z"], class_names=names)], rules)
        assert found == names and got.tolist() == targets


def test_an_enum_in_a_file(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.zeros((4, 3), np.float32)
        kind = h5py.enum_dtype({"dog": 1, "cat": 0}, basetype="u1")
        file.create_dataset("labels", data=[1, 0, 1, 1], dtype=kind)
    spec = PrecomputedData(data_root_dir=str(tmp_path), train_features_file="a.h5")
    data = build_data(spec, seed=0)
    assert data.class_names == ("cat", "dog")
    assert data.splits["train"].targets.tolist() == [1, 0, 1, 1]


def test_kinds_of_arrays():
    floats, hot = np.array([0.5, 1]), np.eye(2, dtype=np.float32)
    assert several(floats) == ("regression", ("target",), [[[0.5], [1]]])
    assert several(hot, hot[:1])[0] == "multilabel"
    assert several(hot, hot + 0.5)[0] == "regression"
    assert several(hot, columns=("a", "b"), names=("b", "a"))[1:] == (
        ("b", "a"),
        [[[0, 1], [1, 0]]],
    )
    with pytest.raises(UserError, match=r"b.h5: .*\(2, 2\) are whole numbers; store classes as"):
        several(hot, np.array([[1, 2], [3, 4]]))
    with pytest.raises(UserError, match=r"b.h5: .*\(2, 2\) are whole numbers; store classes as"):
        several(hot, np.array([[1.0, 2], [3, 4]]))
    with pytest.raises(UserError, match=r"a.h5: .*\(2, 2\) are whole numbers; store classes as"):
        several([("1.0", "2"), ("3", "4")])
    with pytest.raises(UserError, match="b.h5: every multilabel label must be 0 or 1; wrong: s0"):
        several(hot, hot * np.float32(0.5), subtask="multilabel")
    with pytest.raises(UserError, match="a.h5: the label of a regression .*; wrong: s1"):
        several(np.array([1, np.nan]), subtask="regression")
    with pytest.raises(UserError, match="b.h5: the labels have 1 columns, but there are 2 names"):
        several(np.eye(2) / 2, floats)


@pytest.mark.parametrize(
    "cells",
    [
        ["1.0", "2.0"],
        ["1e3", "2"],
        ["01", "2.5"],
        ["+1", "-0.5"],
        np.array([1.0, 2.0]),
        np.array([0, np.nan], np.float32),
    ],
)
def test_numbers_that_may_be_classes_or_values_are_asked_about(cells):
    with pytest.raises(UserError, match="^the labels .* may be classes or values: set data.subt"):
        several(cells)
    with pytest.raises(UserError, match="may be classes or values"):
        several(cells, np.array([0, 3]))
    if "2.5" not in cells and "-0.5" not in cells and not np.isnan(np.array(cells, float)).any():
        assert several(cells, predicts="classes")[0] == "multiclass"  # a head that is named
    else:
        with pytest.raises(UserError, match="may be classes or values|there is no label"):
            several(cells, predicts="classes")
    rules = LabelRules(None, None, None, None, predicts="numbers")
    if np.all(np.array(cells, float) > -9):  # none is missing
        assert encode([Labels(cells, ["a", "b"])], rules).subtask == "regression"
        for given in ({"subtask": "regression"}, {"classes": 1}, {"names": ("dose",)}):
            assert several(cells, **given)[0] == "regression"
        if isinstance(cells, list):
            for given in ({"subtask": "multiclass"}, {"classes": 2}, {"names": tuple(cells)}):
                assert several(cells, **given)[0] == "multiclass"


def test_names_that_look_like_numbers_are_no_regression():
    """A number is what would be printed so; numbers with a fraction among them are values."""
    for cells in (["01", "02", "10"], ["+1", "-1"], ["007", "0010"], ["-0", "1"]):
        assert several(cells)[0] == several(cells[:1], cells[1:])[0] == "multiclass"
        assert set(several(cells)[1]) == set(cells)
    for cells in (["1.0", "2.5"], [".5", "1."], ["-0.50", "1.00"], ["1e-3", "1"], ["+0.5", "2"]):
        assert several(cells)[0] == several(cells[:1], cells[1:])[0] == "regression"
    assert several(np.array([1.0, 2.0]), np.array([0.5]))[0] == "regression"
    with pytest.raises(UserError, match='not in class list: "01" .*; data.class_names: 1, 2, 10'):
        several(["01", "02", "10"], names=("1", "2", "10"))
    with pytest.raises(UserError, match='not in class list: "1.0" .*; data.class_names: 1, 2'):
        several(["1.0", "2.0"], names=("1", "2"))
    assert several(np.array([0.0, 1]), names=("a", "b"))[1:] == (("a", "b"), [[0, 1]])
    column, rules = np.array([[1.0], [3.0]]), LabelRules(None, None, None, None, predicts="numbers")
    with pytest.raises(UserError, match=r"shape \(2, 1\) are whole numbers; store classes as"):
        several(column)
    for values in (column, np.array([20, 30]), ["20", "30"], ["01", "30"], np.eye(2)):
        assert encode([Labels(values, ["a", "b"])], rules).subtask == "regression"
    assert encode([Labels(["a", "1"], ["a", "b"])], rules).subtask == "multiclass"
    stated = Labels(np.array([0, 1]), ["a", "b"], subtask="multiclass")
    assert encode([stated], rules).subtask == "multiclass"


def test_names_in_one_file_and_numbers_in_another():
    words, others = np.array(["cat", "dog", "emu"], object), ("1", "2", "3")
    for numbers in (np.arange(3), np.array([True, False]), np.array([0.0, 2.0])):
        for files in ((words, numbers), (numbers, words), (words, words, numbers)):
            with pytest.raises(
                UserError, match="has names for labels .cat, dog, emu., [abc].h5 nu"
            ):
                several(*files)
    named = several(words, np.arange(3), names=("cat", "dog", "emu"))
    assert named[1:] == (("cat", "dog", "emu"), [[0, 1, 2], [0, 1, 2]])
    with pytest.raises(UserError, match=r"names for labels \(1, 2, 3\), b.h5 numbers \(0, 1, 2\)"):
        several(np.array(others), np.arange(3))  # whose 1 is the second?
    with pytest.raises(UserError, match="store the same names in both$"):
        several(words, np.array(["0", "1", "2"]))
    assert several(["cat", "dog"], ["0", "1"])[1] == ("0", "1", "cat", "dog")  # of one table
    assert several(np.array(others), np.array([1, 3]))[2] == [[0, 1, 2], [0, 2]]
    trained = Outputs("multiclass", ("cat", "dog", "emu"))
    with pytest.raises(UserError, match='^b.h5: label not in class list: "0".*in data.class_names'):
        several(words, np.arange(3), trained=trained)


def test_what_files_state():
    a, b = np.array([0, 1]), np.array([1, 1])
    names = ("cat", "dog")
    assert several(a, b, stated=[("multiclass", names), (None, names)])[1] == names
    assert several(a, b, names=("x", "y"), stated=[(None, names), (None, None)])[1] == ("x", "y")
    assert several(a, stated=[("regression", None)])[0] == "regression"
    with pytest.raises(UserError, match="different subtasks: a.h5 multiclass, b.h5 regression"):
        several(a, b, stated=[("multiclass", None), ("regression", None)])
    with pytest.raises(
        UserError, match=r'^a.h5: its attribute subtask is "binary"; valid are mult'
    ):
        several(a, stated=[("binary", None)])
    assert several(a, subtask="multiclass", stated=[("binary", None)])[0] == "multiclass"
    with pytest.raises(UserError, match=r"class_names \(a.h5: cat, dog; b.h5: dog, cat\)"):
        several(a, b, stated=[(None, names), (None, names[::-1])])


def test_numbers_are_indices_of_names_that_are_no_numbers():
    """Whichever of the classes a file holds."""
    animals, grades = ("cat", "dog", "cow"), ("1", "2", "3", "normal")
    for cells in (["0", "2"], ["2"]):
        assert several(cells, names=animals)[2] == [[int(cell) for cell in cells]]
        with pytest.raises(UserError, match='"0" .*|"2" .*'):
            several(cells, ["cat"], names=animals)
    for cells in (["1", "2", "3"], ["1"], np.array([1, 2]), np.array(["3"])):
        expected = [int(cell) - 1 for cell in cells]
        assert several(cells, names=grades)[2] == [expected]
        assert several(cells, trained=Outputs("multiclass", grades)) == (
            "multiclass", grades, [expected]
        )  # fmt: skip
    with pytest.raises(UserError, match=r'"0" \(s0\); data.class_names: 1, 2, 3, normal'):
        several(np.array([0, 1]), names=grades)


def test_names_of_files_and_of_the_spec():
    """The indices of a file are those of its own names, also where the spec has more names, or
    others in their place."""
    indices, own = np.array([0, 1]), ("cow", "dog")
    files = {"stated": [(None, own)]}
    assert several(indices, names=("cat", "dog", "cow"), **files)[2] == [[2, 1]]
    assert several(indices, names=("Kuh", "Hund"), **files)[1:] == (("Kuh", "Hund"), [[0, 1]])
    assert several(indices + 1, names=("1", "2", "3"), stated=[(None, ("3", "2", "1"))])[2] == [
        [1, 0]
    ]
    for names in (("cow", "cat"), ("a", "b", "c")):
        with pytest.raises(UserError, match="do not hold the class_names of the feature files"):
            several(indices, names=names, **files)
    hot = np.array([[0, 1], [1, 1]])
    assert several(hot, names=("dog", "cow"), **files)[2] == [[[1, 0], [1, 1]]]
    assert several(hot, names=("a", "b"), **files)[1:] == (("a", "b"), [[[0, 1], [1, 1]]])
    with pytest.raises(UserError, match="must hold the same names"):
        several(hot, names=("dog", "cow", "cat"), **files)


def test_labels_are_read_as_the_trained_model_means_them():
    animals = Outputs("multiclass", ("dog", "cat"))
    assert several(["cat"], trained=animals) == ("multiclass", ("dog", "cat"), [[1]])
    assert several(["cat"], names=("cat", "dog"), trained=animals)[2] == [[1]]
    assert several(np.array([0]), stated=[(None, ("cat",))], trained=animals)[2] == [[1]]
    for labels in (["1"], np.array([1])):  # whose coding?
        with pytest.raises(UserError, match='"1" .s0.; classes of the checkpoint: dog, cat'):
            several(labels, trained=animals)
        assert several(labels, names=("cat", "dog"), trained=animals)[2] == [[0]]
    with pytest.raises(UserError, match='"cow" .s1.; classes of the checkpoint: dog, cat'):
        several(["dog", "cow"], trained=animals)
    mixed = Outputs("multiclass", ("1", "1.5", "normal"))
    assert several(["1.5", "1"], trained=mixed)[2] == [[1, 0]]  # which look like a regression
    with pytest.raises(UserError, match="labels are multiclass, the checkpoint .* regression of t"):
        several(["a"], subtask="multiclass", trained=Outputs("regression", ("t",)))
    sets = Outputs("multilabel", ("b", "a", "c"))
    assert several(["a", "c|a"], trained=sets)[2] == [[[0, 1, 0], [0, 1, 1]]]
    assert several([[0], [1]], trained=Outputs("multilabel", ("0", "1", "2")))[2] == [
        [[1, 0, 0], [0, 1, 0]]
    ]  # indices, as three zeros and ones would be
    pair = Outputs("regression", ("x", "y"))
    assert several([("1", "2")], columns=("y", "x"), trained=pair)[1:] == (("x", "y"), [[[2, 1]]])
    with pytest.raises(UserError, match="checkpoint's .x, y. and the data's .target_0, target_1."):
        several(np.array([[0.5, 1]]), trained=pair)
    assert several(["2"], trained=Outputs("regression", ("age",)))[1:] == (("age",), [[[2]]])


def test_names_in_two_unicode_forms_are_one():
    composed, apart = "b\u00f6se", "bo\u0308se"
    assert encoded([apart, composed])[1] == (apart,)
    assert encoded([apart, composed])[0].tolist() == [0, 0]
    assert encoded([apart, "gut"], names=("gut", composed))[0].tolist() == [1, 0]
    assert encoded([[apart], [composed, "gut"]], "multilabel")[0].tolist() == [[1, 0], [1, 1]]
    columns = encoded([("1", "2")], "regression", columns=(apart, "b"), names=("b", composed))
    assert columns[0].tolist() == [[2, 1]]
    with pytest.raises(UserError, match="a name occurs twice"):
        encoded(["a"], names=(composed, apart))


def test_names_that_say_their_order():
    for names in (
        ["0", "1", "10"],
        ["-1", "0.5", "2"],
        ["grade 1", "grade 2"],
        ["G3b", "G4b"],
        [".25mg", ".5mg", "1mg"],
        ["-.25 D", "-.5 D", "-1 D"],
        ["$.25", "$.5", "$1.5"],
        ["dose .25", "dose .5"],
        ["No.1", "No.2", "No.3"],  # with the point or without
    ):
        assert are_ordered(names)
    for names in (
        ["none", "mild"],
        ["1", "2", "normal"],
        ["grade 1", "stage 2"],
        ["1a2", "1a3"],
        ["2", "1", "3"],
        [".5mg", ".25mg", ".75mg"],
        ["dose.5", "dose.25", "dose.75"],
        ["No.5", "No.10", "No.15"],  # or a half and a tenth
        [",5 mg", ",25 mg", ",75 mg"],
        ["1e-3 g", "5e-4 g"],
    ):
        assert not are_ordered(names)


def test_classes_without_a_training_sample():
    line = ["classes without a training sample: a, c"]
    assert untrained(np.array([1, 1]), ("a", "b", "c"), "multiclass") == line
    assert untrained(np.array([[0, 1, 0], [0, 0, 0]]), ("a", "b", "c"), "multilabel") == line
    assert untrained(np.zeros((2, 3)), ("a", "b", "c"), "regression") == []


# ---------------------------------------------------------------------- any table
#
# Whatever strings stand in a table, however its rows are divided: a cell means the class of its
# name in every split, in a new cohort that a model is asked about, and in the predictions file.

NAMES = st.one_of(
    st.text("0123456789_+-.eE ", max_size=6),
    st.text("aäößA1\u0308\u0301 ,;|\"'", max_size=6),
    st.text(st.characters(exclude_categories=["C"]), max_size=8),
    st.sampled_from(["0", "1", "2", "10", "1.0", "01", "1_0", "+1", "nan", "inf", "1e3", "true"]),
    st.integers().map(str),
).filter(str.strip)
TABLES = st.lists(NAMES, min_size=1, max_size=6).flatmap(
    lambda names: st.lists(
        st.tuples(st.sampled_from(names), st.sampled_from(["train", "val", "test"]), st.booleans()),
        min_size=1,
        max_size=20,
    )
)
"""Rows: the cell, its split, and whether it is in the cohort too."""


def plain(cell):
    """A cell as it is compared."""
    return unicodedata.normalize("NFC", cell.strip())


@settings(deadline=None, derandomize=True)
@given(rows=TABLES)
def test_a_cell_means_its_name_in_every_split_and_cohort(rows):
    parts = {split: [cell for cell, own, _ in rows if own == split] for _, split, _ in rows}
    files = [Labels(cells, [str(i) for i in range(len(cells))]) for cells in parts.values()]
    subtask, names, targets, _ = encode(files, LabelRules("multiclass", None, None, None))
    for cells, found in zip(parts.values(), targets, strict=True):
        assert [plain(names[index]) for index in found] == [plain(cell) for cell in cells]
    assert set(names) <= {cell.strip() for cell, _, _ in rows}  # in a form of the user's
    cohort = [cell for cell, _, is_in in rows if is_in]
    trained = Outputs(subtask, names)
    for rules in (
        LabelRules("multiclass", None, None, None, trained=trained),
        LabelRules(None, None, None, None, trained=trained),
        LabelRules(None, names[::-1], None, None, trained=trained),
    ):
        again = encode([Labels(cohort, [str(i) for i in range(len(cohort))])], rules)
        assert again.class_names == names and again.subtask == subtask
        assert [plain(names[i]) for i in again.targets[0]] == [plain(cell) for cell in cohort]


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rows=TABLES)
def test_the_predictions_file_has_the_cells_of_the_table(tmp_path, rows):
    """Of feature files whose table gives the splits, and whose labels are text."""
    rows = [("first", "train", False), *rows]
    ids = [str(row) for row in range(len(rows))]
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["features"] = np.eye(len(rows), 4, dtype=np.float32)
        file["labels"] = np.array([cell for cell, _, _ in rows], object)
    with open(tmp_path / "labels.csv", "w", newline="", encoding="utf-8") as file:
        cells = [(i, *row[:2]) for i, row in zip(ids, rows, strict=True)]
        csv.writer(file).writerows([("id", "label", "split"), *cells])
    spec = PrecomputedData(
        data_root_dir=str(tmp_path), features_file="f.h5", labels_file="labels.csv",
        split_source="csv", subtask="multiclass",
    )  # fmt: skip
    content: dict[str, list[str]] = {}
    for name, (_, split, _) in zip(ids, rows, strict=True):
        content.setdefault(split, []).append(name)
    (tmp_path / "splits.json").write_text(json.dumps(content))
    stored = replace(spec, labels_file=None, split_source="splits_json")
    names = None
    for asked in (spec, stored):
        trained = names and Outputs("multiclass", names)
        data = build_data(asked, seed=0, trained=trained)
        names = names or data.class_names
        assert data.class_names == names
        for split in data.splits.values():
            path = tmp_path / "predictions.csv"
            scores = np.eye(len(names), dtype=np.float32)[split.targets]
            kind = {"subtask": "multiclass", "class_names": names}
            write_prediction_files(
                path, ids=split.ids, targets=split.targets, scores=Scores(scores), **kind
            )
            with open(path, newline="", encoding="utf-8") as file:
                written = list(csv.DictReader(file))
            for row in written:
                cell = plain(rows[int(row["id"])][0])
                assert (plain(row["label"]), plain(row["prediction"])) == (cell, cell)
            table = read_predictions(path, **kind)
            np.testing.assert_array_equal(table.targets, split.targets)


ENUM = h5py.enum_dtype({"healthy": 1, "ill": 2}, "i1")


@pytest.mark.parametrize(
    ("labels", "stated", "names"),
    [
        (np.array([0, 1, 2]), ("1", "2", "3"), None),
        (np.array([0, 1, 2]), ("1", "2", "3"), ("3", "2", "1")),  # in another order
        (np.array([0, 1, 2]), ("a", "b", "c"), ("1", "2", "3")),  # renamed
        (np.array([0, 1, 2]), None, ("a", "b", "c")),
        (np.array([1, 2, 3]), None, ("1", "2", "3")),
        (np.array([1, 2, 1], ENUM), None, None),
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_numbers_mean_to_a_cohort_what_they_meant_in_training(labels, stated, names, again):
    """A file that states no names is read alone as it was beside the one that states them, with the
    spec of training and with another."""

    def files(*all_values):
        return [
            Labels(values, [f"s{i}" for i in range(3)], "", None, stated if place == 0 else None)
            for place, values in enumerate(all_values)
        ]

    rules = LabelRules("multiclass", names, None, None)
    bare = np.array(labels.tolist())
    subtask, classes, (_, expected), numbers = encode(files(labels, bare), rules)
    trained = Outputs(subtask, classes, numbers)
    rules = LabelRules(None, names if again else None, None, None, trained=trained)
    cohort = [Labels(bare[1:], ["s1", "s2"])]
    np.testing.assert_array_equal(encode(cohort, rules).targets[0], expected[1:])
    reversed_names = classes[::-1]
    if names and not any(name.isdigit() for name in names):  # what the spec says now counts
        rules = LabelRules(None, reversed_names, None, None, trained=trained)
        assert encode(cohort, rules).targets[0].tolist() == (2 - expected[1:]).tolist()


def test_columns_mean_to_a_cohort_what_they_meant_in_training():
    values = np.array([[0, 1], [1, 1], [0, 0]])
    for names in (None, ("b", "a")):
        rules = LabelRules("multilabel", names, None, None)
        files = [Labels(values, list("pqr"), "", None, ("a", "b")), Labels(values, list("pqr"))]
        subtask, classes, (_, expected), numbers = encode(files, rules)
        trained = Outputs(subtask, classes, numbers)
        rules = LabelRules(None, names, None, None, trained=trained)
        np.testing.assert_array_equal(encode(files[1:], rules).targets[0], expected)


def test_one_target_has_the_name_of_the_model():
    for known, columns in (("target", ("age",)), ("age", None)):
        trained = Outputs("regression", (known,))
        assert several([("3",)], trained=trained, columns=columns)[1:] == ((known,), [[[3]]])


def test_numbers_that_can_be_no_class_are_refused():
    for wrong in (np.inf, -np.inf, 1e19):
        with pytest.raises(UserError, match="infinite, or too large .*; wrong: s1"):
            several(np.array([0, wrong, 1]), subtask="multiclass")
    with pytest.raises(UserError, match="if the numbers are names, list them in data.class_names"):
        several(np.array([-1, 1]))
    assert several(np.array([-1, 1]), names=("-1", "1"))[2] == [[0, 1]]
