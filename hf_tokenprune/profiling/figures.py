"""A figure of a report: what it is, its unit, how many measurements it comes from and how far they lie apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from ..metrics import bootstrap
from .latency import Timing, speedup, speedup_bound


QUARTILES = "quartiles"
LEAST_AND_MOST = "least and most"
INTERVAL = "95 % interval"
BOUND = "one-sided 95 % bound"

# How a report in words shows a unit.
SHOWN = {
    "seconds": (1e3, "ms"),
    "bytes": (2**-20, "MiB"),
    "MACs": (1e-9, "GMACs"),
    "FLOPs": (1e-9, "GFLOPs"),
    "ratio": (1, ""),
}

Value = float | list[float]


@dataclass(frozen=True)
class Spread:
    """How far measurements lie apart, or their value from the truth.

    Args:
        kind: what `low` and `high` are. high: None for a lower bound.
    """

    kind: str
    low: Value
    high: Value | None = None


@dataclass(frozen=True)
class Figure:
    """One figure.

    Args:
        what: what was measured. model: of which model, or over which ("pruned over unpadded").
        value: a number, or one for each layer. unit: seconds, bytes, MACs, FLOPs, tokens, joules, ratio, ...
        n: how many measurements it comes from; of: of what, for example inputs or rounds.
        spread: None for a single measurement.
    """

    what: str
    model: str
    value: Value
    unit: str
    n: int
    of: str
    spread: Spread | None = None

    def shown(self) -> tuple[str, str, str]:
        """The value with its unit, the spread and n, for a table."""
        scale, unit = SHOWN.get(self.unit, (1, self.unit))
        spread = ""
        if self.spread is not None:
            ends = [end for end in (self.spread.low, self.spread.high) if end is not None]
            spread = f"{' ... '.join(f'{scale * end:.4g}' for end in ends)} ({self.spread.kind})"
        return f"{scale * self.value:.4g} {unit}".strip(), spread, f"{self.n} {self.of}"


def quartiles(values: Sequence[Value]) -> Spread:
    low, high = np.percentile(values, (25, 75), axis=0).tolist()
    return Spread(QUARTILES, low, high)


def mean_of_inputs(what: str, model: str, values: Sequence[Value], unit: str) -> Figure:
    """The mean of one value, or one row of layers, for each input."""
    mean = np.mean(values, axis=0).tolist()
    return Figure(f"mean {what}", model, mean, unit, len(values), "inputs", quartiles(values))


def median_of(what: str, model: str, values: Sequence[Value], unit: str, of: str) -> Figure:
    """The median of few measurements, of one value or one row of layers each."""
    middle, low, high = (f(values, axis=0).tolist() for f in (np.median, np.min, np.max))
    return Figure(f"median {what}", model, middle, unit, len(values), of, Spread(LEAST_AND_MOST, low, high))


def share_of_inputs(what: str, model: str, hits: int, n: int) -> Figure:
    """The share of the inputs that hit, with Wilson's interval."""
    low, high = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return Figure(what, model, hits / n, "ratio", n, "inputs", Spread(INTERVAL, float(low), float(high)))


def score_of_inputs(what: str, model: str, predictions: np.ndarray, references: np.ndarray, value: float) -> Figure:
    """A metric of all inputs together, with the interval of a bootstrap over them."""
    spread = Spread(INTERVAL, *bootstrap(what, predictions[None], references))
    return Figure(what, model, value, "ratio", len(references), "inputs", spread)


def times(timings: dict[str, Timing], inputs: int) -> list[Figure]:
    """Seconds of an input and inputs per second of each model, and the speed-ups between them."""
    figures = []
    for name, timing in timings.items():
        n, middle, (low, high) = len(timing.seconds), timing.median, timing.spread
        each = Spread(QUARTILES, low / inputs, high / inputs)
        figures.append(Figure("median time of an input", name, middle / inputs, "seconds", n, "rounds", each))
        rate = Spread(QUARTILES, inputs / high, inputs / low)
        figures.append(Figure("median throughput", name, inputs / middle, "inputs/second", n, "rounds", rate))
    for slow, fast in (("padded", "unpadded"), ("padded", "pruned"), ("unpadded", "pruned")):
        pair = timings[slow], timings[fast]
        bound = Spread(BOUND, speedup_bound(*pair))
        n = len(timings[fast].seconds)
        figures.append(Figure("median speed-up", f"{fast} over {slow}", speedup(*pair), "ratio", n, "rounds", bound))
    return figures


def batch_times(size: int, timings: dict[str, Timing]) -> list[Figure]:
    """p50 and p99 of the time of one batch."""
    return [
        Figure(
            f"p{percent} of the time of a batch of {size}",
            name,
            timing.percentile(percent),
            "seconds",
            len(timing.seconds),
            "rounds",
            Spread(INTERVAL, *timing.percentile_interval(percent)),
        )
        for name, timing in timings.items()
        for percent in (50, 99)
    ]
