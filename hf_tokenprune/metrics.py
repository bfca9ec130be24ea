"""Metrics that need no hub, and the interval of a difference.

`evaluate.load` fetches its scripts; these are the same computations as `evaluate.Metric` subclasses.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import accuracy_score


DRAWN_AT_ONCE = 500  # resamples of a bootstrap


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference, as `{"accuracy": float}`."""

    def _info(self) -> evaluate.MetricInfo:
        integer = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions and references: lists of class indices.",
            features=datasets.Features({"predictions": integer, "references": integer}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of mean(a) - mean(b) over items, and over seeds where there are several.

    Args:
        a, b: one number per item, in the same order, [items] or [seeds, items]; for accuracy, whether each document was
            right. Seeds and items are drawn anew each for themselves.

    Raises:
        ValueError: different shapes, or no items.
    """
    left, right = (np.atleast_2d(np.asarray(x, dtype=float)) for x in (a, b))
    if left.shape != right.shape or not left.size:
        raise ValueError(f"a {np.shape(a)} and b {np.shape(b)} must be of the same shape, and not empty")
    differences = left - right
    chance = np.random.default_rng(seed)
    means = np.empty(resamples)
    for first in range(0, resamples, DRAWN_AT_ONCE):
        part = means[first : first + DRAWN_AT_ONCE]
        seeds, items = (chance.multinomial(n, np.full(n, 1 / n), size=len(part)) / n for n in differences.shape)
        part[:] = ((seeds @ differences) * items).sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
