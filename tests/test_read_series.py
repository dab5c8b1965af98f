"""Reading of time series: every kind of file against what was written, and their preparation."""

import csv
import importlib.util
import os
from dataclasses import replace
from datetime import date
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from glovita_lib.errors import UserError
from glovita_lib.read_series import read_series
from glovita_lib.series_preparation import fill, numbers, prepare, since_first, time_numbers
from glovita_lib.series_table import Columns
from glovita_lib.spec_series import SeriesPreparation

COLUMNS = Columns("id", "time", ("label",), None, None, ())
SERIES = [np.array([[1.0, 2.5, np.nan], [0.0, -1.0, 3.0]]), np.array([[4.0, 5.0], [6.0, 7.0]])]
AEON = importlib.util.find_spec("aeon")


def assert_same(table, series=SERIES):
    assert len(table.series) == len(series)
    for ours, theirs in zip(table.series, series, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def write(path, text):
    path.write_text(text)
    return path


def test_ts(tmp_path):
    text = (
        "# a comment\n@problemName x\n@timeStamps false\n@missing true\n@univariate false\n"
        "@equalLength false\n@classLabel true Up down\n@data\n1,2.5,?:0,-1,3:Up\n4,5:6,7:down\n"
    )
    table = read_series(write(tmp_path / "a.ts", text), COLUMNS)
    assert_same(table)
    assert table.labels == ["Up", "down"] and table.subtask == "multiclass" and not table.named


@pytest.mark.parametrize("stated", ["@targetLabel false", "@classLabel false", ""])
def test_ts_without_labels_may_end_its_lines_with_a_colon(stated, tmp_path):
    head = f"{stated}\n@data\n"
    for end in ("", ":", ": "):
        text = f"@timeStamps false\n{head}1,2.5,?:0,-1,3{end}\n4,5:6,7{end}\n"
        table = read_series(write(tmp_path / "a.ts", text), COLUMNS)
        assert_same(table)
        assert table.labels is None and table.subtask is None
        text = f"@timeStamps true\n{head}(0,1),(1,2.5):(0,0),(1,3){end}\n"
        assert_same(read_series(write(tmp_path / "b.ts", text), COLUMNS), [[[1, 2.5], [0, 3]]])
        text = f"{head}5{end}\n4,5{end}\n"
        assert_same(read_series(write(tmp_path / "c.ts", text), COLUMNS), [[[5]], [[4, 5]]])


@pytest.mark.skipif(AEON is None, reason="aeon writes the files")
@pytest.mark.parametrize("shape", [(3, 1, 5), (3, 2, 7), (2, 3, 1)])
def test_ts_without_labels_as_aeon_writes_it(shape, tmp_path):
    from aeon.datasets import save_to_ts_file

    values = np.random.default_rng(0).normal(size=shape)
    save_to_ts_file(values, path=str(tmp_path), problem_name="new")
    table = read_series(tmp_path / "new.ts", COLUMNS)
    assert_same(table, values)
    assert table.labels is None


def test_ts_with_times_and_numbers_to_predict(tmp_path):
    text = (
        "@timeStamps true\n@targetLabel true\n@data\n"
        "(2020-01-01 00:00:00,1),(2020-01-01 00:00:02,2):(2020-01-01 00:00:01,5):0.5\n"
        "(0,1),(1,2):(0,?),(1,4):1.5\n"
    )
    table = read_series(write(tmp_path / "a.ts", text), COLUMNS)
    assert_same(table, [[[1, np.nan, 2], [np.nan, 5, np.nan]], [[1, 2], [np.nan, 4]]])
    assert since_first(table.times[0]).tolist() == [0, 1, 2]  # seconds
    assert table.times[1].tolist() == [0, 1]
    assert table.labels == ["0.5", "1.5"] and table.subtask == "regression"


def test_arff(tmp_path):
    flat = "@relation x\n@attribute a numeric\n@attribute b numeric\n@attribute target {1,2}\n"
    table = read_series(write(tmp_path / "a.arff", flat + "@data\n1,?,1\n3,4,2\n"), COLUMNS)
    assert_same(table, [[[1, np.nan]], [[3, 4]]])
    assert table.labels == ["1", "2"]
    nested = (
        "@relation x\n@attribute all relational\n@attribute a numeric\n@attribute b numeric\n"
        "@end all\n@attribute class {up,down}\n@data\n'1,2\\n3,4',up\n'5,6\\n7,8',down\n"
    )
    table = read_series(write(tmp_path / "b.arff", nested), COLUMNS)
    assert_same(table, [[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    assert table.labels == ["up", "down"]


def test_labels_of_archives_are_classes_numbers_or_missing(tmp_path):
    head = "@relation x\n@attribute a numeric\n@attribute b numeric\n"
    for kind, subtask in {
        "{a,b}": "multiclass",
        "string": "multiclass",
        "STRING": "multiclass",
        "numeric": "regression",
        "REAL": "regression",
    }.items():
        path = write(tmp_path / "a.arff", f"{head}@attribute class {kind}\n@data\n1,2,3\n4,5,?\n")
        table = read_series(path, COLUMNS)
        assert (table.subtask, table.labels) == (subtask, ["3", "?"])
    for label in ("@classLabel true a b", "@targetLabel true"):
        path = write(tmp_path / "a.ts", f"{label}\n@data\n1,2:5\n3,4:?\n5,6: ? \n")
        assert read_series(path, COLUMNS).labels == ["5", "?", "?"]
    path = write(tmp_path / "a.tsv", "1\t2\t3\n?\t4\t5\n")
    assert read_series(path, COLUMNS).labels == ["1", "?"]


def test_quoted_values_of_arff(tmp_path):
    """Against scipy's reader."""
    scipy_arff = pytest.importorskip("scipy.io.arff")
    head = "@relation x\n@attribute a real\n@attribute b integer\n"
    for mark in "'\"":
        kind = f"{{{mark}a, b{mark},{mark}c d{mark}}}"
        rows = f"1,2,{mark}a, b{mark}\n3,4,{mark}c d{mark}\n?,6,{mark}a, b{mark}\n"
        text = f"{head}@attribute class {kind}\n@data\n{rows}"
        table = read_series(write(tmp_path / "a.arff", text), COLUMNS)
        theirs, _ = scipy_arff.loadarff(tmp_path / "a.arff")
        assert table.labels == [label.decode() for label in theirs["class"]]
        assert_same(table, [[[row["a"], row["b"]]] for row in theirs])
        spaced = rows.replace(",", " , ").replace("a ,  b", "a, b")
        again = read_series(write(tmp_path / "b.arff", text.replace(rows, spaced)), COLUMNS)
        assert_same(again, table.series)
        assert again.labels == table.labels
    text = f'{head}@attribute class string\n@data\n1,2,\'it\\\'s\'\n3,4,"say \\"x\\""\n5,6,plain\n'
    table = read_series(write(tmp_path / "b.arff", text), COLUMNS)
    assert table.labels == ["it's", 'say "x"', "plain"]
    nested = (
        "@relation x\n@attribute all relational\n@attribute a numeric\n@attribute b numeric\n"
        "@end all\n@attribute class {'u, p',down}\n@data\n'1,2\\n3,?','u, p'\n\"5,6\\n7,8\",down\n"
    )
    table = read_series(write(tmp_path / "c.arff", nested), COLUMNS)
    assert_same(table, [[[1, 2], [3, np.nan]], [[5, 6], [7, 8]]])
    assert table.labels == ["u, p", "down"]


def test_rows_of_arff_that_do_not_fit_the_attributes(tmp_path):
    head = "@relation x\n@attribute a real\n@attribute b real\n@attribute age real\n@data\n"
    table = read_series(write(tmp_path / "a.arff", f"{head}1,2,3\n1,2\n1,2,3,4\n"), COLUMNS)
    assert table.labels is None and table.series[0].shape == (1, 3)
    assert table.series[1] == "2 values, the file states 3 attributes"
    assert table.series[2] == "4 values, the file states 3 attributes"
    table = read_series(tmp_path / "a.arff", replace(COLUMNS, labels=("age",)))
    assert table.labels[0] == "3" and table.subtask == "regression"
    write(tmp_path / "a.arff", f"{head}{{0 1, 2 3}}\n")
    with pytest.raises(UserError, match="sparse"):
        read_series(tmp_path / "a.arff", COLUMNS)


def test_one_column_of_another_name_than_in_most_files_of_a_folder(tmp_path):
    for name, column in {"a": "x", "b": "z", "c": "x", "d": "x"}.items():
        write(tmp_path / f"{name}.csv", f"time,{column}\n0,1\n1,2\n")
    table = read_series(tmp_path, COLUMNS)
    assert table.series[1] == "columns z, most files have x" and not table.notes
    for name in "ac":  # each has its own
        write(tmp_path / f"{name}.csv", f"time,{name}\n0,1\n1,2\n")
    assert_same(read_series(tmp_path, COLUMNS), [[[1, 2]]] * 4)


def test_csv_wide_and_long(tmp_path):
    wide = "id,label,t0,t1,t2\nx,a,1,,3\ny,b,4,5,6\n"
    table = read_series(write(tmp_path / "a.csv", wide), COLUMNS)
    assert_same(table, [[[1, np.nan, 3]], [[4, 5, 6]]])
    assert table.ids == ["x", "y"] and table.labels == ["a", "b"] and table.named
    # rows of two series among each other, and not in the order of their times
    long = "id;time;u;v;label\nx;1;2.5;-1;a\ny;0;4;6;b\nx;0;1;0;a\nx;2;NaN;3;a\ny;5;5;7;b\n"
    table = read_series(write(tmp_path / "b.csv", long), COLUMNS)
    assert_same(table)
    assert [times.tolist() for times in table.times] == [[0, 1, 2], [0, 5]]
    assert table.labels == ["a", "b"]


def test_what_is_wrong_with_a_series_of_a_table_is_its_line(tmp_path):
    long = "id,time,v,label\nx,0,1,a\nx,1,one,a\ny,0,1,a\ny,1,2,b\nz,zero,1,a\nz,1,2,a\nw,0,1,a\n"
    table = read_series(write(tmp_path / "b.csv", long), COLUMNS)
    said = table.series[:3]
    assert '"one"' in said[0] and "several values of label: a, b" in said[1] and '"zero"' in said[2]
    np.testing.assert_array_equal(table.series[3], [[1]])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("subject,t,v,label\n1,0,2,a\n1,1,3,a\n", 'column "subject" seems to hold ids'),
        ("id,t,v,label\n1,0,2,a\n1,1,3,a\n", 'column "t" seems to hold times'),
        ("series_id,v0,v1\n1,0,2\n2,1,3\n", "data.id_column, or the columns of the values"),
        ("Patient,time,v\n1,0,2\n1,1,3\n", 'column "Patient" seems to hold ids'),
        ("Time [s],v,label\n0,2,a\n1,3,b\n", 'column "Time [s]" seems to hold times'),
        ("x,timestamp,label\n0,2,a\n1,3,b\n", "data.time_column (a row a time point)"),
        ("Id,v0,v1,label\n0,2,3,a\n1,3,4,b\n", 'column "Id" is "id" in the spec'),
        ("id,Time,v,label\n0,2,3,a\n0,3,4,a\n", 'column "Time" is "time" in the spec'),
        ("id,time,v,Label\n0,2,3,1\n0,3,4,1\n", 'column "Label" is "label" in the spec'),
        ("id,zeit,v\n0,2,3\n0,3,4\n1,2,3\n1,3,4\n", '4 rows for 2 ids and no column "time"'),
        ("who,v0,v1\ns0,2,3\ns1,3,4\n", 'column "who" holds no number ("s0", "s1")'),
        ("id,day,v\n0,2024-01-01,3\n1,2024-01-02,4\n", 'column "day" holds no number'),
        ("Unnamed: 0,id,time,v\n0,a,0,3\n1,a,1,4\n", 'column "Unnamed: 0" has no name but what'),
        ("Unnamed: 0.1,Unnamed: 0,id,v,w\n0,0,a,0,3\n1,1,b,1,4\n", 'column "Unnamed: 0.1" has no'),
        ("Unnamed: 0,v,w\n0,3,1\n1,4,2\n", "data.id_column or data.time_column"),
        ("id,time,v,Unnamed: 3\na,0,3,\na,1,4,\n", 'column "Unnamed: 3" has no name'),
        ("index,id,time,v\n7,a,0,3\n3,a,1,4\n", 'column "index" numbers the rows: drop it'),
        ("id,patient,v,w\n0,5,3,1\n1,5,4,2\n", "seems to hold ids: name it in data.group_column"),
        ("label,site,t0,t1\na,5,3,1\nb,6,4,2\n", 'column "site" is named unlike time points'),
        ("id,Visit,0,1\na,5,3,1\nb,6,4,2\n", 'column "Visit" is named unlike time points'),
        ("label,t0,t1,t2,t3,age\na,5,3,1,1,2\nb,6,4,2,1,2\n", 'column "age" is named unlike'),
        ("label,0.5,1e0,-1,2,sex\na,5,3,1,1,2\nb,6,4,2,1,2\n", 'column "sex" is named unlike'),
        ("level_0,id,v,w\n0,a,0,3\n1,b,1,4\n", 'column "level_0" numbers the rows'),
        ("id,time,v,patient\na,0,2,7\na,1,3,7\nb,0,3,7\nb,1,2,7\n", "data.group_column"),
        ("id,time,Group,v\na,0,2,7\na,1,2,8\nb,0,3,7\n", 'column "Group" has one value in each'),
        ("id,time,subject_id,v\na,0,2,7\nb,0,3,7\n", "or the columns of the values in data.value"),
        ("id,time,v,arm\n0,2,3,left\n0,3,4,left\n", 'column "arm" holds no number ("left")'),
    ],
)
def test_tables_that_would_be_taken_for_others_are_refused(text, said, tmp_path):
    """Long ones whose times or ids have other names, and columns of text."""
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(UserError) as error:
        read_series(path, COLUMNS)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line", ["1.5", "-1", "0", "1e-3,2", "2024-01-01,2", "nan,2", "3,3", "0,1"]
)
def test_a_folder_of_files_without_a_header_is_refused(line, tmp_path):
    """The first value of each would be taken for a name and lost."""
    body = line.replace("nan", "1")
    write(tmp_path / "a.csv", f"{line}\n{body}\n{body}\n")
    write(tmp_path / "b.csv", f"{body}\n{body}\n")
    for said in read_series(tmp_path, COLUMNS).series:
        assert said.startswith("no header, its first line holds values (")


def test_numbers_are_names_where_the_spec_or_a_column_of_times_says_so(tmp_path):
    write(tmp_path / "a.csv", "0,1\n3,4\n5,6\n")
    for values, series in ((("1",), [[4, 6]]), (("1", "0"), [[4, 6], [3, 5]])):
        assert_same(read_series(tmp_path, replace(COLUMNS, values=values)), [series])
    assert_same(read_series(tmp_path, replace(COLUMNS, time="0")), [[[4, 6]]])
    write(tmp_path / "a.csv", "time,0,1\n0,3,4\n1,5,6\n")
    assert_same(read_series(tmp_path, COLUMNS), [[[3, 5], [4, 6]]])


@pytest.mark.parametrize(
    ("line", "is_row"),
    [
        ("0,1,2", False),
        ("4000.5,3998,1e3", True),
        ("4000.5,3998,3995.5", False),
        ("399.19,401.12,403.04,404.97", False),
        ("0,0.1,0.2,0.30000000000000004", False),
        ("0,0.1,0.2,0.4", True),
        ("1,2,4,8", True),
        ("2,3", True),
        ("1.0000e+00,2.0000e+00,3.0000e+00", False),
        ("2024-01-01,2024-01-02,2024-01-05", False),
        ("0,1,2,label", False),
        ("2,1,3", True),
        ("1,nan,3", True),
        ("-0.5,-0.25,-0.5", True),
        ("2024-01-01,2,3", True),
    ],
)
def test_numbers_in_the_header_of_a_wide_table_are_time_points(line, is_row, tmp_path):
    body = ",".join("a" if cell == "label" else "5" for cell in line.split(","))
    path = write(tmp_path / "a.csv", f"{line}\n{body}\n")
    if is_row:
        with pytest.raises(UserError, match=r"a.csv: no header, its first line holds values"):
            read_series(path, COLUMNS)
    else:
        points = line.removesuffix(",label").split(",")
        found = read_series(path, replace(COLUMNS, resampled=True)).columns
        assert list(found) == (points[::-1] if points[0] == "4000.5" else points)


@pytest.mark.parametrize("points", [(), ("t0", "t1", "t2"), ("0", "1", "2"), ("0.5", "1", "1.5")])
@pytest.mark.parametrize("style", ["%.18e", "%.4f", "%r", "%d", "%.6g"])
@pytest.mark.parametrize("shape", [2, 5, 40])
def test_no_first_series_of_a_table_without_a_header_is_lost(shape, style, points, tmp_path):
    """Series that rise or fall, as numpy and others write them; points of the model or none."""
    rng = np.random.default_rng(shape)
    for turn in range(20):
        values = rng.normal(scale=10, size=(4, shape))
        values[0] = np.sort(values[0])[:: 1 - 2 * (turn % 2)]
        if style == "%d":
            values[0] = np.arange(3, 3 + shape) ** 2
        lines = [",".join(style % cell for cell in row) for row in values.tolist()]
        path = write(tmp_path / "a.csv", "\n".join(lines))
        with pytest.raises(UserError, match=r"a.csv: (no header|two columns)"):
            read_series(path, replace(COLUMNS, points=points))


def test_a_straight_line_above_values_is_refused_or_told(tmp_path):
    """A first series by equal steps and time points are the same numbers: the format and the lines
    below tell most of them apart."""
    rng, line = np.random.default_rng(0), np.linspace(-1, 1, 9)
    np.savetxt(tmp_path / "a.csv", np.stack([line, *rng.normal(size=(3, 9))]), delimiter=",")
    lines = [",".join(map(str, (line + k).tolist())) for k in range(4)]
    write(tmp_path / "b.csv", "\n".join(lines))
    counts = np.arange(9) + np.arange(4)[:, None]
    np.savetxt(tmp_path / "c.csv", counts, delimiter=",", fmt="%d")
    for name in "abc":
        with pytest.raises(UserError, match="no header"):
            read_series(tmp_path / f"{name}.csv", COLUMNS)
    told = "the first line (0.0, 0.25, 0.5 and 6 more) is taken for the names of the time points"
    for start, notes in ((0, 1), (100, 0)):  # in the range of the values, and beyond it
        head = np.linspace(start, start + 2, 9).tolist()
        rows = [",".join(map(repr, row)) for row in (head, *rng.normal(size=(3, 9)).tolist())]
        table = read_series(write(tmp_path / "d.csv", "\n".join(rows)), COLUMNS)
        assert len(table.series) == 3 and len(table.notes) == notes
        assert all(told in note for note in table.notes)
    rows = ["0,1,2,3", "5,7,6,1", "1,0,2,9"]
    (note,) = read_series(write(tmp_path / "e.csv", "\n".join(rows)), COLUMNS).notes
    assert note.endswith("the first line (0, 1, 2 and 1 more) is taken for the names of the time "
                         "points, not for a series")  # fmt: skip


def test_time_points_of_a_model_are_known_again(tmp_path):
    for head, points, is_known in (
        ("0.1,0.5,3", ("0.1", "0.5", "3"), True),
        ("0.1,0.5,3", ("0.1", "0.5"), True),
        ("0.1,0.5", ("0.1", "0.5", "3"), True),
        ("0.1,0.5,3", ("0.1", "0.5", "4"), False),
        ("0,1,2", ("t0", "t1", "t2"), True),
        ("0.0,0.5,1.0", ("t0", "t1", "t2"), False),
        ("0.0,0.5,1.0", (), True),
    ):
        path = write(tmp_path / "a.csv", f"{head}\n" + ",".join("875"[: head.count(",") + 1]))
        columns = replace(COLUMNS, points=points, resampled=True)
        if is_known:
            assert ",".join(read_series(path, columns).columns) == head
        else:
            with pytest.raises(UserError, match="no header"):
                read_series(path, columns)


def test_time_points_of_a_wide_table_are_times(tmp_path):
    """As those of a long one: sorted, and refused where they are irregular; an index is none."""
    path = write(tmp_path / "a.csv", "label,0,10,5\na,1,3,2\nb,4,6,5\n")
    table = read_series(path, COLUMNS)
    assert_same(table, [[[1, 2, 3]], [[4, 5, 6]]])
    assert table.columns == ("0", "5", "10")
    assert [times.tolist() for times in table.times] == [[0, 5, 10]] * 2
    assert "put in the order of time (0, 5, 10)" in table.notes[0]
    index = write(tmp_path / "b.csv", "label,1,3,2\na,1,3,2\n")
    assert_same(read_series(index, COLUMNS), [[[1, 2, 3]]])
    assert read_series(index, COLUMNS).times is None
    resampled = replace(COLUMNS, resampled=True)
    assert read_series(index, resampled).times[0].tolist() == [1, 2, 3]
    rounded = write(tmp_path / "c.csv", "label,0.00,0.33,0.67,1.00\na,1,3,2,4\n")
    np.testing.assert_allclose(read_series(rounded, COLUMNS).times[0], np.arange(4) / 3)
    dates = write(tmp_path / "d.csv", "label,2024-03-01,2024-02-29\na,1,3\n")
    assert_same(read_series(dates, COLUMNS), [[[3, 1]]])
    named = write(tmp_path / "e.csv", "label,t0,t10,t9\na,1,3,2\n")
    assert_same(read_series(named, COLUMNS), [[[1, 3, 2]]])
    assert "t0, t10, t9, not in that of their numbers" in read_series(named, COLUMNS).notes[0]
    in_order = write(tmp_path / "g.csv", "label,t0,t9,t10\na,1,3,2\n")
    assert not read_series(in_order, COLUMNS).notes
    for head, told in (
        ("0,1,2,5,9", "irregular times|a gap from 2 to 5"),
        ("0,1,2.5,5,9", "irregular times, steps from 1 to 4"),
        ("0,1,10,2,3", "a gap from 3 to 10, steps are 1"),
        ("0,1,2,1.0,3", "time 1 occurs twice"),
        (
            "2024-01-01,2024-01-02,2024-01-05,2024-01-06",
            "a gap from 2024-01-02 00:00:00 to 2024-01-05",
        ),
    ):
        body = ",".join(map(str, range(head.count(",") + 1)))
        path = write(tmp_path / "f.csv", f"label,{head}\na,{body}\n")
        with pytest.raises(UserError, match=rf"f.csv: the columns are time points, {told}"):
            read_series(path, COLUMNS)
        own = replace(COLUMNS, values=tuple(head.split(",")))
        assert_same(read_series(path, own), [[np.arange(head.count(",") + 1)]])
        if "twice" not in told:
            assert read_series(path, resampled).times is not None


def test_rows_without_an_id_are_refused(tmp_path):
    wide = write(tmp_path / "a.csv", "id,x,y\np,1,2\n,2,3\nnan,3,4\n")
    with pytest.raises(UserError, match=r'column "id" for 2 of 3 rows \(row 2, 3, counted from 1'):
        read_series(wide, COLUMNS)
    long = write(tmp_path / "b.csv", "id,time,x\np,0,1\np,1,2\n ,0,3\n,1,4\n")
    with pytest.raises(UserError, match=r"b.csv: no id in column .* \(row 3, 4, counted"):
        read_series(long, COLUMNS)
    np.savez(tmp_path / "c.npz", series=np.zeros((3, 4)), ids=np.array(["p", "", "q"]))
    with pytest.raises(UserError, match=r"c.npz: no id in array ids for 1 of 3 rows \(row 2"):
        read_series(tmp_path / "c.npz", COLUMNS)


def test_columns_that_the_spec_names_are_values_whatever_they_are_called(tmp_path):
    path = write(tmp_path / "a.csv", "id,t,T1,label\n0,2,3,a\n1,3,4,b\n")
    assert_same(read_series(path, replace(COLUMNS, values=("t", "T1"))), [[[2, 3]], [[3, 4]]])
    path = write(tmp_path / "a.csv", "index,Unnamed: 0,id,time\n3,0,a,0\n4,1,a,1\n")
    assert_same(
        read_series(path, replace(COLUMNS, values=("index", "Unnamed: 0"))), [[[3, 4], [0, 1]]]
    )
    path = write(tmp_path / "a.csv", "Unnamed: 0,id,v\n0,a,3\n1,a,4\n")
    assert_same(read_series(path, replace(COLUMNS, time="Unnamed: 0")), [[[3, 4]]])
    text = "id,time,trial,patient\na,0,1,3\na,1,2,3\nb,0,3,4\nb,1,3,4\n"
    path = write(tmp_path / "a.csv", text.replace("patient", "x"))
    assert_same(read_series(path, COLUMNS), [[[1, 2], [3, 3]], [[3, 3], [4, 4]]])  # trial changes
    path = write(tmp_path / "a.csv", text)
    assert_same(read_series(path, replace(COLUMNS, group="patient")), [[[1, 2]], [[3, 3]]])
    assert_same(read_series(path, replace(COLUMNS, values=("patient",))), [[[3, 3]], [[4, 4]]])
    path = write(tmp_path / "a.csv", "index,id,time\n3,a,0\n4,a,1\n3,b,0\n")  # of fingers
    assert_same(read_series(path, COLUMNS), [[[3, 4]], [[3]]])
    path = write(tmp_path / "b.csv", "id,v0,v1,label\n0,one,3,a\n1,3,4,b\n2,,?,b\n")
    table = read_series(path, COLUMNS)
    assert '"one" (value 0) is no number' in table.series[0]
    assert_same(replace(table, series=table.series[1:2]), [[[3, 4]]])


def test_files_of_a_folder_go_by_the_names_of_their_columns(tmp_path):
    rows = "0,1,5\n1,2,4\n2,4,4\n"
    heads = {"a": "time,x,z", "b": "time,x,y", "c": "time,x,y", "d": "time,y,x"}
    heads |= {"e": "time,x,z", "f": "x,y"}
    for name, head in heads.items():
        body = rows if head.startswith("time") else "1,5\n2,4\n4,4\n"
        write(tmp_path / f"{name}.csv", f"{head}\n{body}")
    table = read_series(tmp_path, COLUMNS)
    said = dict(zip(table.ids, table.series, strict=True))
    assert said["a"] == said["e"] == "columns x, z, most files have x, y"
    assert said["f"] == 'no times (column "time"), most files have some'
    assert said["b"].tolist() == said["d"][::-1].tolist() == [[1, 2, 4], [5, 4, 4]]
    assert table.columns == ("x", "y")
    assert [note.partition(": ")[2] for note in table.notes] == [
        "the columns of d stand in another order than in the file before with the same ones: "
        "matched by name"
    ]
    for name in "bf":
        (tmp_path / f"{name}.csv").unlink()
    write(tmp_path / "e.csv", f"time,z,x\n{rows}")
    with pytest.raises(UserError, match=r"different names, as .x, z., .x, y., .* share x: rename"):
        read_series(tmp_path, COLUMNS)  # no more than half have the same
    table = read_series(tmp_path, replace(COLUMNS, values=("x",)))
    assert [one.shape for one in table.series] == [(1, 3)] * 4 and not table.notes


@pytest.mark.parametrize(
    ("first", "other", "said"),
    [
        ("x,y", "y,z", "share y"),
        ("x,y", "Y,x", "share x, y"),
        ("x,y", "Y,X", "share x, y"),
        ("x,y", "x,y,z", "share x, y"),
        ("x,y", "X,Y", None),
        ("x,y", "u,v", None),
    ],
)
def test_names_that_half_the_files_of_a_folder_have(first, other, said, tmp_path):
    """Different ones are taken in order, which is wrong where a name stands in both."""
    for name, head in {"a": first, "b": other, "c": other, "d": first}.items():
        cells = ",".join("123"[: len(head.split(","))])
        write(tmp_path / f"{name}.csv", f"time,{head}\n0,{cells}\n1,{cells}\n")
    if said is not None:
        with pytest.raises(UserError, match=f"{said}: rename them, or name"):
            read_series(tmp_path, COLUMNS)
    else:
        table = read_series(tmp_path, COLUMNS)
        assert_same(table, [[[1, 1], [2, 2]]] * 4)
        assert "taken in the order in which they stand" in table.notes[0]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    channels=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_arrays_with_lengths_and_with_offsets(lengths, channels, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrays")
    rng = np.random.default_rng(seed)
    series = [rng.standard_normal((channels, length)) for length in lengths]
    padded = np.zeros((len(series), channels, max(lengths)))
    for row, one in zip(padded, series, strict=True):
        row[:, : one.shape[1]] = one
    labels = np.arange(len(series))
    np.savez(folder / "a.npz", series=padded, lengths=np.array(lengths), labels=labels)
    rows, offsets = np.concatenate([one.T for one in series]), np.cumsum([0, *lengths])
    ids = np.array([f"s{i}" for i in labels])
    np.savez(folder / "b.npz", series=rows, offsets=offsets, ids=ids)
    first, second = (read_series(folder / name, COLUMNS) for name in ("a.npz", "b.npz"))
    assert_same(first, series)
    assert_same(second, series)
    assert second.ids == ids.tolist() and second.labels is None
    assert first.labels.tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("b.npy", np.array(3.0), "an array of shape (), a series is (T,) or (C, T)"),
        ("b.npy", np.ones((1, 2, 3)), "an array of shape (1, 2, 3), a series is (T,) or (C, T)"),
        ("b.NPY", np.array(["x", "y"]), "no numbers"),
        ("b.npy", np.ones((2, 3)) * 1j, "no numbers"),
        ("b.npy", b"junk", "not an array that can be read"),
        ("b.npy", b"", "not an array that can be read"),
        ("b.npy", b"PK\x03\x04" + bytes(99), "not an array that can be read"),
        ("b.npy", b"\x93NUMPY\x01\x00v\x00{'descr': ((" + bytes(101), "not an array that"),
        ("b.npy", b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f8', 'fortran_order': False, "
         b"'shape': (9999999, 99999999), }".ljust(118), "not an array that can be read"),
        ("b.csv", b"", "no header"),
        ("b.csv", b"time\n0\n1\n", "no column of values beside time"),
        ("b.csv", b"time,u,u\n0,1,2\n1,2,3\n", "two columns have the same name: u"),
        ("b.CSV", b"time,u\n0,1\n1,one\n", '"one" (value 1) is no number'),
        ("b.csv", b"\xff\xfe\x00", "UTF-8"),
    ],
)  # fmt: skip
def test_files_of_a_folder_that_are_no_series_are_a_line_each(name, content, said, tmp_path):
    np.save(tmp_path / "a.npy", SERIES[0])
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        with open(tmp_path / name, "wb") as file:
            np.save(file, content)
    table = read_series(tmp_path, COLUMNS)
    assert table.ids == ["a", "b"]
    np.testing.assert_array_equal(table.series[0], SERIES[0])
    assert said in table.series[1] and "\n" not in table.series[1]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"offsets": np.array(["a", "b"])}, "offsets must be whole numbers"),
        ({"lengths": np.array(["2", "3"])}, "lengths must be whole numbers"),
        ({"lengths": np.array([2.5, 3])}, "lengths must be whole numbers"),
        ({"lengths": np.array([np.nan, 3])}, "lengths must be whole numbers"),
        ({"series": np.ones((0, 3)), "times": np.arange(3)}, "no series"),
        ({"series": np.array(["a"])}, "no numbers"),
        ({"labels": np.array([None, 1])}, "not arrays that can be read"),
    ],
)
def test_arrays_of_a_file_that_do_not_fit_are_one_line(arrays, said, tmp_path):
    np.savez(tmp_path / "a.npz", **{"series": np.ones((2, 3)), **arrays})
    with pytest.raises(UserError, match=r"a\.npz") as error:
        read_series(tmp_path / "a.npz", COLUMNS)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("write_arrays", [np.savez, np.savez_compressed])
def test_damaged_arrays_are_one_line(write_arrays, tmp_path):
    """Bytes changed and files cut, also of a file that has the suffix of the other kind."""
    rng = np.random.default_rng(0)
    write_arrays(tmp_path / "a.npz", series=rng.normal(size=(3, 2, 6)))
    np.save(tmp_path / "b.npy", rng.normal(size=(2, 6)))
    whole = {name: (tmp_path / name).read_bytes() for name in ("a.npz", "b.npy")}
    broken = [("a.npz", whole["b.npy"]), ("b.npy", whole["a.npz"])]
    for number in range(300):
        name = ("a.npz", "b.npy")[number % 2]
        data = bytearray(whole[name])
        data[rng.integers(len(data) if number % 2 == 0 else 90)] = rng.integers(256)
        broken.append((name, bytes(data[: rng.integers(len(data))] if number % 5 == 0 else data)))
    refused = 0
    for name, data in broken:
        (tmp_path / name).write_bytes(data)
        try:
            read_series(tmp_path / name, COLUMNS)
        except UserError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
    assert refused > 150


def test_npy_and_a_folder_of_one_file_each(tmp_path):
    np.save(tmp_path / "flat.npy", np.arange(6).reshape(2, 3))
    assert_same(read_series(tmp_path / "flat.npy", COLUMNS), [[[0, 1, 2]], [[3, 4, 5]]])
    folder = tmp_path / "folder"
    folder.mkdir()
    np.save(folder / "b.npy", SERIES[0])
    write(folder / "a.csv", "time,u,v\n0,4,6\n1,5,7\n")
    table = read_series(folder, COLUMNS)
    assert table.ids == ["a", "b"]
    assert_same(table, SERIES[::-1])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.ts", "@classLabel true 1 2\n1,2:1\n", "@data"),
        ("a.arff", "1,2,3\n", "@attribute"),
        ("a.npy", "no array", "array"),
        ("a.npz", "no arrays", "arrays"),
        ("a.csv", "time,v\n0,1\n", 'no column "id"'),
        ("a.csv", "id,label\nx,a\n", "data.value_columns"),
        ("a.ts", "@classLabel true 1\n@data\n", "no series"),
        ("a.txt", "", "known are .ts"),
    ],
)
def test_files_that_are_wrong_as_a_whole(name, content, said, tmp_path):
    with pytest.raises(UserError, match="a\\.") as error:
        read_series(write(tmp_path / name, content), COLUMNS)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(AEON is None, reason="the files are in aeon")
@pytest.mark.parametrize("name", ["GunPoint", "BasicMotions", "JapaneseVowels", "UnitTest"])
def test_files_of_aeon_are_what_its_loader_reads(name):
    pytest.importorskip("aeon", minversion="1.4")
    loaders = pytest.importorskip("aeon.datasets")
    folder = Path(AEON.origin).parent / "datasets" / "data" / name
    for path in sorted(folder.glob(f"{name}_TRAIN.*")):
        values, labels = getattr(loaders, f"load_from_{path.suffix[1:]}_file")(str(path))
        table = read_series(path, COLUMNS)
        assert_same(table, list(values))
        assert [label.lower() for label in table.labels] == [str(label).lower() for label in labels]


# -------------------------------------------------------------------------------- preparation


def prepared(values, times=None, **fields):
    times = None if times is None else np.array(times, float)
    return prepare(np.array(values, float), times, SeriesPreparation(**fields))


@settings(max_examples=50, deadline=None)
@given(
    arrays(
        np.float64,
        st.tuples(st.integers(1, 3), st.integers(2, 12)),
        elements=st.floats(-1e6, 1e6) | st.just(float("nan")),
    ),
    st.sampled_from(["linear", "previous", "zero"]),
)
def test_what_is_prepared_is_finite_and_standardised(values, rule):
    found = prepared(values, fill=rule)
    if isinstance(found, str):
        return
    assert np.isfinite(found.values).all() and found.there[-1]
    for channel, own in zip(found.values, values[:, : found.values.shape[1]], strict=True):
        known = channel[~np.isnan(own)]
        if len(known) and channel.any():
            assert abs(known.mean()) < 1e-4 and abs(known.std() - 1) < 1e-4


def test_missing_values_are_filled_by_the_rule_and_marked():
    values = [[np.nan, 2, np.nan, np.nan, 8], [1, np.nan, 3, np.nan, 5]]
    expected = {
        "linear": [[2, 2, 4, 6, 8], [1, 2, 3, 4, 5]],
        "previous": [[2, 2, 2, 2, 8], [1, 1, 3, 3, 5]],
        "zero": [[0, 2, 0, 0, 8], [1, 0, 3, 0, 5]],
    }
    for rule, filled in expected.items():
        found = prepared(values, fill=rule, normalize="none")
        np.testing.assert_array_equal(found.values, np.array(filled, np.float32))
        assert found.there.tolist() == [True, True, True, False, True]
    marked = prepared(values, mask_channels=True).values
    np.testing.assert_array_equal(marked[2:], ~np.isnan(values))
    assert fill(np.full(3, np.nan), np.zeros(3, bool), "linear").tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("values", "times", "said"),
    [
        ([[1.0]], None, "a single value"),
        ([[3, 3, 3]], None, "constant: every value is 3"),
        ([[3, 3], [4, 4]], None, "constant in every channel"),
        ([[np.nan, np.nan]], None, "no value"),
        ([[1, np.inf]], None, "an infinite value in channel 0 at time point 1"),
        ([[1, 2, 3]], [0, 1, 1], "time 1 occurs twice"),
        ([[1, 2, 3]], [0, 2, 1], "do not ascend"),
        ([[1, 2, 3, 4]], [0, 1, 2, 5], "a gap from 2 to 5, steps are 1"),
        ([[1, 2, 3, 4]], [0, 1, 2.3, 3.1], "irregular times"),
    ],
)
def test_what_cannot_be_used_is_said(values, times, said):
    assert said in prepared(values, times)


def test_values_beyond_float32_are_refused_unless_they_are_standardised():
    assert "too large" in prepared([[1e39, -1e39]], normalize="none")
    np.testing.assert_array_equal(prepared([[1e39, -1e39]]).values, [[1, -1]])


def test_irregular_times_are_resampled():
    found = prepared([[0, 1, 4, 5]], [0, 1, 4, 5], step=1, normalize="none", fill="zero")
    np.testing.assert_allclose(found.values, [[0, 1, 0, 0, 4, 5]])
    assert found.there.tolist() == [True, True, False, False, True, True]
    found = prepared([[0, 3, 4]], [0, 1.5, 2], step=0.5, normalize="none")
    np.testing.assert_allclose(found.values, [[0, 1, 2, 3, 4]])
    assert found.step == 0.5


@pytest.mark.parametrize("step", [1e-320, 1e-9, 0.4])
def test_a_step_that_is_far_too_small_is_one_line(step):
    """Without the memory that its time points would take."""
    said = prepared([[1, 2, 4]], [0, 800, 1300], step=step)
    assert f"step = {step:g} makes" in said and "of its 3, which reach over 1300: 3000" in said
    assert prepared([[1, 2, 4]], [0, 800, 1300], step=0.5).values.shape == (1, 2601)
    days = np.datetime64("2024-01-01") + np.arange(20) * np.timedelta64(1, "D")
    values = np.arange(20.0)[None]
    assert "which reach over 1.6416e+06: 20000 are the most" in prepare(
        values, days, SeriesPreparation(step=1e-6)
    )
    assert prepare(values, days, SeriesPreparation(step=3600)).values.shape == (1, 19 * 24 + 1)


@pytest.mark.parametrize(
    ("times", "step"),
    [
        (np.arange(-100, 101).astype(np.int8), 1),
        (np.arange(0, 256, 2).astype(np.uint8), 2),
        (np.arange(-32000, 32001, 250).astype(">i2"), 250),
        (np.arange(-(2 * 10**9), 2 * 10**9 + 1, 10**7).astype(np.int32), 10**7),
        (np.uint64(17 * 10**17) + np.arange(201, dtype=np.uint64) * np.uint64(100), 100),
        (np.uint64(2**63 - 300) + np.arange(201, dtype=np.uint64) * np.uint64(3), 3),
        (np.arange(5, dtype=np.uint64) * np.uint64(2**62 - 1), 2**62 - 1),
        (np.arange(-4, 5) * (2**60 - 1), 2**60 - 1),
        (np.arange(-50000, 50001, 1000).astype(np.float16), 1000),
        (np.arange("1700", "2009", dtype="datetime64[Y]").astype(">M8[ns]"), None),
        (np.arange("2024-01-01", "2024-03-01", dtype="M8[D]").astype(">M8[D]"), 86400),
        (np.arange("2024-01-01", "2024-01-03", dtype="M8[36m]"), 36 * 60),
        (np.arange(5).astype("M8[fs]"), 1e-15),
    ],
    ids=lambda value: value.dtype.str if isinstance(value, np.ndarray) else None,
)
def test_times_of_every_type_are_right(times, step, tmp_path):
    """Against their differences in whole numbers without end."""
    values = np.sin(np.arange(2.0 * len(times))).reshape(2, -1)
    np.savez(tmp_path / "a.npz", series=values, times=times)
    table = read_series(tmp_path / "a.npz", COLUMNS)
    read = table.times[1]
    if times.dtype.kind in "iu":
        whole = times.tolist()
        exact = np.array([time - whole[0] for time in whole], np.float64)
        np.testing.assert_array_equal(since_first(read), exact)
    if step is None:  # years are not of one length
        assert "irregular times" in prepare(values[:1], read, SeriesPreparation())
        assert since_first(read)[-1] == (date(2008, 1, 1) - date(1700, 1, 1)).total_seconds()
    else:
        found = prepare(table.series[1][None, 0], read, SeriesPreparation())
        assert found.step == pytest.approx(step, rel=1e-12)


@pytest.mark.parametrize("count", [1, 7])
def test_dates_of_every_unit_are_apart_by_their_seconds(count):
    fine = ("ms", "us", "ns", "ps", "fs", "as")
    exact = {"W": 604800, "D": 86400, "h": 3600, "m": 60, "s": 1}
    exact |= {unit: Fraction(1, 1000**k) for k, unit in enumerate(fine, 1)}
    for unit, seconds in exact.items():
        times = np.array([-3, 4, 10], np.int64).view(f"datetime64[{count}{unit}]")
        wanted = [float(ticks * count * seconds) for ticks in (0, 7, 13)]
        assert since_first(times).tolist() == wanted


def test_months_count_from_their_first_days():
    months = np.array(["2024-01", "2024-02", "2024-03"], "datetime64[M]")
    assert since_first(months).tolist() == [0, 31 * 86400, 60 * 86400]
    assert since_first(time_numbers(["2024-01", "2024-02", "2024-03"])).tolist() == [
        *since_first(months)
    ]


def test_close_times_far_from_the_first_are_two():
    times = np.array([0, 10**17, 10**17 + 1])
    found = prepare(np.array([[1.0, 2, 3]]), times, SeriesPreparation(step=1e16))
    assert found.values.shape == (1, 11)
    times[2] -= 1
    assert "time 100000000000000000 occurs twice" in prepare(
        np.array([[1.0, 2, 3]]), times, SeriesPreparation(step=1e16)
    )


def test_dates_lose_no_digit():
    """What pandas reads, of every rate and zone; steps are those of whole numbers of units."""
    pandas = pytest.importorskip("pandas")
    first = np.datetime64("2024-03-01T00:00:00", "ns")
    for step, zone in ((1, ""), (200_000, "Z"), (10**9, "+01:00"), (86400 * 10**9, "-0330")):
        dates = first + step * np.arange(5) * np.timedelta64(1, "ns")
        for written in (dates.astype(str), np.char.replace(dates.astype(str), "T", " ")):
            cells = [cell + zone for cell in written]
            found = time_numbers(cells)
            read = pandas.to_datetime(cells, utc=True).tz_localize(None)
            np.testing.assert_array_equal(found, read)
            assert prepare(np.array([[1.0, 2, 4, 3, 1]]), found, SeriesPreparation()).step == (
                pytest.approx(step / 1e9, rel=1e-12)
            )
    winter = time_numbers(["2024-10-27 02:30:00+02:00", "2024-10-27 02:30+01"])
    assert since_first(winter).tolist() == [0, 3600]
    assert since_first(time_numbers(["1200-01-01", "1200-01-03"])).tolist() == [0, 172800]
    assert (
        since_first(time_numbers(["1700000000000000001", "1700000000000000004"])).tolist()[1] == 3
    )
    numbered = np.array([f"{1.7e9 + k * 2e-4:.4f}" for k in range(50)])
    values = np.arange(50.0)[None]
    assert prepare(values, time_numbers(numbered), SeriesPreparation()).step is not None
    shifted = np.where(np.arange(50) == 20, 1.7e9 + 20.1 * 2e-4, numbered.astype(float))
    assert "irregular" in prepare(values, shifted, SeriesPreparation())


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (["0", "1", "2024-01-01"], 'time "0" (value 0) is no date, as "2024-01-01" is'),
        (["2024-01-01", "7"], 'time "7" (value 1) is no date, as "2024-01-01" is'),
        (["2024-01-01", "2024-02-30"], "a time is no date: Day out of range"),
        (["01.02.2024"], "neither a number nor a date such as"),
        (["2024-01-01", ""], "a time is missing"),
        (["2024-01-01", "NaT"], "a time is missing"),
        (["1", "nan"], "a time is missing"),
        (["1", "inf"], "a time is missing"),
    ],
)
def test_times_that_are_none_are_said(cells, said):
    assert said in time_numbers(cells)


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-06"], "gap from 2024-01-03 00:00:00"),
        (["2024-01-01T00:00:00.000200", "2024-01-01T00:00:00.0002"], "00:00:00.0002 occurs twice"),
        (["1700000000010", "1700000000010"], "time 1700000000010 occurs twice"),
        (["1.0000001", "1.00000010"], "time 1.0000001 occurs twice"),
    ],
)
def test_times_are_named_with_their_digits(times, said):
    values = np.arange(float(len(times)))[None]
    assert said in prepare(values, time_numbers(times), SeriesPreparation())


def test_one_damaged_time_is_of_its_series_alone(tmp_path):
    rows = [f"{name},{time},{time * time}" for name in "xyz" for time in range(4)]
    rows[5] = "y,2024-01-01,1"
    table = read_series(write(tmp_path / "a.csv", "\n".join(["id,time,v", *rows])), COLUMNS)
    assert "is no date" in table.series[1]
    assert [table.times[place].tolist() for place in (0, 2)] == [[0, 1, 2, 3]] * 2


def test_times_of_one_series_take_no_digit_from_others(tmp_path):
    """One date that nanoseconds do not reach, one decimal among long whole numbers."""
    nano = [f"2024-03-01T00:00:00.{k * 100:09}" for k in range(5)]
    whole = [str(1_700_000_000_000_000_000 + k) for k in range(5)]
    for usual, odd, step, said in (
        (nano, "9999-12-31", 1e-7, "beside nanoseconds as of"),
        (nano, "0024-03-01", 1e-7, "beside nanoseconds as of"),
        (nano, "2024-03-01T00:00:00.0000003001", 1e-7, "has digits beyond nanoseconds"),
        (whole, "1.5", 1, None),
    ):
        rows = [f"{name},{time},{k * k}" for name in "xyz" for k, time in enumerate(usual)]
        rows[7] = f"y,{odd},1"
        table = read_series(write(tmp_path / "a.csv", "\n".join(["id,time,v", *rows])), COLUMNS)
        for place in (0, 2):
            found = prepare(table.series[place], table.times[place], SeriesPreparation())
            assert found.step == pytest.approx(step, rel=1e-12)
        if said is None:
            assert "occurs twice" in prepare(table.series[1], table.times[1], SeriesPreparation())
        else:
            assert f'time "{odd}" (value 2)' in table.series[1] and said in table.series[1]
    assert time_numbers(["9999-12-31", "2024-03-01T00:00:00.000100000"]).dtype == "datetime64[us]"


def test_times_of_arrays_are_kept_as_they_are(tmp_path):
    values = np.random.default_rng(0).normal(size=(2, 4))
    dates = np.datetime64("2024-01-01", "ms") + np.arange(8).reshape(2, 4)
    for times, step in ((dates, 1e-3), (dates.astype(int) * 10**6, 1e6), (dates.astype(float), 1)):
        np.savez(tmp_path / "a.npz", series=values, times=times)
        table = read_series(tmp_path / "a.npz", COLUMNS)
        found = prepare(table.series[1], table.times[1], SeriesPreparation())
        assert found.step == pytest.approx(step, rel=1e-12)
    missing = dates.copy()
    missing[0, 1] = "NaT"
    assert prepare(values[:1], missing[0], SeriesPreparation()) == "a time is missing"


def test_numbers_are_read_as_they_are_written():
    assert numbers(["1", "", " 2e3 ", "?", "NA"])[[0, 2]].tolist() == [1, 2000]
    assert np.isnan(numbers(["1", "", "2", "?", "NA"])[[1, 3, 4]]).all()
    assert '"1_0" (value 1)' in numbers(["1", "1_0"])


def test_a_wide_table_ends_where_its_cells_are_empty(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["label", "a", "b", "c"], ["x", 1, 2, ""], ["y", 1, 2, 3]])
    table = read_series(tmp_path / "a.csv", COLUMNS)
    lengths = [prepare(one, None, SeriesPreparation()).values.shape[1] for one in table.series]
    assert lengths == [2, 3]


@pytest.mark.parametrize(
    "text", [",0,1,label\n0,3,4,a\n1,5,7,b\n", "id,time,x,\ns,0,1,7\ns,1,2,8\n"]
)
def test_a_column_without_a_name_is_no_value(tmp_path, text):
    """Pandas writes its index so: it would tell the classes by the order of the rows."""
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"a.csv: column . has no name.*index=False"):
        read_series(path, COLUMNS)
    named = ("0", "1") if "label" in text else ("x",)
    values = read_series(path, replace(COLUMNS, values=named)).series[0]
    assert values.tolist() == ([[3, 4]] if "label" in text else [[1, 2]])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.csv").write_text(",x\n0,1\n1,2\n")
    (line,) = read_series(tmp_path / "folder", COLUMNS).series
    assert "column 1 has no name" in line


def test_a_constant_group_in_files_of_one_series_each_is_no_channel(tmp_path):
    for name, site in (("a", 1), ("b", 2)):
        write(tmp_path / f"{name}.csv", f"x,site\n0.5,{site}\n1.5,{site}\n")
    for said in read_series(tmp_path, COLUMNS).series:
        assert 'column "site" has one value in each series' in said and "group_column" not in said
    table = read_series(tmp_path, replace(COLUMNS, values=("x", "site")))
    assert_same(table, [[[0.5, 1.5], [1, 1]], [[0.5, 1.5], [2, 2]]])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("suffix", ["npy", "csv", "CSV"])
def test_a_pipe_in_a_folder_is_no_series_and_waits_for_nobody(tmp_path, suffix):
    np.save(tmp_path / "a.npy", np.arange(5.0))
    os.mkfifo(tmp_path / f"p.{suffix}")
    (tmp_path / "folder.csv").mkdir()
    table = read_series(tmp_path, COLUMNS)
    found = dict(zip(table.ids, table.series, strict=True))
    assert found["p"] == "not a file, but a pipe or a device"
    assert isinstance(found["folder"], str) and found["a"].tolist() == [[0, 1, 2, 3, 4]]
