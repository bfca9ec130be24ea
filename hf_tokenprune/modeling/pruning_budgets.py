"""Many prunings in one: the values of the same sites for other costs.

Between two of them every site's value moves linearly, counts in whole tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from .pruning_stage import RULES, PruningStage
from .value_checks import check_integer, check_number, check_rate, check_sequence, quoted


Budgets = tuple[tuple[float, tuple[float, ...]], ...]

WHOLE = ("keep_count", "remove_count")


def eased(rule: str, value: float, progress: float, length: int) -> float:
    """A rule's value on the way from the one at which every token of `length` stays (progress 0) to its own (1)."""
    progress = check_number("progress", progress)
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress ({progress}) must be in [0, 1]")
    length = check_integer("length", length, 0)
    idle = RULES[rule].idle
    if rule == "keep_count" and progress > 0.0:
        idle = max(length, value)
    return _between(rule, idle, value, progress)


def check_budgets(budgets: Any, stages: Sequence[PruningStage]) -> Budgets:
    """Raises a ValueError unless MAC ratios rise and each comes with one value per site, as the rules have them."""
    checked, rules = [], site_rules(stages)
    for entry in check_sequence("budgets", budgets):
        pair = check_sequence("budgets", entry)
        if len(pair) != 2:
            raise ValueError(f"budgets ({quoted(entry)}) must be pairs of a MAC ratio and one value per site")
        ratio = check_rate("a budget's MAC ratio", pair[0])
        values = check_sequence("a budget's values", pair[1])
        if len(values) != len(rules):
            raise ValueError(f"a budget's values ({quoted(values)}) must be one per site, and there are {len(rules)}")
        checked.append((ratio, tuple(RULES[rule].check(rule, value) for rule, value in zip(rules, values))))
        check_falling(stages, checked[-1][1], "a budget's ")
    ratios = [ratio for ratio, _ in checked]
    if any(late <= early for early, late in pairwise(ratios)):
        raise ValueError(f"the MAC ratios of budgets ({quoted(ratios)}) must rise")
    return tuple(checked)


def check_waiting_budgets(budgets: Any, stage: PruningStage) -> Budgets:
    """The same before the number of sites is known: as many as the first budget has.

    stage: the only one, at whatever depth.
    """
    entries = check_sequence("budgets", budgets)
    pair = check_sequence("budgets", entries[0]) if entries else ()
    sites = len(check_sequence("a budget's values", pair[1])) if len(pair) == 2 else 0
    sites = max(sites, 1)
    return check_budgets(entries, (replace(stage, layers=range(sites), values=stage.values[:1] * sites),))


def values_at(budgets: Budgets, macs: float, stages: Sequence[PruningStage], length: int) -> tuple[float, ...]:
    """One value per site at a MAC ratio between those of the budgets, and of 1: nothing pruned of `length` tokens.

    Raises:
        ValueError: no budgets, or a ratio that none of them reaches.
    """
    macs, length = check_number("budget", macs), check_integer("length", length, 0)
    if not budgets:
        raise ValueError(f"budget ({macs}) needs a pruning with budgets=[[MAC ratio, [one value per site]], ...]")
    if not budgets[0][0] <= macs <= 1.0:
        raise ValueError(f"budget ({macs}) must be in [{budgets[0][0]}, 1]: the smallest that the pruning carries")
    rules, (highest, dearest) = site_rules(stages), budgets[-1]
    if highest < 1.0:
        budgets = *budgets, (1.0, tuple(eased(rule, value, 0.0, length) for rule, value in zip(rules, dearest)))
    if macs in (known := dict(budgets)):
        return known[macs]
    (low, cheap), (high, dear) = next(pair for pair in pairwise(budgets) if pair[0][0] <= macs <= pair[1][0])
    progress = (high - macs) / (high - low)
    if high == 1.0 > highest:
        return tuple(eased(rule, value, progress, length) for rule, value in zip(rules, cheap))
    return tuple(_between(rule, *pair, progress) for rule, *pair in zip(rules, dear, cheap))


def falling(stages: Sequence[PruningStage], values: Sequence[float]) -> list[float]:
    """One value per site, stage after stage, where a rule's may not rise none above those of earlier layers."""
    rules, layers = site_rules(stages), [layer for stage in stages for layer in stage.layers]
    least: dict[str, float] = {}
    result = [RULES[rule].check(rule, value) for rule, value in zip(rules, values)]
    for site in sorted(range(len(layers)), key=layers.__getitem__):
        rule = rules[site]
        least[rule] = min(least.get(rule, result[site]), result[site])
        result[site] = least[rule] if RULES[rule].falling else result[site]
    return result


def check_falling(stages: Sequence[PruningStage], values: Sequence[float], what: str = "") -> None:
    """Raises a ValueError where values, one per site, stage after stage, rise from layer to layer and may not.

    what: whose they are, to say before the rule's name.
    """
    layers = [layer for stage in stages for layer in stage.layers]
    sites = sorted(zip(layers, site_rules(stages), values))
    for name, rule in RULES.items():
        rule.check_order(f"{what}{name}", [value for _, own, value in sites if own == name])


def _between(rule: str, start: float, end: float, progress: float) -> float:
    value = start + (end - start) * progress
    return round(value) if rule in WHOLE else value


def site_rules(stages: Sequence[PruningStage]) -> list[str]:
    """The rule of each site, stage after stage."""
    return [stage.rule for stage in stages for _ in stage.layers]
