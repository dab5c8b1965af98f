"""Labels: every way they are written, and what is wrong with them."""

import math

import numpy as np
import pytest
from sklearn.preprocessing import MultiLabelBinarizer

from glovita_lib.data_labels import (
    LabelRules,
    Labels,
    cells_as_stored,
    encode,
    is_missing,
    untrained,
)
from glovita_lib.errors import UserError


def encoded(labels, subtask="multiclass", *, names=None, classes=None, columns=None, mark="|"):
    ids = [f"{number}.png" for number in range(len(labels))]
    rules = LabelRules(subtask, names, classes, columns, mark)
    _, found, (targets,) = encode([Labels(labels, ids)], rules)
    return targets, found


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
    assert found.tolist() == [[1.5], [2], [-300]] and found.dtype == np.float32
    assert names == ("target",)
    found, names = encoded([[1, 2], [3, 4]], "regression")
    assert found.tolist() == [[1, 2], [3, 4]] and names == ("target_0", "target_1")
    assert encoded([[1, 2]], "regression", names=("x", "y"))[1] == ("x", "y")
    found, names = encoded([("1", "2")], "regression", columns=("x", "y"), names=("y", "x"))
    assert found.tolist() == [[2, 1]] and names == ("y", "x")
    for wrong in ("high", "nan", "inf", [], None, {"a": 1}, 1e39, "1e39", 10**400):
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


def several(*values, subtask=None, names=None, classes=None, columns=None, stated=None):
    """Subtask, names and targets of the labels of several files, a.h5, b.h5, ..."""
    stated = stated or [(None, None)] * len(values)
    files = [
        Labels(labels, [f"s{i}" for i in range(len(labels))], f"{letter}.h5", *said)
        for letter, labels, said in zip("abc", values, stated, strict=False)
    ]
    found, names, targets = encode(files, LabelRules(subtask, names, classes, columns))
    return found, names, [part.tolist() for part in targets]


def test_the_kind_of_labels_is_decided_over_all_files():
    """A class that only one file has does not make indices of the names of another."""
    words, numbers = np.array(["1", "3", "normal"]), np.array([1, 3])
    names = ("1", "3", "normal")
    assert several(words, numbers) == ("multiclass", names, [[0, 1, 2], [0, 1]])
    tables = cells_as_stored([words[:, None], np.array([["3"], ["1"]])])
    assert several(*tables) == ("multiclass", names, [[0, 1, 2], [1, 0]])
    tables = cells_as_stored([np.array([["0", "2"]]), np.array([["1", "0.5"]])])
    assert several(*tables) == ("regression", ("target_0", "target_1"), [[[0, 2]], [[1, 0.5]]])


def test_whole_numbers_of_arrays_are_indices():
    first, second = np.array([0, 4], np.uint8), np.array([1])
    assert several(first, second) == ("multiclass", tuple("01234"), [[0, 4], [1]])
    assert several(first, second, classes=6)[1] == tuple("012345")
    assert several(np.array([True, False]))[1:] == (("0", "1"), [[1, 0]])
    named = several(second, names=("5", "1"))  # of a name that is a number too
    assert named == ("multiclass", ("5", "1"), [[1]])
    with pytest.raises(UserError, match=r'^b.h5: label not in class list: "7" \(s1\); data.class'):
        several(first[:1], np.array([0, 7]), names=("x", "y"))
    with pytest.raises(UserError, match="a.h5: several labels for one sample"):
        several(np.eye(2), subtask="multiclass")


def test_kinds_of_arrays():
    floats, hot = np.array([0.5, 1]), np.eye(2, dtype=np.float32)
    assert several(floats) == ("regression", ("target",), [[[0.5], [1]]])
    assert several(hot, hot[:1])[0] == "multilabel"
    assert several(hot, hot + 1)[0] == "regression"
    assert several(hot, columns=("a", "b"), names=("b", "a"))[1:] == (
        ("b", "a"),
        [[[0, 1], [1, 0]]],
    )
    with pytest.raises(UserError, match=r"b.h5: .*\(2, 2\) are whole numbers; store classes as"):
        several(hot, np.array([[1, 2], [3, 4]]))
    with pytest.raises(UserError, match="b.h5: every multilabel label must be 0 or 1; wrong: s0"):
        several(hot, hot * np.float32(0.5), subtask="multilabel")
    with pytest.raises(UserError, match="a.h5: the label of a regression .*; wrong: s1"):
        several(np.array([1, np.nan]))
    with pytest.raises(UserError, match="b.h5: the labels have 1 columns, but there are 2 names"):
        several(np.eye(2) / 2, floats)


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


def test_classes_without_a_training_sample():
    line = ["classes without a training sample: a, c"]
    assert untrained(np.array([1, 1]), ("a", "b", "c"), "multiclass") == line
    assert untrained(np.array([[0, 1, 0], [0, 0, 0]]), ("a", "b", "c"), "multilabel") == line
    assert untrained(np.zeros((2, 3)), ("a", "b", "c"), "regression") == []
