"""A feature table comes back from its file as it was, to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.features.table import FeatureTable, Row
from nnunet_fedharm.sites.features.table_files import read_table, write_table

ROWS = (
    Row("A_1", "A", "A_1", "T1, fat-saturated", "label core", "z-score"),
    Row('B_"2"', "B", "A_1", "T1, fat-saturated", "label core", "z-score", True),
)


@given(values=st.lists(st.floats(allow_infinity=True, width=64), min_size=4, max_size=4))
def test_every_float_and_every_name_comes_back(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    path = tmp_path_factory.mktemp("table") / "features.csv"
    table = FeatureTable(ROWS, ("glcm_Contrast", "quality_noise"), np.array(values).reshape(2, 2))
    write_table(table, path)
    back = read_table(path)
    assert (back.rows, back.names) == (table.rows, table.names)
    assert np.array_equal(back.values, table.values, equal_nan=True)


def test_an_empty_table_comes_back(tmp_path: Path) -> None:
    write_table(FeatureTable((), ("glcm_Contrast",), np.empty((0, 1))), tmp_path / "t.csv")
    assert read_table(tmp_path / "t.csv").values.shape == (0, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no feature table"),
        ("case,site\n", "no feature table"),
        ("case,site,patient,channel,region,scale,travelling,f\na,b,c,d,e,raw,0\n", "line 2"),
        ("case,site,patient,channel,region,scale,travelling,f\na,b,c,d,e,raw,0,x\n", "line 2"),
        ("case,site,patient,channel,region,scale,travelling,f\na,b,c\n", "line 2"),
    ],
)
def test_other_files_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "t.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "absent.csv")
