"""The Frechet distance between two sets of features; with those of an Inception network it is the FID."""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """a [N, D] and b [M, D] -> the squared 2-Wasserstein distance of the Gaussians with their means and covariances.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson & Landau 1982; Heusel et al. 2017), unbiased covariances,
    float64. It is biased upwards for few samples: compare at equal N and M only. Raises ValueError unless both hold at
    least two finite samples of the same number of features.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be [N, D] and [M, D] with N and M at least 2, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features must be finite, but some are NaN or infinite: look at the samples they are made of")
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # C_a C_b has the eigenvalues of R C_b R with R = C_a^(1/2), which is symmetric: no complex square root is needed,
    # and covariances without full rank are no special case.
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
