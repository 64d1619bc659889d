"""The numbers of the reference implementations, and the one way in which ours are compared with them.

`benchmarks/parity.py` runs the tests that use `compare` and writes what they found into docs/parity.md.
"""

import functools
import json
import os
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"
RECORD = "FINETUNE_PARITY_RECORD"
"""Environment variable: the file that comparisons are appended to, one JSON object per line. Unset: none."""


@functools.cache
def arrays(reference: str) -> dict[str, np.ndarray]:
    """The arrays of tests/golden/<reference>.npz."""
    with np.load(FOLDER / f"{reference}.npz", allow_pickle=False) as file:
        return dict(file)


def golden(reference: str) -> dict[str, torch.Tensor]:
    """The numbers among them as fresh tensors."""
    return {name: torch.tensor(array) for name, array in arrays(reference).items() if array.dtype.kind in "fi"}


def compare(reference: str, quantity: str, ours, theirs=None, *, rtol: float = 1e-6, floor: float = 0.0) -> None:
    """Assert |ours - theirs| <= rtol * max(|theirs|, floor) for every element, and record the largest quotient.

    reference: the file of tests/golden, or the library that was asked just now. quantity: the array of that file.
    theirs: what to compare with, if it is not that array as it stands. floor: the size below which differences are
    taken relative to the floor, where numbers are sums of larger ones that cancel; the reason stands beside it.
    rtol 0 is equality in every bit.
    """
    ours, theirs = _numbers(ours), _numbers(arrays(reference)[quantity] if theirs is None else theirs)
    assert ours.shape == theirs.shape, f"{reference} {quantity}: {ours.shape} is not {theirs.shape}"
    with np.errstate(invalid="ignore", divide="ignore"):
        quotient = np.abs(ours - theirs) / np.maximum(np.abs(theirs), floor)
    quotient[ours == theirs] = 0  # also infinities, and 0 / 0
    deviation = float(quotient.max())
    assert deviation <= rtol, f"{reference} {quantity}: relative deviation {deviation:.2g}, tolerance {rtol:.2g}"
    if path := os.environ.get(RECORD):
        test = os.environ["PYTEST_CURRENT_TEST"].split("[")[0].split(" (")[0]
        values = {"reference": reference, "quantity": quantity, "count": ours.size, "deviation": deviation}
        with open(path, "a") as file:  # and not a list: some tests compare in processes of their own
            file.write(json.dumps(values | {"rtol": rtol, "floor": float(floor), "test": test}) + "\n")


def _numbers(values) -> np.ndarray:
    values = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    return np.atleast_1d(values.astype(np.float64))
