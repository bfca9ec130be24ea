"""The last step to a budget: thresholds that were learned under it, moved together until it is met."""

from collections.abc import Callable

from scipy.optimize import brentq

from ..modeling.pruning_config import PruningConfig


OCTAVES = 6.0  # of thresholds, up and down
CLOSE = 0.002


def thresholds_for_budget(
    pruning: PruningConfig, target: float, ratio_at: Callable[[PruningConfig], float]
) -> PruningConfig:
    """The pruning with all thresholds multiplied by one factor, so that the MAC ratio is closest to `target`.

    Args:
        ratio_at: measures a pruning's MAC ratio. Fifteen measurements at most.

    Raises:
        ValueError: a target that no factor in [1/64, 64] comes within 0.02 of.
    """
    measured: dict[float, float] = {}

    def excess(octaves: float) -> float:
        scaled = pruning.with_values([value * 2.0**octaves for value in pruning.values])
        measured[octaves] = ratio_at(scaled) - target
        return 0.0 if abs(measured[octaves]) < CLOSE else measured[octaves]

    # Thresholds and costs move against one another.
    start, bound = excess(0.0), 0.0
    while start and abs(bound) < OCTAVES:
        bound += 2.0 if start > 0 else -2.0
        if excess(bound) * start <= 0:
            brentq(excess, 0.0, bound, xtol=0.01, maxiter=10, disp=False)
            break
    best = min(measured, key=lambda octaves: abs(measured[octaves]))
    if abs(measured[best]) > 0.02:
        raise ValueError(
            f"target_macs ({target}) must be in reach: thresholds of {list(pruning.values)} times 1/64 to 64 come no "
            f"closer than {target + measured[best]:.3f}"
        )
    return pruning.with_values([value * 2.0**best for value in pruning.values])
