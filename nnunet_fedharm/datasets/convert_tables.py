"""Tables that come with data sets: CSV and TSV always, Excel where openpyxl is installed."""

from __future__ import annotations

import csv
import importlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import DataError, SetupError

Row = dict[str, str]
_EMPTY = {"", "nan", "n/a", "na", "none", "null"}


def read_table(path: Path, *, sheet: str | None = None) -> list[Row]:
    """Rows as column -> text; missing values (empty, NaN, n/a) are "", whole numbers have no ".0".

    Args:
        path: .csv (comma or semicolon), .tsv or .xlsx.
        sheet: of an Excel file; the first where it has no such sheet.

    Raises:
        DataError: no such file, no rows, or not a table.
        SetupError: an Excel file without openpyxl.
    """
    if not path.is_file():
        raise DataError(f"The table {path} is missing. Download it with the data set, or name it with --table.")
    try:
        lines = _excel(path, sheet) if path.suffix.lower() in (".xlsx", ".xlsm") else _text(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"The table {path} cannot be read ({error}). Save it as CSV with UTF-8.") from error
    if len(lines) < 2:
        raise DataError(f"The table {path} has no rows. Download it again.")
    names = [clean(name) for name in lines[0]]
    return [
        {name: clean(value) for name, value in zip(names, line, strict=False) if name}
        for line in lines[1:]
        if any(clean(value) for value in line)
    ]


def clean(value: Any) -> str:
    """A cell as text; "" for what means nothing, 18 for 18.0."""
    text = "" if value is None else str(value).strip()
    if text.lower() in _EMPTY:
        return ""
    return text[:-2] if re.fullmatch(r"-?\d+\.0", text) else text


def find_column(rows: Sequence[Row], names: Iterable[str], *, table: Path, what: str) -> str:
    """The first of several possible columns that the table has.

    Raises:
        DataError: it has none of them.
    """
    wanted, columns = list(names), list(rows[0])
    for name in wanted:
        if name in columns:
            return name
    raise DataError(
        f"The table {table} has no column for the {what}: expected {' or '.join(map(repr, wanted))}, "
        f"found {', '.join(columns)}. Give the table that is published with the data set."
    )


def by_key(rows: Sequence[Row], column: str, *, table: Path) -> dict[str, Row]:
    """Rows by the text of one column; rows without it are left out.

    Raises:
        DataError: two rows with the same key.
    """
    found: dict[str, Row] = {}
    for row in rows:
        key = row.get(column, "")
        if key and key in found and found[key] != row:
            raise DataError(f"The table {table} has two rows with {column} {key}. Remove the wrong one.")
        if key:
            found[key] = row
    return found


def site_name(*parts: str) -> str:
    """A name that can be a folder and part of a file name: letters, digits, dots and dashes."""
    return "-".join(filter(None, (re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.") for part in parts)))


def number(text: str) -> float | None:
    """The first number in a text such as "3", "1.5T"; None without one."""
    found = re.search(r"\d+(\.\d+)?", text)
    return None if found is None else float(found.group())


def _text(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        head = stream.readline()
        stream.seek(0)
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=head.count)
        return list(csv.reader(stream, delimiter=delimiter))


def _excel(path: Path, sheet: str | None) -> list[list[str]]:
    try:
        openpyxl: Any = importlib.import_module("openpyxl")
    except ImportError as error:
        raise SetupError(
            f"Reading {path} needs openpyxl. Save the table as CSV and give it with --table, or `pip install openpyxl`."
        ) from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:
        raise DataError(f"The table {path} is no Excel file ({error}). Download it again or save it as CSV.") from error
    page = book[sheet] if sheet in book.sheetnames else book[book.sheetnames[0]]
    lines = [[clean(value) for value in line] for line in page.iter_rows(values_only=True)]
    book.close()
    return lines
