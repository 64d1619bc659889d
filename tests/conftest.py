"""Shared by all tests: offline, one thread, and the numbers made by the reference code."""

import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the tests of the Hub set their own, in processes of their own
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from tqdm import tqdm

tqdm.monitor_interval = 0  # no thread of its own: a child forked while that holds the lock of all bars waits for ever
ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_finish():
    """What was imported stays: collecting garbage, which would look through all of it, is done in half the time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(scope="session")
def golden():
    """golden("iddpm_losses") -> the arrays of tests/golden/iddpm_losses.npz."""

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as arrays:
            return dict(arrays)

    return read
