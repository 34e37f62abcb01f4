"""Rows of text files: tsv, csv, jsonl and `mr||text`; errors name the file and the line."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlora.errors import DataError, listing, nearest


class Row(NamedTuple):
    """One row of a file.

    Attributes:
      where: `reviews.tsv, line 3`, for messages.
      fields: {column: value}; strings, or what JSON holds.
    """

    where: str
    fields: Mapping[str, Any]


def read_rows(file: str | Path, columns: Sequence[str]) -> list[Row]:
    r"""Read the named columns of a file; its suffix tells the form.

    `.tsv` has tabs and no quoting, `.csv` is quoted as RFC 4180 has it, `.jsonl` has an object a
    line, and `.txt` has its columns between `||` and no header. A tsv or csv file whose first line
    does not name the columns is an error, unless the columns are given as numbers from 0: then it
    has no header. Empty lines are skipped.

    Args:
      file: the file, UTF-8.
      columns: the names of the columns that are wanted, such as ("text", "label"); under `.txt`
        the names to give to all its columns.

    Returns:
      The rows in the order of the file, with the wanted columns only.

    Raises:
      DataError: no such file, another suffix, no rows, bytes that are not UTF-8, a column that
        is not there, or a row with the wrong number of columns. File and line are named.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> file = Path(tempfile.mkdtemp()) / "reviews.tsv"
      >>> _ = file.write_text("label\tsentence\n1\ta fine film\n")
      >>> read_rows(file, ("sentence", "label"))[0].fields
      {'sentence': 'a fine film', 'label': '1'}
    """
    file = Path(file).expanduser()
    if file.suffix not in READERS:
        raise DataError(f"Data file is {file}, expected one that ends in {', '.join(READERS)}.")
    rows = list(READERS[file.suffix](file, _decoded(file), tuple(columns)))
    if not rows:
        raise DataError(f"{file} has no rows, expected columns {listing(columns)}.")
    return rows


def classes_of(rows: Iterable[Row], column: str) -> list[str]:
    """The distinct labels of a column as strings, whole numbers by value, others by name.

    Args:
      rows: the rows.
      column: the column of the label: strings or integers.

    Returns:
      The classes; a label's index in it is its number.

    Raises:
      DataError: a row without a label, or fewer than two classes.

    Example:
      >>> classes_of([Row("line 1", {"label": "no"}), Row("line 2", {"label": "yes"})], "label")
      ['no', 'yes']
    """
    found = {label_of(row, column) for row in rows}
    if len(found) < 2:
        raise DataError(
            f"Column '{column}' has {len(found)} class ({listing(sorted(found))}), expected two or "
            "more."
        )
    whole = all(label.lstrip("-").isdecimal() for label in found)
    return sorted(found, key=int if whole else None)


def label_of(row: Row, column: str) -> str:
    """The label of a row as a string; DataError if it has none."""
    value = row.fields[column]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise DataError(
            f"{row.where} has the label {value!r} in '{column}', expected a string or a whole "
            "number. Fill it in, or take the row out."
        )
    return str(value).strip()


def text_of(row: Row, column: str) -> str:
    """The text of a row; DataError if it is no string or empty."""
    value = row.fields[column]
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{row.where} has {value!r} in '{column}', expected text. "
            "Fill it in, or take the row out."
        )
    return value.strip()


def _decoded(file: Path) -> str:
    if not file.is_file():
        there = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        near = listing(nearest(file.name, there)) or "nothing"
        raise DataError(f"There is no data file {file}. Nearest: {near}.")
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise DataError(
            f"{file}, line {line}: got the byte 0x{data[e.start]:02x}, expected UTF-8. "
            "Convert the file first."
        ) from e


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Split at line feeds only: sentences may hold other characters that end lines in Python.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r")


def _tsv(file: Path, text: str, columns: tuple[str, ...]) -> Iterator[Row]:
    return _table(file, ((n, line.split("\t")) for n, line in _lines(text)), columns)


def _csv(file: Path, text: str, columns: tuple[str, ...]) -> Iterator[Row]:
    reader = csv.reader(text.splitlines(keepends=True), strict=True)

    def records() -> Iterator[tuple[int, list[str]]]:
        while True:
            first = reader.line_num + 1  # a quoted field may hold line feeds
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as e:
                raise DataError(f"{file}, line {first}: {e}. Expected a row of csv.") from e
            if any(cell.strip() for cell in cells):
                yield first, cells

    return _table(file, records(), columns)


def _table(
    file: Path, records: Iterator[tuple[int, list[str]]], columns: tuple[str, ...]
) -> Iterator[Row]:
    numbered = all(column.isdecimal() for column in columns)
    width, names = None, list(columns)
    at = [int(column) for column in columns] if numbered else []
    for number, cells in records:
        where = f"{file}, line {number}"
        if width is None:
            width = len(cells)
            if not numbered:
                names = [cell.strip() for cell in cells]
                at = [_index(where, names, column) for column in columns]
                continue
            if max(at) >= width:
                raise DataError(f"{where} has {width} columns, expected a column {max(at)}.")
        if len(cells) != width:
            raise DataError(f"{where} has {len(cells)} columns, expected {width} as in line 1.")
        yield Row(where, {column: cells[i] for column, i in zip(columns, at, strict=True)})


def _index(where: str, names: list[str], column: str) -> int:
    if column not in names:
        raise DataError(
            f"{where} names the columns {listing(names)}, expected one named '{column}'. Name the "
            "columns that are there, or give their numbers from 0 if the file has no header."
        )
    return names.index(column)


def _jsonl(file: Path, text: str, columns: tuple[str, ...]) -> Iterator[Row]:
    for number, line in _lines(text):
        where = f"{file}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as e:
            raise DataError(f"{where} is not JSON: {e}.") from e
        if not isinstance(fields, dict):
            raise DataError(f"{where} is a JSON {type(fields).__name__}, expected an object.")
        for column in columns:
            if column not in fields:
                raise DataError(
                    f"{where} has no '{column}'. It has {listing(sorted(fields)) or 'nothing'}."
                )
        yield Row(where, {column: fields[column] for column in columns})


def _bars(file: Path, text: str, columns: tuple[str, ...]) -> Iterator[Row]:
    for number, line in _lines(text):
        cells = [cell.strip() for cell in line.split("||")]
        if len(cells) != len(columns):
            raise DataError(
                f"{file}, line {number} has {len(cells)} columns, expected {len(columns)}: "
                f"{'||'.join(columns)}."
            )
        yield Row(f"{file}, line {number}", dict(zip(columns, cells, strict=True)))


READERS: dict[str, Callable[[Path, str, tuple[str, ...]], Iterator[Row]]] = {
    ".tsv": _tsv,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".txt": _bars,
}
"""{suffix: `(file, its text, columns) -> rows`}; a form of your own is one entry."""
