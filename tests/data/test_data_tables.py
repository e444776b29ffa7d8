"""Data sets of one's own files: what is read, and how what is wrong is named."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_iris, load_wine

from beyondprop.data import Dataset, from_arrays, is_file_form, names, read_file

WINE = """\
"fixed acidity";"pH";"color";"quality"
7.4;3.51;"red";5
7.8;3.2;"red";6

6.3;3.3;"white";6
8.1;-3e-1;"red, dry";5
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _read(text: str, options: str, name: str = "a.csv") -> Dataset:
    Path(name).write_bytes(text.encode())
    return read_file(f"{name}:{options}")


def _same(one: Dataset, two: Dataset) -> None:
    for key in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(one, key), getattr(two, key)), key


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "text", [WINE, "\ufeff" + WINE, WINE.replace("\n", "\r\n"), WINE.replace(";", "\t"), WINE.strip()]
)
def test_a_table_of_wines(text: str) -> None:
    # The rows are all in the training part, and as many as make the numbers easy to see.
    labels = _read(text, "target=quality:drop=color:test=0")
    assert (labels.name, labels.classes, labels.features) == ("a.csv", ("5", "6"), ("fixed acidity", "pH"))
    assert labels.y_train.tolist() == [0, 1, 1, 0]
    x = np.array([[7.4, 3.51], [7.8, 3.2], [6.3, 3.3], [8.1, -0.3]])
    np.testing.assert_allclose(labels.x_train, (x - x.mean(0)) / x.std(0), rtol=1e-5)
    colors = _read(text, "target=color:test=0")
    assert (colors.classes, colors.y_train.tolist()) == (("red", "red, dry", "white"), [0, 0, 2, 1])
    numbers = _read(text, "target=quality,pH:drop=color:test=1")
    assert (numbers.targets, numbers.features, len(numbers.y_test)) == (("quality", "pH"), ("fixed acidity",), 1)
    forced = _read(text, "target=quality:drop=color:test=0:kind=regression")
    assert forced.y_train.tolist() == [[-1], [1], [1], [-1]]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("load", "labels"), [(load_iris, True), (load_wine, True), (load_diabetes, False)])
def test_a_written_set_is_read_back(load: Any, labels: bool) -> None:
    found = load()
    lines = [",".join([*found.feature_names, "target"])]
    for row, target in zip(found.data.tolist(), found.target.tolist(), strict=True):
        lines.append(",".join(map(str, [*row, found.target_names[target] if labels else target])))
    data = _read("\n".join(lines), "target=target:test=0.3:seed=4")
    _same(data, from_arrays(found.data, found.target, test=0.3, seed=4))
    assert data.classes == (tuple(found.target_names) if labels else ())
    assert data.features == tuple(found.feature_names)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "2.0"] * 20, "classification"),
        ([str(i % 20) for i in range(40)], "classification"),
        ([str(i % 21) for i in range(84)], "regression"),  # 21 different values
        ([str(i % 20) for i in range(39)], "regression"),  # not twice each
        (["1", "2.5"] * 20, "regression"),
        (["1", "b"] * 20, "classification"),
    ],
)
def test_what_a_target_is(values: list[str], kind: str) -> None:
    text = "\n".join(["x,y", *(f"{row},{value}" for row, value in enumerate(values))])
    assert _read(text, "target=y:test=0").kind == kind


@pytest.mark.usefixtures("folder")
def test_other_separators() -> None:
    assert _read("a b\n1 2\n3 4\n", "target=b:sep=space:test=0", "a.txt").features == ("a",)
    assert _read("a|b\n1|2\n3|4\n", "target=b:sep=|:test=0:kind=classification", "a.TSV").classes == ("2", "4")
    spaced = _read('a , "b"\n1 , "u"\n 2, v \n', "target=b:test=0")
    assert (spaced.features, spaced.classes) == (("a",), ("u", "v"))
    assert _read('"a,b"\t c\n1\t2\n', "target=c:sep=tab:test=0").features == ("a,b",)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            WINE,
            "target=quality",
            r"line 2 of a.csv has 'red' in column 'color'; inputs must be numbers; drop=color leaves",
        ),
        (WINE, "target=pH:drop=quality", r"drop=quality,color leaves out every such column"),
        (
            "a,b\n1,2\n3,x\n",
            "target=b:kind=regression",
            r"line 3 of a.csv has 'x' in column 'b'; targets of a regression",
        ),
        ("a,b,c\n1,2,3\n3,x,5\n", "target=a,b", r"line 3 of a.csv has 'x' in column 'b'"),
        ("a,b,c\n1,2,3\n1,2_0,3\n", "target=c", r"line 3 of a.csv has '2_0' in column 'b'"),
        (
            "a,b,c\n1,2,3\n\n1,inf,3\n",
            "target=c",
            r"x has inf in line 4 of a.csv, column 'b'; its values must be finite",
        ),
        ('a,b\n"x\ny",1\n', "target=b", r"line 2 of a.csv has 'x\\ny' in column 'a'"),
        ('a,b\n1,"x\ny"\nz,z\n', "target=b", r"line 4 of a.csv has 'z' in column 'a'"),
        ("a,b\n1,2.5\n1,3\n", "target=b:kind=classification", r"y has 2.5 in line 2 of a.csv; .*whole numbers"),
        (
            WINE,
            "target=qualty",
            r"no column 'qualty'; perhaps you meant 'quality'. Its columns: fixed acidity, pH, color,",
        ),
        (WINE, "target=quality:drop=colour", r"no column 'colour'; perhaps you meant 'color'"),
        (WINE, "target=quality:drop=quality", r"column 'quality' of a.csv is named twice"),
        (WINE, "target=quality:drop=color,pH,fixed acidity", r"no column for inputs besides quality, color, pH"),
        (WINE, "test=0", r"a.csv needs target=COLUMN, one of: fixed acidity, pH, color, quality"),
        (
            WINE,
            "traget=color",
            r"option of the file must be one of 'target', .* got 'traget'; perhaps you meant 'target'",
        ),
        (WINE, "target", r"option target must be given once, as target=VALUE, got 'target'"),
        (WINE, "target=", r"option target must be given once"),
        (WINE, "target=pH:target=pH", r"option target must be given once"),
        (WINE, "target=color:kind=labels", r"kind must be one of 'classification', 'regression', got 'labels'"),
        (WINE, "target=color:test=few", r"test must be a number, got 'few'"),
        (WINE, "target=pH:drop=color:test=4", r"test must be a share .* got 4 of 4 rows"),
        (WINE, "target=color:seed=0.5", r"seed must be a number, got '0.5'"),
        (WINE, f"target=color:seed={2**64}", r"seed must be an integer in 0 … 2\^64 - 1"),
        *((WINE, f"target=color:sep={sep}", r"sep must be one character or comma, .* no quote") for sep in '"\n\r'),
        (WINE, "target=color:sep=;;", r"sep must be one character or comma, semicolon, tab"),
        ("", "target=a", r"must have a line of column names and rows after it, got 0 lines"),
        ("a,b\n", "target=a", r"must have a line of column names and rows after it, got 1 lines"),
        ("1,2\n3,4\n", "target=1", r"must begin with a line of column names; it begins with numbers: 1, 2"),
        ("a,b,a\n1,2,3\n", "target=a", r"column 3 has the name of an earlier one, 'a'"),
        (",b,a\n1,2,3\n", "target=a", r"column 1 has no name"),
        ("a b\n1 2\n", "target=a", r"has the single column 'a b'; name its separator with sep="),
        ("a,b\n1,2\n\n3\n", "target=a", r"line 4 of a.csv has 1 values; the first line has 2 names"),
        ("a,b\n1,2,3\n", "target=a", r"line 2 of a.csv has 3 values"),
        ('a,b\n1,2\n"3,4\n5,6\n', "target=a", r"line 3 of a.csv cannot be read: unexpected end of data"),
    ],
)
def test_what_is_wrong_is_named(text: str, options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _read(text, options)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("missing", ["", " ", "?", "NA", "nan", "NULL"])
def test_missing_values_are_refused_by_line(missing: str) -> None:
    text = f"a,b,c\n1,2,0\n3,{missing},0\n5,6,1\n"
    with pytest.raises(ValueError, match=r"line 3 of a.csv has no value in column 'b'; inputs must be numbers; drop=b"):
        _read(text, "target=c")
    for options in ("target=b:drop=c", "target=a,b", "target=b:drop=c:kind=classification"):
        with pytest.raises(ValueError, match=r"line 3 of a.csv has no value in column 'b'; a target must have one"):
            _read(text, options)
    assert _read(text, "target=c:drop=b:test=0").features == ("a",)


def test_files_that_are_no_tables(folder: Path) -> None:
    (folder / "a.csv").write_bytes("a,b\n1,é\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.csv must be text in UTF-8"):
        read_file("a.csv:target=b")
    with pytest.raises(FileNotFoundError, match=r"There is no file 'b.csv'"):
        read_file("b.csv:target=b")
    with pytest.raises(FileNotFoundError, match=r"There is no file 'C:\\\\data\\\\b.csv'"):
        read_file("C:\\data\\b.csv:target=b")
    with pytest.raises(
        ValueError, match=r"'a.xls' must be a file of suffix .csv, .tsv, .txt, .parquet, .npz, got '.xls'"
    ):
        read_file("a.xls:target=b")


@pytest.mark.parametrize(
    ("form", "is_file"),
    [
        *((name, False) for name in names()),
        *((form, False) for form in ("digist", "adding:100", "parity:0.5")),
        *(
            (form, True)
            for form in ("a.csv", "a.csv:target=b", "a.xls", "data/a", "C:\\data\\a.npz:x=b", "C:/a", "~/a")
        ),
    ],
)
def test_a_file_is_told_from_a_name(form: str, is_file: bool) -> None:
    assert is_file_form(form) == is_file


def test_arrays_in_a_file(folder: Path) -> None:
    x, y = np.arange(40.0).reshape(10, 2, 2), np.arange(10) % 2
    np.savez(folder / "a.npz", x=x, y=y, other=y + 0.5)
    _same(read_file("a.npz"), from_arrays(x, y))
    _same(read_file("a.npz:target=other:test=3:seed=1"), from_arrays(x, y + 0.5, test=3, seed=1))
    assert read_file("a.npz:x=other:y=y:test=0").x_train.shape == (10, 1)
    np.savez(folder / "b.npz", x_train=x[:6], y_train=y[:6], x_test=x[6:], y_test=y[6:])
    _same(read_file("b.npz"), from_arrays(x[:6], y[:6], test=(x[6:], y[6:])))
    assert len(read_file("b.npz:x=x_train:y=y_train:test=2").y_test) == 2
    np.savez(folder / "c.npz", x_train=x[:6], y_train=y[:6])
    assert len(read_file("c.npz:test=2").y_test) == 2


def test_arrays_that_are_wrong_are_named(folder: Path) -> None:
    np.savez(folder / "a.npz", x_train=np.ones((2, 1)), y_train=[0, 1], x_test=np.full((2, 1), np.nan), y_test=[0, 1])
    for form, message in (
        ("a.npz", r"x_test has nan in row 0"),
        (
            "a.npz:y=y_trian",
            r"a.npz has no array 'y_trian'; perhaps you meant 'y_train'. Its arrays: x_train, y_train,",
        ),
        ("a.npz:x=x_train", r"a.npz has no array 'y'"),
        ("a.npz:y=y_train:target=y_train", r"y= and target= both name the targets"),
        ("a.npz:test=1", r"x_test and y_test; the option test= would take their place"),
        ("a.npz:drop=x", r"option of the file must be one of 'x', 'y', 'target', 'test', 'seed', 'kind', got 'drop'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_file(form)
    np.savez(folder / "b.npz", x=np.array([[1], "a"], object), y=[0, 1])
    (folder / "c.npz").write_text("text")
    with open(folder / "d.npz", "wb") as file:
        np.save(file, np.ones(3))
    for name in "bcd":
        with pytest.raises(ValueError, match=rf"{name}.npz must be a .npz file of plain arrays"):
            read_file(f"{name}.npz")


def test_parquet(folder: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(_COLUMNS), folder / "a.parquet")
    _check_parquet()


_COLUMNS = {"a": [1.5, 2.5, 3.5], "b": [1, 2, 3], "c": [True, False, True], "d": ["u", None, "v"], "e": ["u", "v", "u"]}


def _check_parquet() -> None:
    data = read_file("a.parquet:target=e:drop=d:test=0")
    assert (data.features, data.classes, data.y_train.tolist()) == (("a", "b", "c"), ("u", "v"), [0, 1, 0])
    with pytest.raises(ValueError, match=r"row 1 of a.parquet has no value in column 'd'; a target must have one"):
        read_file("a.parquet:target=d:drop=e")
    with pytest.raises(ValueError, match=r"row 0 of a.parquet has 'u' in column 'd'; .*drop=d,e leaves out every such"):
        read_file("a.parquet:target=a")


@pytest.mark.parametrize("library", ["pyarrow", "pandas", None])
def test_parquet_goes_by_either_library(folder: Path, monkeypatch: pytest.MonkeyPatch, library: str | None) -> None:
    """With stand-ins for both: they are no dependencies."""
    (folder / "a.parquet").touch()
    columns = {name: SimpleNamespace(to_numpy=lambda v=values: np.array(v)) for name, values in _COLUMNS.items()}
    table = SimpleNamespace(column=columns.__getitem__, column_names=list(columns))
    modules: dict[str, Any] = dict.fromkeys(("pyarrow", "pyarrow.parquet", "pandas"))
    if library == "pyarrow":
        modules["pyarrow.parquet"] = SimpleNamespace(read_table=lambda path: table)
        modules["pyarrow"] = SimpleNamespace(parquet=modules["pyarrow.parquet"])
    elif library == "pandas":
        modules["pandas"] = SimpleNamespace(read_parquet=lambda path: columns)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    if library is not None:
        _check_parquet()
        return
    with pytest.raises(ImportError, match=r"Reading a.parquet needs pyarrow or pandas: pip install pyarrow"):
        read_file("a.parquet:target=a")
