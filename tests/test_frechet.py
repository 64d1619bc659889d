"""The Frechet distance against its closed form for Gaussians, and the benchmark that uses it."""

import sys

import numpy as np
import pytest

from finetune.frechet import frechet_distance
from tiny import ROOT


def with_moments(mean, covariance, n: int = 500, seed: int = 0) -> np.ndarray:
    """[n, D] samples whose empirical mean and covariance are exactly these."""
    x = np.random.RandomState(seed).normal(size=(n, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_known_gaussians():
    zero, one = np.zeros(3), np.eye(3)
    assert frechet_distance(with_moments(zero, one), with_moments([1, 2, 2], one, seed=1)) == pytest.approx(9)
    # Commuting covariances: the sum of (s - t)^2 of the standard deviations.
    a, b = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])
    assert frechet_distance(with_moments(zero, a), with_moments(zero, b, 300, 1)) == pytest.approx(1 + 0 + 4)
    rotation, _ = np.linalg.qr(np.random.RandomState(2).normal(size=(3, 3)))
    turned = [rotation @ c @ rotation.T for c in (a, b)]
    assert frechet_distance(with_moments(zero, turned[0]), with_moments(zero, turned[1])) == pytest.approx(5)


def test_covariances_that_do_not_commute():
    """In two dimensions tr (C_a C_b)^(1/2) is sqrt(tr(C_a C_b) + 2 sqrt(det(C_a C_b)))."""
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * cross
    x, y = with_moments([0, 0], a), with_moments([0, 0], b, 400, 1)
    assert frechet_distance(x, y) == pytest.approx(expected) == pytest.approx(frechet_distance(y, x))
    diagonal_only = sum((np.sqrt(a[i, i]) - np.sqrt(b[i, i])) ** 2 for i in range(2))
    assert abs(diagonal_only - expected) > 0.1, "negative control: without the covariances"


def test_the_same_is_zero_also_without_full_rank():
    x = np.random.RandomState(0).normal(size=(50, 4)) @ np.ones((4, 6))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x[:, ::-1] + 1) == pytest.approx(6)
    assert frechet_distance(np.array([[0.0], [2.0]]), np.array([[1.0], [3.0]])) == pytest.approx(1)


def test_what_has_no_distance_is_refused():
    good = np.zeros((3, 2))
    for bad in (np.zeros((3, 4)), np.zeros((1, 2)), np.zeros(3)):
        with pytest.raises(ValueError, match="must be \\[N, D\\] and \\[M, D\\]"):
            frechet_distance(good, bad)
    with pytest.raises(ValueError, match="must be finite"):
        frechet_distance(good, good * np.nan)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import frechet

    yield frechet
    sys.modules.pop("frechet")


def test_features_of_the_digits_tell_good_from_bad(benchmark):
    """Real digits are at the floor; blurred, permuted or noisy ones, each in its way, are not."""
    from sklearn.datasets import load_digits

    real = load_digits().data
    assert benchmark.features(real)["pixels"].var(0, ddof=1) == pytest.approx(np.ones(32))
    some = real[np.random.RandomState(1).permutation(len(real))[:800]]
    at_floor = benchmark.distances(some)
    for name in ("pixels", "judge"):
        floor = at_floor[f"{name}_floor"]
        assert at_floor[name] < floor
        for worse in (some + np.random.RandomState(0).normal(size=some.shape) * 4, some[:, ::-1], some * 0.7):
            assert benchmark.distances(worse)[name] > 3 * floor
