"""`read_file`: a data set of one's own file, as the command line names it."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beyondprop import _checks
from beyondprop.data._arrays import Array, Values, from_arrays
from beyondprop.data._dataset import KINDS, Dataset
from beyondprop.data._packed import brief, most_bytes, read_npz

Columns = dict[str, Sequence[str] | Array]
Where = Callable[[int], str]

_OPTIONS = {
    **dict.fromkeys((".csv", ".tsv", ".txt"), ("target", "drop", "test", "seed", "kind", "sep")),
    ".parquet": ("target", "drop", "test", "seed", "kind"),
    ".npz": ("x", "y", "target", "test", "seed", "kind"),
}
_MISSING = {"", "?", "NA", "N/A", "<NA>", "na", "n/a", "NaN", "nan", "NAN", "NULL", "null"}
_FEW = 20
_LONG = 60  # characters of a text in a message
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
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, no error for a user that is not there
    suffix = path.suffix.lower()
    if suffix not in _OPTIONS:
        raise ValueError(f"{name!r} must be a file of suffix {', '.join(_OPTIONS)}, got {path.suffix!r}.")
    options = _options(parts, _OPTIONS[suffix])
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    test: Any = _number("test", options.get("test", "0.2"))
    if suffix == ".npz":
        kind = options.get("kind")
        x, y, *held = _from_npz(path, options)
        if held and "test" in options:
            raise ValueError(f"{path.name} has x_test and y_test; the option test= would take their place.")
        test = held or test
    else:
        columns, where = _from_parquet(path) if suffix == ".parquet" else _from_text(path, options.get("sep"))
        x, y, kind = _table(path.name, columns, where, options)
    seed = int(_number("seed", options.get("seed", "0")))
    try:
        return from_arrays(x, y, name=path.name, test=test, seed=seed, kind=kind)
    except (TypeError, ValueError) as error:
        text = str(error)
        raise ValueError(text if path.name in text else f"{path.name}: {text}") from None


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


def _from_text(path: Path, sep: str | None) -> tuple[Columns, Where]:
    """Return the columns of a file as text by their names, and what each row goes by."""
    try:
        text = path.read_bytes().decode("utf-8-sig")  # a byte order mark is no part of the first name
    except UnicodeDecodeError as error:
        line = (
            error.object.count(b"\n", 0, error.start) + 1
        )  # its start counts from after a byte order mark, as its object does
        raise ValueError(
            f"line {line} of {path.name} must be text in UTF-8: {brief(error)}; save the file in it."
        ) from None
    if sep is None:
        head = text.lstrip("\r\n").partition("\n")[0]
        sep = max(",;\t", key=lambda sep: _count(head, sep))
    elif len(sep := _SEPARATORS.get(sep, sep)) != 1 or sep in '"\r\n':
        raise ValueError(f"sep must be one character or {', '.join(_SEPARATORS)}, and no quote, got {sep!r}.")
    records: list[list[str]] = []
    lines: list[str] = []
    end, reader = 0, _reader(text, sep, strict=True)
    try:
        for record in reader:
            if record:  # no blank line
                records.append([value.strip() for value in record])
                lines.append(f"line {end + 1} of {path.name}")
            end = reader.line_num
    except csv.Error as error:
        raise ValueError(
            f"line {end + 1} of {path.name} cannot be read: {error}; look for a quote that is open."
        ) from None
    if len(records) < 2:
        raise ValueError(f"{path.name} must have a line of column names and rows after it, got {len(records)} lines.")
    names = records[0]
    if len(names) == 1:
        raise ValueError(f"{path.name} has the single column {_short(names[0])}; name its separator with sep=.")
    if all(_floats([name]) is not None for name in names):
        raise ValueError(
            f"{path.name} must begin with a line of column names; it begins with numbers: {_list(names[:2])}."
        )
    earlier: set[str] = set()
    for index, name in enumerate(names):
        if not name or name in earlier:
            what = "the name of an earlier one" if name else "no name"
            raise ValueError(f"{path.name}: column {index + 1} has {what}, {_short(name)}; each needs its own.")
        earlier.add(name)
    for record, line in zip(records, lines, strict=True):
        if len(record) != len(names):
            raise ValueError(
                f"{line} has {len(record)} values; the first line has {len(names)} names, and each needs one."
            )
    return dict(zip(names, zip(*records[1:], strict=True), strict=True)), lines[1:].__getitem__


def _count(head: str, sep: str) -> int:
    """Return how many names a line has by this separator, 0 where it cannot be read."""
    try:
        return len(next(_reader(head, sep), ()))
    except csv.Error:
        return 0


def _reader(text: str, sep: str, *, strict: bool = False) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=sep, skipinitialspace=True, strict=strict)


def _from_parquet(path: Path) -> tuple[Columns, Where]:
    try:
        found = _parquet_columns(path)
    except ImportError:
        raise ImportError(f"Reading {path.name} needs pyarrow or pandas: pip install pyarrow.") from None
    except Exception as error:  # of either library, or of columns that are no arrays
        raise ValueError(
            f"{path.name} cannot be read as a parquet table: {brief(error)}. It is damaged or another file: write it anew."
        ) from error
    return found, lambda row: f"row {row} of {path.name}"


def _parquet_columns(path: Path) -> Columns:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found]

        # A column of equal values takes next to no bytes in the file: what the table expands to is asked first.
        if ask := getattr(parquet, "read_metadata", None):
            rows, count = (metadata := ask(path)).num_rows, metadata.num_columns
            if 8 * rows * count > (most := most_bytes(path)):
                raise ValueError(f"it claims {rows:,} rows of {count} columns, more than {most:,} bytes")
        table = parquet.read_table(path)
        columns = {name: table.column(name) for name in table.column_names}
    except ImportError:
        import pandas  # type: ignore[import-not-found]

        columns = dict(pandas.read_parquet(path).items())
    found: Columns = {}
    for name, column in columns.items():
        array = np.asarray(column.to_numpy())
        if array.ndim != 1 or len(array) != len(next(iter(found.values()), array)):
            raise ValueError(f"column {str(name)[:60]!r} has the shape {array.shape}, unlike a column of a table")
        if array.dtype.kind in "biuf":
            found[str(name)] = array.astype(np.float64)
        else:
            found[str(name)] = ["" if value is None else str(value).strip() for value in array]
    return found


def _table(file: str, columns: Columns, where: Where, options: dict[str, str]) -> tuple[Values, Values, str]:
    """Return the inputs and targets of a table, and the kind that the targets are."""

    def refusal(name: str, is_wrong: Callable[[str], bool], rule: str) -> ValueError:
        row, value = next((row, value) for row, value in enumerate(columns[name]) if is_wrong(value))
        found = "no value" if value in _MISSING else _short(value)
        return ValueError(f"{where(row)} has {found} in column {_short(name)}; {rule}.")

    known = _list(columns)
    if "target" not in options:
        raise ValueError(f"{file} needs target=COLUMN, one of: {known}.")
    targets, dropped = (options[key].split(",") if key in options else [] for key in ("target", "drop"))
    for index, name in enumerate(chosen := [*targets, *dropped]):
        if name not in columns:
            raise ValueError(f"{file} has no column {name!r}{_checks.hint(name, columns)}. Its columns: {known}.")
        if name in chosen[:index]:
            raise ValueError(f"The column {name!r} of {file} is named twice in target= and drop=.")
    numbers: dict[str, Any] = {name: _floats(column) for name, column in columns.items() if name not in dropped}
    inputs = [name for name in numbers if name not in targets]
    if not inputs:
        raise ValueError(f"{file} has no column for inputs besides {_list(chosen)}.")
    if texts := [name for name in inputs if numbers[name] is None]:
        drop = ",".join([*dropped, *texts])
        remedy = (
            f"drop={drop} leaves out every such column" if len(drop) < 1000 else f"drop= can leave out all {len(texts)}"
        )
        raise refusal(texts[0], _is_text, f"inputs must be numbers; {remedy}")
    kind = options.get("kind")
    for name in targets:
        if numbers[name] is None and not _MISSING.isdisjoint(columns[name]):
            raise refusal(name, _MISSING.__contains__, "a target must have one in every row")
        if numbers[name] is None and (kind == "regression" or len(targets) > 1):
            raise refusal(name, _is_text, "targets of a regression must be numbers")
    if numbers[targets[0]] is None:
        y, found = np.array(columns[targets[0]]), "classification"
    else:
        y = np.stack([numbers[name] for name in targets], 1)
        values = np.unique(y)
        is_label = len(values) <= min(_FEW, len(y) // 2) and (values == np.floor(values)).all()
        found = KINDS[len(targets) > 1 or not is_label]
    x = np.stack([numbers[name] for name in inputs], 1)
    return Values("x", x, tuple(inputs), where), Values("y", y, tuple(targets), where), kind or found


def _floats(column: Sequence[str] | Array) -> Array | None:
    """Return a column as numbers, or None where a value is text or missing."""
    if isinstance(column, np.ndarray):
        return column
    try:
        values = np.fromiter(map(float, column), np.float64, len(column))
    except ValueError:
        return None
    # Python reads 1_000 as a number; in a file it is a name.
    return None if np.isnan(values).any() or "_" in "".join(column) else values


def _short(value: str) -> str:
    """Return the text for a message: without what would move a terminal's cursor, and never long."""
    return repr(value) if len(value) <= _LONG else f"{value[:_LONG]!r}…"


def _list(names: Iterable[str]) -> str:
    names = [repr(name)[1:-1][:_LONG] for name in names]
    return ", ".join(names[:_FEW]) + (f", … ({len(names)} in all)" if len(names) > _FEW else "")


def _is_text(value: str) -> bool:
    return _floats([value]) is None


def _from_npz(path: Path, options: dict[str, str]) -> list[Values]:
    """Return inputs and targets: of all rows or those for training, and of those for the test where there are any."""
    arrays = read_npz(path)
    if "y" in options and "target" in options:
        raise ValueError(f"y= and target= both name the targets of {path.name}; one is enough.")
    split = "_train" if "x" not in options and "x_train" in arrays else ""
    names = {"x": options.get("x", f"x{split}"), "y": options.get("y", options.get("target", f"y{split}"))}
    if split and "x_test" in arrays:
        names |= {"x_test": "x_test", "y_test": "y_test"}
    for name in names.values():
        if name not in arrays:
            known = _list(arrays)
            raise ValueError(f"{path.name} has no array {name!r}{_checks.hint(name, arrays)}. Its arrays: {known}.")
    return [Values(key, arrays[name]) for key, name in names.items()]
