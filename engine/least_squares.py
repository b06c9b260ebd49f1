"""Small least-squares fits of times, of which some were delayed by something else. It knows nothing of what they are."""

from __future__ import annotations

import numpy as np

ROUNDS, FAR = 4, 6


def non_negative(left: list[list[float]], right: list[float]) -> list[float]:
    """Least squares with no coefficient below 0: those that would be are left out, one after another."""
    matrix, wanted = np.array(left, float), np.array(right, float)
    kept = [i for i in range(matrix.shape[1]) if matrix[:, i].any()]
    found = np.zeros(matrix.shape[1])
    while kept:
        scale = np.abs(matrix[:, kept]).max(axis=0)
        part = np.linalg.lstsq(matrix[:, kept] / scale, wanted, rcond=None)[0] / scale
        if (part >= 0).all():
            found[kept] = part
            break
        kept.pop(int(np.argmin(part * scale)))
    return found.tolist()


def robust(left: list[list[float]], right: list[float]) -> list[float]:
    """`non_negative` without what something else delayed: further off than FAR median deviations."""
    matrix, wanted = np.array(left, float), np.array(right, float)
    kept, found = np.ones(len(wanted), bool), []
    for _ in range(ROUNDS):
        found = non_negative(matrix[kept].tolist(), wanted[kept].tolist())
        off = np.abs(wanted - matrix @ np.array(found))
        kept = off <= FAR * max(float(np.median(off)), 1e-3)
    return found
