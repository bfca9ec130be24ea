"""`plan`: from a target MAC ratio, speed-up or latency to the `PruningConfig` that meets it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ..convert import prune
from ..modeling.pruning_config import PruningConfig, default_layers
from ..profiling.macs import count_macs
from ..training.budget import MISSED
from .latency_curve import LatencyCurve, measure_curve


WORTH_IT = 1.03  # a speed-up below this is not told from the clock's own spread
UNSTEADY = "The clock was too unsteady to rely on: with more pruned, the model seemed clearly slower."
NOT_TIMED = "Time on this device was not looked at: target_speedup and target_latency ask for it."


@dataclass(frozen=True)
class Plan:
    """What to prune, and what to expect.

    Args:
        pruning: for `set_pruning`; None: leave it off.
        met: whether the target can be met: a MAC ratio within 0.01, a time by what was measured here, if the
            clock was steady.
        macs: the MAC ratio (total / unpruned) on the given batch.
        speedup: over our engine with nothing pruned, on this device; None where time was not asked for.
        seconds: for the given batch, likewise.
        verdict: the same in words.
    """

    pruning: PruningConfig | None
    met: bool
    macs: float
    speedup: float | None
    seconds: float | None
    verdict: str


def plan(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    *,
    target_macs: float | None = None,
    target_speedup: float | None = None,
    target_latency: float | None = None,
    layers: Sequence[int] | None = None,
    **common: Any,
) -> Plan:
    """Which layers prune how much, so that a batch like this one meets a target.

    The rule is `top_k`: its counts follow from lengths alone, so that what is planned is what comes. Sites are at a
    quarter, half and three quarters of the depth; where those cannot meet the target, every layer from a later or, at
    last, the first one on prunes. Where none can, the closest of all is planned and `met` is false.

    Args:
        model: a native model of a supported family, or one of ours.
        inputs: a batch as the model will meet it: batch size and lengths are planned for. On the model's device.
        target_macs: multiply-accumulates of the pruned encoder / of the stock encoder on the same unpadded tokens.
        target_speedup: over our engine with nothing pruned, on this device; saved padding is not counted.
        target_latency: seconds for the batch, on this device.
        layers: the sites, where you want them.
        common: `protected_token_ids`, `min_tokens`, `execution`.

    Raises:
        ValueError: not exactly one target, or one out of range.
        TypeError: a model of an unsupported family.
    """
    targets = {"target_macs": target_macs, "target_speedup": target_speedup, "target_latency": target_latency}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"exactly one of {', '.join(targets)} must be given, not {given or 'none'}")
    ((name, value),) = given.items()
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{name} ({value!r}) must be a number above 0")
    if name == "target_macs" and value > 1:
        raise ValueError(f"target_macs ({value!r}) must be in (0, 1]")
    prune(model, None)  # or an error, before a config of a family that is not supported is asked for anything
    planner = _Planner(model, inputs, common, layers)
    return planner.for_macs(value) if name == "target_macs" else planner.for_time(name, value)


class _Planner:
    def __init__(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], common: dict[str, Any], layers: Sequence[int] | None
    ):
        self.model, self.inputs, self.common = model, inputs, common
        self.choices = _choices(model.config.num_hidden_layers) if layers is None else [list(layers)]

    def top_k(self, layers: Sequence[int], thousandths: int) -> PruningConfig:
        return PruningConfig.preset("top_k", layers=layers, keep_rate=thousandths / 1000, **self.common)

    def macs(self, pruning: PruningConfig | None) -> float:
        return count_macs(prune(self.model, pruning), self.inputs).ratio

    def for_macs(self, target: float) -> Plan:
        unpruned = self.macs(None)
        if unpruned <= target:
            verdict = f"With nothing pruned it costs {unpruned:.3f} of the MACs already."
            return Plan(None, True, unpruned, None, None, verdict)
        found = []
        for sites in self.choices:
            found.append((sites, *self._closest(sites, target)))
            if abs(found[-1][-1] - target) <= MISSED:
                break
        sites, rate, macs = min(found, key=lambda each: abs(each[-1] - target))
        met = abs(macs - target) <= MISSED
        verdict = f"{_words(sites, rate)} costs {macs:.3f} of the MACs."
        if not met:
            verdict = f"{target:.3f} of the MACs cannot be met within {MISSED}; the closest: {verdict}"
        return Plan(self.top_k(sites, rate), met, macs, None, None, f"{verdict} {NOT_TIMED}")

    def _closest(self, sites: Sequence[int], target: float) -> tuple[int, float]:
        return closest_rate(lambda rate: self.macs(self.top_k(sites, rate)), target)

    def for_time(self, name: str, value: float) -> Plan:
        curves: list[LatencyCurve] = []
        planned = self._by_curves(name, value, curves)
        if all(curve.steady for curve in curves):
            return planned
        return replace(planned, met=False, verdict=f"{planned.verdict} {UNSTEADY}")

    def _by_curves(self, name: str, value: float, curves: list[LatencyCurve]) -> Plan:
        """Adds those that it looks at to `curves`."""
        found = []
        for sites in self.choices:
            curve = measure_curve(self.model, self.inputs, sites, common=self.common)
            curves.append(curve)
            wanted = value if name == "target_speedup" else curve.seconds[0] / value
            if wanted <= 1.0:
                verdict = f"With nothing pruned it takes {curve.seconds[0]:.4f} s, which meets the target."
                return Plan(None, True, self.macs(None), 1.0, curve.seconds[0], verdict)
            best, rate = max(curve.speedups), curve.rate_for(wanted)
            if best >= WORTH_IT and rate is not None:
                return self._faster(sites, rate, max(wanted, curve.speedups[1]), curve)
            found.append((best, sites, curve, wanted))
        best, sites, curve, wanted = max(found, key=lambda each: each[0])
        if best < WORTH_IT:
            verdict = f"Leave pruning off: for this batch on this device it gains at most {best:.2f}x."
            return Plan(None, False, self.macs(None), 1.0, curve.seconds[0], verdict)
        closest = self._faster(sites, curve.rates[curve.speedups.index(best)], best, curve)
        where = " or ".join(map(str, self.choices))
        verdict = f"{wanted:.2f}x cannot be met with sites at {where}; the closest: {closest.verdict}"
        return replace(closest, met=False, verdict=verdict)

    def _faster(self, sites: Sequence[int], rate: float, expected: float, curve: LatencyCurve) -> Plan:
        thousandths = round(1000 * rate)
        pruning = self.top_k(sites, thousandths)
        verdict = f"{_words(sites, thousandths)} gains {expected:.2f}x over nothing pruned."
        return Plan(pruning, True, self.macs(pruning), expected, curve.seconds[0] / expected, verdict)


def closest_rate(macs_at: Callable[[int], float], target: float) -> tuple[int, float]:
    """The keep rate, in thousandths, that costs closest to the target, and its MAC ratio.

    MACs rise with the rate: bisection, and the closer of the two neighbours.
    """
    low, high = 1, 1000
    ratios = {rate: macs_at(rate) for rate in (low, high)}
    while high - low > 1 and ratios[low] < target:
        middle = (low + high) // 2
        ratios[middle] = macs_at(middle)
        low, high = (middle, high) if ratios[middle] <= target else (low, middle)
    return min(((rate, ratios[rate]) for rate in (low, high)), key=lambda each: abs(each[1] - target))


def _choices(depth: int) -> list[list[int]]:
    usual = default_layers(depth)
    runs = [list(range(first, depth)) for first in range(usual[0], -1, -1)]
    return [usual, *(run for run in runs if run != usual)]


def _words(sites: Sequence[int], thousandths: int) -> str:
    return f"top_k with keep_rate {thousandths / 1000} at layers {list(sites)}"
