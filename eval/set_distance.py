"""Distances between two sets of clips in a space of features: Fréchet distance, and the unbiased kernel distance.

    frechet(features_of_clips, features_of_reference)           # Measure: FID, FVD or FAD, by the features
    kernel_distance(features_of_clips, features_of_reference)   # Measure: KID

A clip has one vector [D] or several [k,D] (frames, windows). Vectors of a clip are alike, so clips are the independent
unit of all intervals. Everything is in fp64.

Intervals are value ± 1.96 standard errors of the jackknife, not bootstrap: clips that are drawn twice would make the sets
look less varied than they are, and both distances grow with that. They are about sampling noise only; the Fréchet
distance of small sets is too large on average, by an amount that depends on the number of samples, so compare only
sets of equal size.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from eval.stats import Measure

_Z = 1.959963984540054  # two-sided 95 % of a normal distribution
_CHUNK = 1 << 24  # entries of a kernel matrix that are computed at once: 128 MiB


def frechet(clips: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> Measure:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets, after Heusel et al., arXiv:1706.08500.

    The standard error is of the infinitesimal jackknife: the derivative of the distance with respect to each clip's weight.

    Args:
        clips, reference: fp32 [D] or [k,D] per clip.

    Returns:
        status "skipped" where a set has no more samples than dimensions: the covariance is then singular, and the value is
        mostly bias.
    """
    x, y = _rows(clips), _rows(reference)
    dimensions = x.shape[1]
    if min(len(x), len(y)) <= dimensions:
        reason = (
            f"{len(x)} and {len(y)} samples of {dimensions} dimensions: with no more samples than dimensions the Fréchet "
            "distance is mostly bias; use more clips, or the kernel distance, which has none"
        )
        return Measure(None, n=len(clips), status="skipped", reason=reason)
    difference = x.mean(0) - y.mean(0)
    of_x, of_y = np.cov(x, rowvar=False).reshape(dimensions, -1), np.cov(y, rowvar=False).reshape(dimensions, -1)
    root, towards_x = _root(of_x, of_y)
    _, towards_y = _root(of_y, of_x)
    value = float(difference @ difference + np.trace(of_x) + np.trace(of_y) - 2 * root)
    variance = _variance(x, clips, 2 * difference, towards_x) + _variance(y, reference, -2 * difference, towards_y)
    low, high = (max(0.0, value - _Z * variance**0.5), value + _Z * variance**0.5)
    # Rounding can make the distance of equal sets negative by about 1e-12.
    return Measure(max(0.0, value), low, high, len(clips))


def kernel_distance(clips: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> Measure:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, KID of arXiv:1801.01401, over the whole sets.

    Kernels are averaged over the vectors of a clip, and pairs within a clip are left out: frames of one clip are alike,
    and counting them as independent would make every set differ from itself. Without bias: 0 on average for sets from
    the same distribution, so single values may be negative.

    Args:
        clips, reference: fp32 [D] or [k,D] per clip.

    Returns:
        status "skipped" below 3 clips a side.
    """
    if min(len(clips), len(reference)) < 3:
        reason = f"{len(clips)} and {len(reference)} clips; 3 on each side are the least"
        return Measure(None, n=len(clips), status="skipped", reason=reason)
    within_x, within_y = _row_sums(clips, None), _row_sums(reference, None)
    across_x, across_y = _row_sums(clips, reference), _row_sums(reference, clips)
    n, m, across = len(clips), len(reference), across_x.sum()

    def half(sums: np.ndarray) -> float:
        return float(sums.sum() / (len(sums) * (len(sums) - 1)))

    value = half(within_x) + half(within_y) - 2 * across / (n * m)

    def jackknife(within: np.ndarray, across_of: np.ndarray, others: int) -> float:
        size = len(within)
        own = (within.sum() - 2 * within) / ((size - 1) * (size - 2))
        left_out = own - 2 * (across - across_of) / ((size - 1) * others)
        return float((size - 1) * left_out.var())

    error = (jackknife(within_x, across_x, m) + jackknife(within_y, across_y, n)) ** 0.5
    return Measure(float(value), float(value - _Z * error), float(value + _Z * error), n)


def _rows(clips: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.atleast_2d(np.asarray(clip, np.float64)) for clip in clips])


def _root(covariance: np.ndarray, other: np.ndarray) -> tuple[float, np.ndarray]:
    """tr (S1 S2)^(1/2), and the matrix [D,D] by which a deviation x from the mean of S1 counts: x^T (I - T) x.

    With S2 = L L^T and L^T S1 L = V diag(s^2) V^T the trace is sum(s), and T = L V diag(1/s) V^T L^T.
    """
    values, vectors = np.linalg.eigh(other)
    factor = vectors * np.sqrt(np.clip(values, 0, None))
    values, vectors = np.linalg.eigh(factor.T @ covariance @ factor)
    singular = np.sqrt(np.clip(values, 0, None))
    safe = singular > singular[-1] * 1e-7
    moved = factor @ vectors[:, safe]
    transport = (moved / singular[safe]) @ moved.T
    return float(singular.sum()), np.eye(len(covariance)) - transport


def _variance(x: np.ndarray, clips: Sequence[np.ndarray], slope: np.ndarray, curvature: np.ndarray) -> float:
    """Variance of the distance due to the sample of `clips`, whose vectors are the rows of x [n,D]."""
    centred = x - x.mean(0)
    influence = centred @ slope + np.einsum("nd,nd->n", centred @ curvature, centred)
    influence -= influence.mean()
    counts = [len(np.atleast_2d(clip)) for clip in clips]
    of_clips = np.add.reduceat(influence, np.cumsum([0, *counts[:-1]])) / len(x)
    return float(len(clips) / max(1, len(clips) - 1) * np.square(of_clips).sum())


def _row_sums(clips: Sequence[np.ndarray], others: Sequence[np.ndarray] | None) -> np.ndarray:
    """Sum over all `others` (None: over all clips but itself) of the mean kernel to them, fp64 [n]."""
    columns = clips if others is None else others
    y = _rows(columns)
    counts = np.array([len(np.atleast_2d(clip)) for clip in columns])
    starts = np.cumsum([0, *counts[:-1]])
    sums = np.zeros(len(clips))
    for first, part in _parts(clips, max(1, _CHUNK // len(y))):
        kernel = (_rows(part) @ y.T / y.shape[1] + 1) ** 3
        rows = [len(np.atleast_2d(clip)) for clip in part]
        between = np.add.reduceat(kernel, np.cumsum([0, *rows[:-1]]), axis=0) / np.array(rows)[:, None]
        between = np.add.reduceat(between, starts, axis=1) / counts
        if others is None:
            between[np.arange(len(part)), first + np.arange(len(part))] = 0
        sums[first : first + len(part)] = between.sum(1)
    return sums


def _parts(clips: Sequence[np.ndarray], rows: int) -> Iterator[tuple[int, Sequence[np.ndarray]]]:
    """Consecutive clips with at most `rows` vectors in all, at least one clip, with the number of the first."""
    first = 0
    while first < len(clips):
        last, taken = first, 0
        while last < len(clips) and (last == first or taken + len(np.atleast_2d(clips[last])) <= rows):
            taken += len(np.atleast_2d(clips[last]))
            last += 1
        yield first, clips[first:last]
        first = last
