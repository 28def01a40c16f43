"""Feature tables as CSV files: one line per row, first what was measured, then the features.

Numbers are written with as many digits as float64 needs to come back the same; an empty field is a feature that does not exist.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import astuple, fields
from pathlib import Path

import numpy as np

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.features.table import FeatureTable, Row
from nnunet_fedharm.sites.files import write_text

ROW_COLUMNS = tuple(item.name for item in fields(Row))


def write_table(table: FeatureTable, path: Path) -> None:
    """Write atomically.

    Raises:
        SetupError: the folder cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*ROW_COLUMNS, *table.names])
    for row, values in zip(table.rows, table.values.tolist(), strict=True):
        writer.writerow([*astuple(row)[:-1], int(row.travelling), *("" if math.isnan(v) else repr(v) for v in values)])
    write_text(text.getvalue(), path)


def read_table(path: Path) -> FeatureTable:
    """Inverse of `write_table`: the same rows, names and float64 values.

    Raises:
        DataError: the file is missing or is no feature table; the message names the line.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"The feature table {path} cannot be read ({error}). Measure the features again.") from error
    width = len(ROW_COLUMNS)
    if not lines or tuple(lines[0][:width]) != ROW_COLUMNS:
        raise DataError(f"{path} is no feature table: its first columns have to be {', '.join(ROW_COLUMNS)}.")
    names = tuple(lines[0][width:])
    rows, values = [], np.full((len(lines) - 1, len(names)), np.nan)
    for index, line in enumerate(lines[1:]):
        try:
            rows.append(_row(line[:width]))
            values[index] = [float(item) if item else math.nan for item in line[width:]]
        except (IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, line {index + 2} is no row of a feature table ({error}). Measure the features again."
            ) from error
    return FeatureTable(tuple(rows), names, values)


def _row(fields_of_row: list[str]) -> Row:
    case, site, patient, channel, region, scale, travelling = fields_of_row
    return Row(case, site, patient, channel, region, scale, bool(int(travelling)))
