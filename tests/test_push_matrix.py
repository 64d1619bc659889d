"""A push under every kind of fault and at every endpoint: the representative part of benchmarks/push_matrix.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import push_matrix as matrix  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every cell of the quick part, measured at once: nearly all of it is waiting."""
    found = tmp_path_factory.mktemp("matrix") / "results.json"
    command = [sys.executable, matrix.__file__, "--quick", "--processes", "8", "--json", str(found)]
    subprocess.run(command, timeout=180, capture_output=True)
    return {matrix.Cell(**result["cell"]): result for result in json.loads(found.read_text())}


@pytest.mark.parametrize("cell", matrix.QUICK, ids=lambda cell: f"{cell.endpoint}-{cell.fault}-{cell.times}")
def test_what_a_push_survives(results, cell):
    assert not results[cell]["problems"]
    assert results[cell]["outcome"] == cell.expected


def test_every_fault_and_every_endpoint_is_in_the_quick_part():
    assert {cell.endpoint for cell in matrix.QUICK} == set(matrix.ENDPOINTS)
    assert {cell.fault for cell in matrix.QUICK} == set(matrix.PASSING + matrix.STAYING)


def test_a_push_that_went_otherwise_is_called_lost(monkeypatch):
    """Negative control: an expectation that does not hold."""
    monkeypatch.setattr(matrix.os, "environ", dict(os.environ))  # which a cell changes
    monkeypatch.setattr(matrix.Cell, "expected", "pending")
    result = matrix.measure(matrix.Cell("commit", "500", "once"))
    assert result.outcome == "LOST" and result.problems == ["survived, not pending"]
