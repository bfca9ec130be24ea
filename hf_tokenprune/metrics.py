"""Metrics that need no hub, and the interval of a difference.

`evaluate.load` fetches its scripts; these are the same computations as `evaluate.Metric` subclasses.

Shapes: R draws of a bootstrap, n items, L labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import pearsonr, rankdata, spearmanr
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error

from .labels import CLASSES, MULTI_LABEL, REGRESSION


DRAWN_AT_ONCE = 500  # resamples of a bootstrap
NUMBERS_AT_ONCE = 2_000_000  # drawn items, so that memory does not grow with their number


def _info(what: str, inputs: str, kind: object) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=what,
        citation="",
        inputs_description=f"predictions and references: {inputs}.",
        features=datasets.Features({"predictions": kind, "references": kind}),
    )


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference, as `{"accuracy": float}`."""

    def _info(self) -> evaluate.MetricInfo:
        integer = datasets.Value("int64")
        return _info("Share of predictions that equal their reference.", "lists of class indices", integer)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class Regression(evaluate.Metric):
    """Pearson's and Spearman's correlation and the mean squared error, as `{"pearson", "spearman", "mse"}`.

    A correlation is 0 where predictions or references are all the same: they say nothing of one another.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("Correlations, and the mean squared error.", "lists of numbers", datasets.Value("float64"))

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        predictions, references = (np.asarray(x, dtype=float) for x in (predictions, references))
        told = len(predictions) > 1 and np.ptp(predictions) > 0 and np.ptp(references) > 0
        return {
            "pearson": float(pearsonr(predictions, references).statistic) if told else 0.0,
            "spearman": float(spearmanr(predictions, references).statistic) if told else 0.0,
            "mse": float(mean_squared_error(references, predictions)),
        }


class MultiLabel(evaluate.Metric):
    """F1 over all labels together and as the mean over labels, and the share of items whose labels are all right.

    As `{"f1_micro", "f1_macro", "exact_match"}`; the F1 of a label that is neither there nor predicted is 0.
    """

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.List(datasets.Value("int64"))
        return _info("F1 and exact match of several labels.", "lists of 0 and 1, one for each label", kind)

    def _compute(self, predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        f1 = {
            f"f1_{average}": float(f1_score(references, predictions, average=average, zero_division=0))
            for average in ("micro", "macro")
        }
        return f1 | {"exact_match": float(accuracy_score(references, predictions))}


def answers(problem: str, logits: np.ndarray) -> np.ndarray:
    """What logits [n, C] say: classes [n], numbers [n], or for each label [n, C] whether its sigmoid is above 0.5."""
    if problem == REGRESSION:
        return logits.reshape(len(logits), -1)[:, 0].astype(float)
    return (logits > 0).astype(int) if problem == MULTI_LABEL else logits.argmax(axis=-1)


@dataclass(frozen=True)
class Judgement:
    """How answers to one kind of problem are judged.

    Args:
        metric: what computes all of `names`.
        names: of the metrics; by the first runs are compared.
    """

    metric: type[evaluate.Metric]
    names: tuple[str, ...]

    def __call__(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        return self.metric().compute(predictions=predictions, references=references)


JUDGEMENTS: Mapping[str, Judgement] = MappingProxyType(
    {
        CLASSES: Judgement(Accuracy, ("accuracy",)),
        REGRESSION: Judgement(Regression, ("pearson", "spearman", "mse")),
        MULTI_LABEL: Judgement(MultiLabel, ("f1_micro", "f1_macro", "exact_match")),
    }
)
TITLES = MappingProxyType(
    {
        "accuracy": "accuracy",
        "pearson": "Pearson's r",
        "spearman": "Spearman's rho",
        "mse": "mean squared error",
        "f1_micro": "micro F1",
        "f1_macro": "macro F1",
        "exact_match": "exact match",
    }
)
# What the Hub's metadata call them.
HUB_NAMES = MappingProxyType(
    {
        "accuracy": "accuracy",
        "pearson": "pearsonr",
        "spearman": "spearmanr",
        "mse": "mse",
        "f1_micro": "f1",
        "f1_macro": "f1",
        "exact_match": "exact_match",
    }
)
LOWER_IS_BETTER = ("mse", "gmacs", "mac_ratio")  # of what an evaluation says, beside losses


def _pearson(weights: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of items [n], each so many times there: [R]."""
    a, b = ((x - x.mean()) / (x.std() or 1.0) for x in (a, b))  # so that sums of squares keep their digits
    sums = weights @ np.stack([a, b, a * a, b * b, a * b], axis=1) / weights.sum(axis=-1, keepdims=True)
    return _correlation(*sums.T)


def _correlation(a: np.ndarray, b: np.ndarray, aa: np.ndarray, bb: np.ndarray, ab: np.ndarray) -> np.ndarray:
    """From means of values, of their squares and of their products; 0 where one of the two does not vary."""
    size = np.sqrt(np.maximum(aa - a * a, 0.0) * np.maximum(bb - b * b, 0.0))
    told = size > 1e-12
    return np.where(told, (ab - a * b) / np.where(told, size, 1.0), 0.0)


def _ranks(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean rank of each item [R, n] among all, each so many times there, from -0.5 to 0.5."""
    place = rankdata(values, method="dense") - 1
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    groups = np.add.reduceat(weights[:, order], starts, axis=1)
    middle = (groups.cumsum(axis=1) - groups / 2) / weights.sum(axis=1, keepdims=True) - 0.5
    return middle[:, place]


def _spearman(weights: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b, total = _ranks(weights, a), _ranks(weights, b), weights.sum(axis=-1)
    wa, wb = weights * a, weights * b
    products = (np.einsum("rn,rn->r", x, y) for x, y in ((wa, a), (wb, b), (wa, b)))
    return _correlation(wa.sum(axis=-1) / total, wb.sum(axis=-1) / total, *(each / total for each in products))


def _f1(weights: np.ndarray, a: np.ndarray, b: np.ndarray, *, macro: bool) -> np.ndarray:
    right, given = weights @ (a * b), weights @ (a + b)  # [R, L]
    if not macro:
        right, given = right.sum(axis=-1, keepdims=True), given.sum(axis=-1, keepdims=True)
    return (2 * right / np.where(given > 0, given, 1.0)).mean(axis=-1)


def _mean(of: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable:
    return lambda weights, a, b: weights @ of(a, b).astype(float) / weights.sum(axis=-1)


# From how often each item was drawn [R, n], predictions and references to a metric of each draw [R].
_SCORES: Mapping[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = MappingProxyType(
    {
        "accuracy": _mean(np.equal),
        "pearson": _pearson,
        "spearman": _spearman,
        "mse": _mean(lambda a, b: (a - b) ** 2),
        "f1_micro": lambda *given: _f1(*given, macro=False),
        "f1_macro": lambda *given: _f1(*given, macro=True),
        "exact_match": _mean(lambda a, b: (a == b).all(axis=-1)),
    }
)


def bootstrap(
    metric: str,
    predictions: ArrayLike,
    references: ArrayLike,
    other: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 1999,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of a metric, or of its difference to other predictions of the same items.

    Args:
        metric: one of `TITLES`.
        predictions, other: [seeds, n] or, of several labels, [seeds, n, L]. Seeds and items are drawn anew each for
            themselves, the same for both.
        references: [n] or [n, L].

    Raises:
        ValueError: different shapes, or no items.
    """
    own, references = np.asarray(predictions, dtype=float), np.asarray(references, dtype=float)
    others = None if other is None else np.asarray(other, dtype=float)
    if not own.size or own.shape[1:] != references.shape or (others is not None and others.shape != own.shape):
        raise ValueError(
            f"predictions {own.shape} and other {np.shape(other)} must be of one shape, [seeds, *references "
            f"{references.shape}], and not empty"
        )
    if others is not None and np.array_equal(own, others):
        return 0.0, 0.0
    score, chance = _SCORES[metric], np.random.default_rng(seed)
    values, (count, n) = np.empty(resamples), own.shape[:2]
    at_once = max(1, min(DRAWN_AT_ONCE, NUMBERS_AT_ONCE // n))
    for first in range(0, resamples, at_once):
        part = values[first : first + at_once]
        seeds, items = (
            chance.multinomial(size, np.full(size, 1 / size), size=len(part)).astype(float) for size in (count, n)
        )
        of_each = [
            score(items, own[run], references) - (0.0 if others is None else score(items, others[run], references))
            for run in range(count)
        ]
        part[:] = (seeds * np.stack(of_each, axis=1)).sum(axis=1) / count
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


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
