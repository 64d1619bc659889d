"""The comparison that every golden test rests on, and the page that is written from it."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from golden_numbers import FOLDER, RECORD, arrays, compare

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import parity  # noqa: E402


def test_a_deviation_above_the_tolerance_fails():
    theirs = np.array([1.0, -1e-3, 0.0, np.inf])
    compare("none", "a", torch.tensor([1 + 1e-6, -1e-3, 0.0, np.inf], dtype=torch.float64), theirs, rtol=1.1e-6)
    compare("none", "a", theirs + [0, 0, 1e-6, 0], theirs, rtol=1.1e-6, floor=1)
    compare("none", "a", 3, 3, rtol=0)
    for ours in ([1 + 2e-6, -1e-3, 0, np.inf], [1, 1e-3, 0, np.inf], [1, -1e-3, 1e-30, np.inf], [1, -1e-3, 0, 1],
                 [np.nan, -1e-3, 0, np.inf], [1, -1e-3, 0, -np.inf]):  # fmt: skip
        with pytest.raises(AssertionError, match="none a: relative deviation"):
            compare("none", "a", ours, theirs, rtol=1.1e-6)
    with pytest.raises(AssertionError, match="is not"):
        compare("none", "a", theirs[:3], theirs)
    with pytest.raises(AssertionError, match=r"iddpm_schedules betas_cosine_1000: relative deviation 0.0002"):
        compare("iddpm_schedules", "betas_cosine_1000", 1.0002 * arrays("iddpm_schedules")["betas_cosine_1000"])


def test_what_was_compared_is_recorded_and_becomes_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv(RECORD, str(tmp_path / "record"))
    theirs = arrays("iddpm_schedules")["betas_cosine_1000"]
    compare("iddpm_schedules", "betas_cosine_1000", theirs * (1 + 3e-7))
    compare("iddpm_schedules", "betas_cosine_1000", theirs[:9], theirs[:9], rtol=0)
    with pytest.raises(AssertionError):
        compare("iddpm_schedules", "betas_cosine_1000", 2 * theirs)
    records = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
    assert [record["count"] for record in records] == [1000, 9]
    name = "test_golden_numbers.py::test_what_was_compared_is_recorded_and_becomes_a_line"
    line = f"| `iddpm_schedules` `betas_*` | 1,000 | 3e-7 | 1e-6 | `{name}` |"
    assert line in parity.page(records).splitlines()
    missing = parity.unaccounted(records)
    assert "iddpm_schedules betas_linear_1000: not compared" in missing
    assert not {"iddpm_schedules betas_cosine_1000: not compared", "kdiff_schedules u: not compared"} & set(missing)


@pytest.mark.parametrize("quantity, name", [
    ("linear1000_EPSILON_LEARNED_RANGE_MSE/loss", "*/loss"), ("T1000:10,20,30", "T*:*"), ("sd3_weight_none", None),
    ("betas_linear_4000", "betas_*"), ("prior_bpd_linear1000", "prior_bpd_*"), ("LambdaLinear", None),
    ("flow_sigmas_shift1.0_n10", "flow_sigmas_*"), ("rand_log_normal_-1.2_1.2", "rand_log_normal_*"),
    ("posterior_mean_coef1_cosine_1000", "posterior_mean_coef1_*"),
])  # fmt: skip
def test_arrays_of_several_cases_share_a_line(quantity, name):
    assert parity.group(quantity) == (name or quantity)


def test_the_page_knows_every_file_of_numbers():
    """If not: python benchmarks/parity.py"""
    page = (ROOT / "docs" / "parity.md").read_text()
    named = set(re.findall(r"^\| `(\w+)` ", page, re.M))
    assert {path.stem for path in FOLDER.glob("*.npz")} <= named
    not_offered = page.partition("## Not offered")[2]
    assert all(f"| {why} |" in not_offered for _, _, why in parity.NOT_OFFERED)
