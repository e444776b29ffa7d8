"""`read_file`: a data set of one's own file, as the command line names it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from beyondprop import _checks
from beyondprop.data._arrays import Array, Rows, assemble
from beyondprop.data._dataset import KINDS, Dataset

Column = Sequence[str] | Array

_TEXT = (".csv", ".tsv", ".txt")
_OPTIONS = {
    **dict.fromkeys(_TEXT, ("target", "drop", "test", "seed", "kind", "sep")),
    ".parquet": ("target", "drop", "test", "seed", "kind"),
    ".npz": ("x", "y", "target", "test", "seed", "kind"),
}
_MISSING = {"", "?", "NA", "N/A", "<NA>", "na", "n/a", "NaN", "nan", "NAN", "NULL", "null"}
_FEW = 20
_SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "space": " "}


def is_file_form(form: str) -> bool:
    """Return whether `form` names a file, `FILE[:OPTION...]`: by a folder or a suffix in it; no known set has either."""
    path = _parted(form)[0]
    return re.search(r"[/\\]|\.[A-Za-z]\w*$", path) is not None


def read_file(form: str) -> Dataset:
    """Read a data set from `FILE:target=COLUMN[:OPTION...]`, split and standardized as by `from_arrays`.

    - `.csv`, `.tsv`, `.txt`: UTF-8 with a line of column names; `.parquet` needs pyarrow or pandas. `target=NAME` is the
      column to predict, `target=A,B` several numbers; `drop=NAME,NAME` leaves columns out; `sep=` is the separator where it
      is none of comma, semicolon and tab. All other columns must be numbers. A target of text is labels, and so are whole
      numbers with at most 20 different values that come twice or more on average; other numbers are a regression.
    - `.npz`: arrays `x` and `y`, or `x_train`, `y_train` and, where there are test rows, `x_test`, `y_test`; `x=NAME` and
      `y=NAME` name others. Floating targets are a regression, all others labels.
    - All: `test=0.2` is a share or a number of test rows, `seed=0` chooses them, `kind=classification` or
      `kind=regression` decides what the target is.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: It is a `.parquet` file, and neither pyarrow nor pandas is installed.
        ValueError: The form or the content is not as above; the message names the line and the column.
    """
    name, parts = _parted(form)
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if suffix not in _OPTIONS:
        raise ValueError(f"{name!r} must be a file of suffix {', '.join(_OPTIONS)}, got {path.suffix!r}.")
    options = _options(parts, _OPTIONS[suffix])
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    test: Rows | float = _number("test", options["test"]) if "test" in options else 0.2
    kind = options.get("kind")
    if kind is not None:
        _checks.one_of("kind", kind, KINDS)
    if suffix == ".npz":
        rows, held = _from_npz(path, options)
        if held is not None and "test" in options:
            raise ValueError(f"{path.name} has x_test and y_test; the option test= would take their place.")
        test = test if held is None else held
    else:
        columns, lines = _from_parquet(path) if suffix == ".parquet" else _from_text(path, options.get("sep"))
        rows, kind = _table(path.name, columns, lines, options, kind)
    return assemble(rows, test, name=path.name, seed=int(_number("seed", options.get("seed", "0"))), kind=kind)


def _parted(form: str) -> tuple[str, list[str]]:
    """Part a form into its path and its options; the colon after a drive's letter parts nothing."""
    start = 2 if re.match(r"[A-Za-z]:[\\/]", form) else 0
    head, *options = form[start:].split(":")
    return form[:start] + head, options


def _options(parts: Iterable[str], accepted: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        _checks.one_of("an option of the file", key, accepted)
        if not equals or not value or key in found:
            raise ValueError(f"The option {key} must be given once, as {key}=VALUE, got {part!r}.")
        found[key] = value
    return found


def _number(key: str, text: str) -> int | float:
    try:
        return int(text) if text.isdecimal() or key == "seed" else float(text)
    except ValueError:
        raise ValueError(f"{key} must be a number, got {text!r}.") from None


def _from_text(path: Path, sep: str | None) -> tuple[dict[str, Column], list[str]]:
    """Return the columns of a file as text by their names, and what each row goes by."""
    try:
        text = path.read_bytes().decode("utf-8-sig")  # a byte order mark is no part of the first name
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} must be text in UTF-8: {error}.") from None
    if sep is not None:
        sep = _SEPARATORS.get(sep, sep)
        if len(sep) != 1:
            raise ValueError(f"sep must be one character or {', '.join(_SEPARATORS)}, got {sep!r}.")
    else:
        head = text.lstrip("\r\n").partition("\n")[0]
        sep = max(",;\t", key=lambda sep: len(next(_reader(head, sep), ())))
    records: list[list[str]] = []
    lines: list[str] = []
    end, reader = 0, _reader(text, sep, strict=True)
    try:
        for record in reader:
            if record:  # no blank line
                records.append(record)
                lines.append(f"line {end + 1} of {path.name}")
            end = reader.line_num
    except csv.Error as error:
        raise ValueError(f"line {end + 1} of {path.name} cannot be read: {error}.") from None
    if len(records) < 2:
        raise ValueError(f"{path.name} must have a line of column names and rows after it, got {len(records)} lines.")
    names = [name.strip() for name in records[0]]
    if len(names) == 1:
        raise ValueError(f"{path.name} has the single column {names[0]!r}; name its separator with sep=.")
    if all(_floats([name]) is not None for name in names):
        raise ValueError(
            f"{path.name} must begin with a line of column names; it begins with numbers: {names[0]}, {names[1]}."
        )
    for index, name in enumerate(names):
        if not name or name in names[:index]:
            what = "the name of an earlier one" if name else "no name"
            raise ValueError(f"{path.name}: column {index + 1} has {what}, {name!r}; each needs its own.")
    for record, line in zip(records, lines, strict=True):
        if len(record) != len(names):
            raise ValueError(f"{line} has {len(record)} values; the first line has {len(names)} names.")
    columns = zip(*records[1:], strict=True)
    return dict(zip(names, columns, strict=True)), lines[1:]


def _reader(text: str, sep: str, *, strict: bool = False) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=sep, skipinitialspace=True, strict=strict)


def _from_parquet(path: Path) -> tuple[dict[str, Column], list[str]]:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found]

        table = parquet.read_table(path)
        columns = {name: table.column(name) for name in table.column_names}
    except ImportError:
        try:
            import pandas  # type: ignore[import-not-found]

            columns = dict(pandas.read_parquet(path).items())
        except ImportError:
            raise ImportError(f"Reading {path.name} needs pyarrow or pandas: pip install pyarrow.") from None
    found: dict[str, Column] = {}
    for name, column in columns.items():
        array = np.asarray(column.to_numpy())
        if array.dtype.kind in "biuf":
            found[str(name)] = array.astype(np.float64)
        else:
            found[str(name)] = ["" if value is None else str(value) for value in array]
    return found, [f"row {row} of {path.name}" for row in range(len(next(iter(found.values()), ())))]


def _table(
    file: str, columns: dict[str, Column], lines: list[str], options: dict[str, str], kind: str | None
) -> tuple[Rows, str]:
    """Return the inputs and targets of a table, and the kind that the targets are."""
    known = ", ".join(columns)
    if "target" not in options:
        raise ValueError(f"{file} needs target=COLUMN, one of: {known}.")
    targets, dropped = (options[key].split(",") if key in options else [] for key in ("target", "drop"))
    for index, name in enumerate(chosen := [*targets, *dropped]):
        if name not in columns:
            raise ValueError(f"{file} has no column {name!r}{_checks.hint(name, columns)}. Its columns: {known}.")
        if name in chosen[:index]:
            raise ValueError(f"The column {name!r} of {file} is named twice in target= and drop=.")
    inputs = {name: _floats(column) for name, column in columns.items() if name not in chosen}
    if not inputs:
        raise ValueError(f"{file} has no column for inputs besides {', '.join(chosen)}.")
    if texts := [name for name, values in inputs.items() if values is None]:
        row, value = _first_text(columns[texts[0]])
        found = "no value" if value in _MISSING else f"{value!r}"
        raise ValueError(
            f"{lines[row]} has {found} in column {texts[0]!r}; inputs must be numbers; "
            f"drop={','.join([*dropped, *texts])} leaves out every such column."
        )
    y, kind = _target(columns, lines, targets, kind)
    x = np.stack([values for values in inputs.values() if values is not None], 1)
    return Rows(x, y, tuple(inputs), tuple(targets), where=lines.__getitem__), kind


def _target(columns: dict[str, Column], lines: list[str], targets: list[str], kind: str | None) -> tuple[Array, str]:
    """Return the targets `(N,)` or `(N, k)`, and the kind that they are where `kind` does not say."""
    numbers: list[Array] = []
    for name in targets:
        values = _floats(columns[name])
        if values is not None:
            numbers.append(values)
            continue
        text = [str(value).strip() for value in columns[name]]
        if missing := [row for row, value in enumerate(text) if value in _MISSING]:
            raise ValueError(
                f"{lines[missing[0]]} has no value in column {name!r}; a target must have one in every row."
            )
        if kind == "regression" or len(targets) > 1:
            row, value = _first_text(text)
            raise ValueError(f"{lines[row]} has {value!r} in column {name!r}; targets of a regression must be numbers.")
        return np.array(text), "classification"
    if len(numbers) > 1:
        return np.stack(numbers, 1), kind or "regression"
    values = np.unique(numbers[0])
    labels = len(values) <= min(_FEW, len(lines) // 2) and bool((values == np.floor(values)).all())
    return numbers[0], kind or KINDS[not labels]


def _floats(column: Column) -> Array | None:
    """Return a column as numbers, or None where a value is text or missing."""
    if isinstance(column, np.ndarray):
        return column
    try:
        values = np.fromiter(map(float, column), np.float64, len(column))
    except ValueError:
        return None
    # Python reads 1_000 as a number; in a file it is a name.
    return None if np.isnan(values).any() or "_" in "".join(column) else values


def _first_text(column: Column) -> tuple[int, str]:
    """Return the first value of a column that is no number, after its row."""
    return next((row, value.strip()) for row, value in enumerate(column) if _floats([value]) is None)


def _from_npz(path: Path, options: dict[str, str]) -> tuple[Rows, Rows | None]:
    """Return the arrays of a file: all rows or those for training, and those for the test where there are any."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (BadZipFile, OSError, ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{path.name} must be a .npz file of plain arrays: {error}.") from None
    if "y" in options and "target" in options:
        raise ValueError(f"y= and target= both name the targets of {path.name}; one is enough.")
    split = "_train" if "x" not in options and "x_train" in arrays else ""
    x, y = options.get("x", f"x{split}"), options.get("y", options.get("target", f"y{split}"))
    pairs = [(x, y), ("x_test", "y_test")] if split and "x_test" in arrays else [(x, y)]
    for name in (name for pair in pairs for name in pair):
        if name not in arrays:
            known = ", ".join(arrays)
            raise ValueError(f"{path.name} has no array {name!r}{_checks.hint(name, arrays)}. Its arrays: {known}.")
    rows = [Rows(arrays[x], arrays[y], part=part) for (x, y), part in zip(pairs, ("", "_test"), strict=False)]
    return rows[0], rows[1] if len(rows) > 1 else None
