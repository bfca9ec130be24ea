"""From MAC ratios to the values that cost them, by measuring."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from scipy.optimize import brentq
from transformers.utils import logging

from ..modeling.pruning_config import PruningConfig
from ..modeling.pruning_objective import OBJECTIVES


logger = logging.get_logger(__name__)

OCTAVES = 20.0  # of thresholds, up and down
CLOSE = 0.002
MISSED = 0.01  # of a MAC ratio: beyond this a target is said to be missed; where tokens are few, each of them counts
THRESHOLDS = frozenset(OBJECTIVES["budget"].rules)  # rules whose values are these
HIGHEST = 1e6  # of a threshold: no score reaches it


def thresholds_for_budget(
    pruning: PruningConfig, target: float, ratio_at: Callable[[PruningConfig], float]
) -> PruningConfig:
    """The pruning with all thresholds multiplied by one factor, so that the MAC ratio is closest to `target`.

    Args:
        ratio_at: measures a pruning's MAC ratio. A dozen measurements, or thirty at most.

    The factor is within a million, up and down; where even that is not enough, the closest.
    """
    measured: dict[float, float] = {}

    def excess(octaves: float) -> float:
        if octaves not in measured:
            scaled = pruning.with_values([value * 2.0**octaves for value in pruning.values])
            measured[octaves] = ratio_at(scaled) - target
        return 0.0 if abs(measured[octaves]) < CLOSE else measured[octaves]

    # Thresholds and costs move against one another.
    start, bound = excess(0.0), 0.0
    while start and abs(bound) < OCTAVES:
        near, bound = bound, bound + (2.0 if start > 0 else -2.0)
        if excess(bound) * start <= 0:
            brentq(excess, near, bound, xtol=1e-4, maxiter=16, disp=False)
            break
    best = min(measured, key=lambda octaves: abs(measured[octaves]))
    return pruning.with_values([value * 2.0**best for value in pruning.values])


def check_reach(pruning: PruningConfig, target: float, ratio_at: Callable[[PruningConfig], float]) -> None:
    """Raises a ValueError for a MAC ratio that these sites cannot come down to, whatever their thresholds, or from
    thresholds that no factor moves."""
    if not any(pruning.values):
        values = list(pruning.values)
        raise ValueError(f"thresholds ({values}) must not all be 0 with target_macs ({target}), which scales them")
    highest = replace(pruning.with_values([HIGHEST] * len(pruning.values)), objective=None)
    least = ratio_at(highest)
    if least > target:
        raise ValueError(
            f"target_macs ({target}) must be at least {least:.3f}: what is left when almost no token is kept after "
            f"layers {sorted(pruning.sites)}; sites at earlier layers save more"
        )


def with_budgets(
    pruning: PruningConfig,
    targets: Sequence[float],
    ratio_at: Callable[[PruningConfig], float],
    length: int,
    clamp: bool = False,
) -> PruningConfig:
    """The pruning with `budgets`: for each MAC ratio, values on the way from nothing pruned to its own.

    Args:
        ratio_at: measures a pruning's MAC ratio; about eight times for each target.
        length: tokens of the longest input.
        clamp: whether a target below what the pruning's own values cost becomes that, with a warning: a model that is
            trained is not to be lost for it.

    Raises:
        ValueError: such a target, without `clamp`.
    """
    plain = replace(pruning, budgets=(), objective=None)
    most, least = (ratio_at(plain.eased(progress, length)) for progress in (0.0, 1.0))
    if min(targets) < least - CLOSE:
        rule = f"must be at least {least:.3f}: what the pruning's own values cost"
        if not clamp:
            raise ValueError(f"a budget ({min(targets)}) {rule}")
        below = sorted(target for target in set(targets) if target < least - CLOSE)
        logger.warning(f"budgets ({below}) {rule} after training; {least:.3f} takes their place")
        targets = [max(target, least) for target in targets]
    budgets = []
    for target in sorted(set(targets)):

        def excess(progress: float, target: float = target) -> float:
            off = ratio_at(plain.eased(progress, length)) - target
            return 0.0 if abs(off) < CLOSE else off

        met = 0.0 if target >= most else 1.0 if target <= least + CLOSE else brentq(excess, 0.0, 1.0, xtol=0.002)
        budgets.append((target, plain.eased(met, length).values))
    return replace(pruning, budgets=budgets)
