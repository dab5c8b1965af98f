"""Labels: every way they are written, and what is wrong with them."""

import math

import numpy as np
import pytest
from sklearn.preprocessing import MultiLabelBinarizer

from glovita_lib.data_labels import LabelRules, encode, is_missing
from glovita_lib.errors import UserError


def encoded(labels, subtask="multiclass", *, names=None, classes=None, columns=None, mark="|"):
    ids = [f"{number}.png" for number in range(len(labels))]
    return encode(labels, ids, LabelRules(subtask, names, classes, columns, mark))


@pytest.mark.parametrize(
    ("labels", "targets", "names"),
    [
        (["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog")),
        ([2, 0, 1], [2, 0, 1], ("0", "1", "2")),
        (["10", "9", "2"], [2, 1, 0], ("2", "9", "10")),  # by value
        ([1.0, 3.0], [0, 1], ("1", "3")),
        (["1.0", 1, "1"], [0, 0, 0], ("1",)),
        ([-1, 1], [0, 1], ("-1", "1")),
        ([True, False], [1, 0], ("false", "true")),
        (["a", 1], [1, 0], ("1", "a")),
        (["007", "7"], None, None),
        (["0.5", "1e3", "nan"], [0, 1, 2], ("0.5", "1e3", "nan")),
        ([" cat ", "cat"], [0, 0], ("cat",)),
    ],
)
def test_multiclass_without_names(labels, targets, names):
    found, classes = encoded(labels)
    if names is None:
        assert len(classes) == 2
        return
    assert found.dtype == np.int64 and found.tolist() == targets and classes == names


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
    with pytest.raises(UserError, match="no image has a label"):
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
    assert found.tolist() == [[1.5], [2], [-300]] and found.dtype == np.float32
    assert names == ("target",)
    found, names = encoded([[1, 2], [3, 4]], "regression")
    assert found.tolist() == [[1, 2], [3, 4]] and names == ("target_0", "target_1")
    assert encoded([[1, 2]], "regression", names=("x", "y"))[1] == ("x", "y")
    found, names = encoded([("1", "2")], "regression", columns=("x", "y"), names=("y", "x"))
    assert found.tolist() == [[2, 1]] and names == ("y", "x")
    for wrong in ("high", "nan", "inf", [], None, {"a": 1}):
        with pytest.raises(UserError, match="a finite number.*wrong: 1.png"):
            encoded([1, wrong], "regression")
    with pytest.raises(UserError, match="1 or 2 regression targets"):
        encoded([1, [1, 2]], "regression")
    with pytest.raises(UserError, match="has 1 names .x., the labels 2 numbers"):
        encoded([[1, 2]], "regression", names=("x",))
    with pytest.raises(UserError, match="num_classes = 2, but the data have 1 targets"):
        encoded([1], "regression", classes=2)


def test_what_is_no_label():
    for label in (None, math.nan, "", "  ", ("1", "")):
        assert is_missing(label, "multiclass") and is_missing(label, "regression")
    assert not is_missing("", "multilabel")  # none of the classes
    assert is_missing(None, "multilabel") and is_missing(("1", ""), "multilabel")
    assert not is_missing(0, "multiclass") and not is_missing([], "multilabel")
