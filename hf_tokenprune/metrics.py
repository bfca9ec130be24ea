"""Metrics that need no hub, and the interval of a difference.

`evaluate.load` fetches its scripts; these are the same computations as `evaluate.Metric` subclasses.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from scipy.stats import bootstrap
from sklearn.metrics import accuracy_score


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
    a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of mean(a) - mean(b) over items that both were measured on.

    Args:
        a, b: one number per item, in the same order; for accuracy, whether each document was right.

    Raises:
        ValueError: different lengths, or no items.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"a ({len(a)} items) and b ({len(b)} items) must be of the same, positive length")
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if np.all(differences == differences[0]):
        return float(differences[0]), float(differences[0])
    result = bootstrap(
        (differences,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
