"""`plan`: from a target MAC ratio, speed-up or latency to the `PruningConfig` that meets it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..convert import prune
from ..modeling.pruning_config import PruningConfig, default_layers
from ..profiling.macs import count_macs
from .latency_curve import LatencyCurve, measure_curve


WORTH_IT = 1.03  # a speed-up below this is not told from the clock's own spread


@dataclass(frozen=True)
class Plan:
    """What to prune, and what to expect.

    Args:
        pruning: for `set_pruning`; None: leave it off.
        met: whether the target can be met.
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
    quarter, half and three quarters of the depth; where the target asks for more than those can give, every layer from
    a later or, at last, the first one on prunes.

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
    planner = _Planner(model, inputs, common)
    if name == "target_macs":
        return planner.for_macs(value, layers)
    layers = default_layers(model.config.num_hidden_layers) if layers is None else layers
    curve = measure_curve(model, inputs, layers, common=common)
    wanted = value if name == "target_speedup" else curve.seconds[0] / value
    return planner.for_speedup(wanted, layers, curve)


class _Planner:
    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any], common: dict[str, Any]):
        self.model, self.inputs, self.common = model, inputs, common
        self.depth = model.config.num_hidden_layers

    def top_k(self, layers: Sequence[int], thousandths: int) -> PruningConfig:
        return PruningConfig.preset("top_k", layers=layers, keep_rate=thousandths / 1000, **self.common)

    def macs(self, pruning: PruningConfig | None) -> float:
        return count_macs(prune(self.model, pruning), self.inputs).ratio

    def for_macs(self, target: float, layers: Sequence[int] | None) -> Plan:
        unpruned = self.macs(None)
        if unpruned <= target:
            return Plan(
                None, True, unpruned, None, None, f"With nothing pruned it costs {unpruned:.3f} of the MACs already."
            )
        choices = self._choices() if layers is None else [list(layers)]
        for sites in choices:
            least = self.macs(self.top_k(sites, 1))
            if least <= target:
                return self._closest(sites, target)
        pruning = self.top_k(choices[-1], 1)
        return Plan(
            pruning,
            False,
            least,
            None,
            None,
            f"{target:.3f} of the MACs cannot be met; the closest: {least:.3f}, with sites at {choices[-1]} that keep "
            "next to nothing.",
        )

    def _choices(self) -> list[list[int]]:
        usual = default_layers(self.depth)
        return [usual, *(list(range(first, self.depth)) for first in range(usual[0], -1, -1))]

    def _closest(self, sites: Sequence[int], target: float) -> Plan:
        """MACs rise with the rate: bisection over thousandths, and the closer of the two neighbours."""
        low, high = 1, 1000
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.macs(self.top_k(sites, middle)) <= target else (low, middle)
        ratios = {rate: self.macs(self.top_k(sites, rate)) for rate in (low, high)}
        rate = min(ratios, key=lambda rate: abs(ratios[rate] - target))
        verdict = f"top_k with keep_rate {rate / 1000} at layers {list(sites)} costs {ratios[rate]:.3f} of the MACs."
        return Plan(self.top_k(sites, rate), True, ratios[rate], None, None, verdict)

    def for_speedup(self, wanted: float, layers: Sequence[int], curve: LatencyCurve) -> Plan:
        best = max(curve.speedups)
        if best < WORTH_IT:
            return Plan(
                None,
                wanted <= 1.0,
                self.macs(None),
                1.0,
                curve.seconds[0],
                f"Leave pruning off: for this batch on this device it gains at most {best:.2f}x.",
            )
        if wanted <= 1.0:
            verdict = f"With nothing pruned it takes {curve.seconds[0]:.4f} s, which meets the target."
            return Plan(None, True, self.macs(None), 1.0, curve.seconds[0], verdict)
        rate = curve.rate_for(wanted)
        met = rate is not None
        fastest = curve.rates[curve.speedups.index(best)]
        thousandths = round(1000 * (rate if met else fastest))
        expected = wanted if met else best
        pruning = self.top_k(layers, thousandths)
        what = f"top_k with keep_rate {thousandths / 1000} at layers {list(layers)}"
        verdict = f"{what} gains {expected:.2f}x over nothing pruned."
        if not met:
            verdict = f"{wanted:.2f}x cannot be met with sites at {list(layers)}; the closest: {verdict}"
        return Plan(pruning, met, self.macs(pruning), expected, curve.seconds[0] / expected, verdict)
