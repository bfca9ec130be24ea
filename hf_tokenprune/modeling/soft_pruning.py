"""Masks that stand for removal while a model trains, their parameters, and what each objective adds to the loss.

In the soft phase no token is removed: every row has a weight in [0, 1], the product of its masks so far. A weight of 0
is removal, of 1 its contrary, and in between there is a gradient.

Shapes: B samples, K rows, D features; `..` is how the rows of the call lie in memory.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .pruning_objective import Objective
from .pruning_stage import RULES, Site
from .saliency import TokenPredictor, without_autocast
from .selection import middle
from .token_macs import sample_macs
from .token_outputs import EncoderCall
from .token_state import TokenState


class ThresholdMask(nn.Module):
    """A site's threshold, learned as its logarithm, so that one learning rate fits all."""

    def __init__(self, threshold: float):
        super().__init__()
        self.initial = math.log(threshold)
        self.log_threshold = nn.Parameter(torch.tensor(self.initial))

    def reset_parameters(self) -> None:
        init.constant_(self.log_threshold, self.initial)

    @property
    def value(self) -> torch.Tensor:
        """The threshold, for the rule that it is of."""
        return self.log_threshold.detach().float().exp()

    def forward(self, scores: torch.Tensor, state: TokenState, site: Site, objective: Objective) -> torch.Tensor:
        """The mask of each row from its score, [B, K]."""
        log_threshold = self.log_threshold.float()
        if objective.name == "ltp":
            return ((scores - log_threshold.exp()) / objective.temperature).sigmoid()
        if site.rule == "relative_threshold":
            scores = scores * state.weights.sum(dim=1, keepdim=True)
        if site.rule == "median_threshold":
            left = (state.weights > 0.5) & ~state.held
            scores = scores / middle(scores.detach(), left).clamp(min=1e-12)
        return ((scores.clamp(min=1e-12).log() - log_threshold) / objective.temperature).sigmoid()


class RankMask(nn.Module):
    """How much of the token of each rank stays: r_l of PoWER-BERT (ICML 2020).

    Args:
        ranks: how many there are, all of which stay at first; a token behind them goes.
    """

    def __init__(self, ranks: int):
        super().__init__()
        self.initial = ranks
        self.share = nn.Parameter(torch.ones(ranks))

    def reset_parameters(self) -> None:
        init.ones_(self.share)

    @property
    def clamped(self) -> torch.Tensor:
        """The shares in [0, 1], with a gradient everywhere."""
        share = self.share.float()
        return share + (share.clamp(0.0, 1.0) - share).detach()

    @property
    def value(self) -> int:
        """The retention, at least 1."""
        return max(1, round(self.clamped.sum().item()))

    def forward(self, scores: torch.Tensor, state: TokenState, site: Site, objective: Objective) -> torch.Tensor:
        """The mask of each row from the rank of its score, [B, K]; protected rows come first."""
        ranked = scores.detach().masked_fill(~state.alive, -torch.inf).masked_fill(state.held, torch.inf)
        rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return nn.functional.pad(self.clamped, (0, 1))[rank.clamp(max=len(self.share))]


class BudgetMultipliers(nn.Module):
    """lambda_1 and lambda_2 of a constraint on the cost. Whoever minimises the loss raises them while it is not met."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Parameter(torch.zeros(()))
        self.quadratic = nn.Parameter(torch.zeros(()))

    def reset_parameters(self) -> None:
        init.zeros_(self.linear)
        init.zeros_(self.quadratic)

    def forward(self, excess: torch.Tensor) -> torch.Tensor:
        """lambda_1 excess + lambda_2 excess^2, with the gradient of the multipliers reversed: ascent, by any optimiser.

        lambda_1 does not fall below 0: while the cost is below its target, nothing is owed for later.

        excess: c - c*, a scalar.
        """
        linear = self.linear.detach()
        moves = (excess.detach() > 0) | (linear > 0)
        linear = torch.where(moves, _reversed(self.linear), linear) + linear.clamp(min=0.0) - linear
        return linear * excess + _reversed(self.quadratic) * excess.square()


SoftModule = ThresholdMask | RankMask | BudgetMultipliers


def _reversed(x: torch.Tensor) -> torch.Tensor:
    """x with a gradient of the other sign."""
    return 2 * x.detach() - x


def mask_module(site: Site, objective: Objective, longest: int) -> nn.Module | None:
    """The parameters that a site's masks have of their own, which start at its value; None: it has none, or can remove
    nothing.

    longest: tokens of the longest input.
    """
    if not objective.learns_values or site.value == RULES[site.rule].idle:
        return None
    return RankMask(min(site.value, longest)) if site.rule == "keep_count" else ThresholdMask(site.value)


class SoftReduction(NamedTuple):
    """A reduction that removes nothing. Has the two steps of `token_reducer.Reduction`.

    state: the same rows with their new weights. mask: [B, K], where hidden states are multiplied by it.
    """

    state: TokenState
    mask: torch.Tensor | None

    def finish(self, hidden: torch.Tensor) -> tuple[torch.Tensor, TokenState]:
        """hidden [.., D], laid out as `state`'s rows -> the same, multiplied where the objective says so."""
        if self.mask is not None:
            hidden = hidden * self.state.layout.lay(self.mask.to(hidden.dtype))[..., None]
        return hidden, self.state


def soften(
    scores: torch.Tensor, state: TokenState, site: Site, objective: Objective, module: nn.Module
) -> SoftReduction:
    """The reduction of a site whose masks come from scores [B, K], one per row."""
    mask = module(scores, state, site, objective)
    return _weighed(mask, state, objective)


def soften_learned(
    predictor: TokenPredictor,
    hidden: torch.Tensor,
    state: TokenState,
    site: Site,
    objective: Objective,
    module: nn.Module | None,
) -> SoftReduction:
    """The reduction of a site that a predictor scores: masks of its scores, or, where the objective learns no
    threshold, drawn ones, 0 or 1, with the gradient of a Gumbel softmax.

    hidden: [.., D] laid out as the state's rows. Means, in the predictor and of its scores, are over what is left.
    """
    counted = state.weights.masked_fill(state.alive.cumsum(dim=1) <= state.input.prefix, 0.0)
    rows = state.layout.spread(hidden).masked_fill(~state.alive[..., None], 0.0)
    with without_autocast(rows):
        choices = predictor(rows, counted).float()  # [B, K, 2]
    if objective.learns_values:
        stays = choices[..., 0].exp()
        return soften(
            stays / (stays * counted).sum(dim=1, keepdim=True).clamp(min=1e-12), state, site, objective, module
        )
    drawn = nn.functional.gumbel_softmax(choices, tau=objective.temperature, hard=True, dim=-1)
    return _weighed(drawn[..., 0], state, objective)


def _weighed(mask: torch.Tensor, state: TokenState, objective: Objective) -> SoftReduction:
    mask = torch.where(state.held, 1.0, mask)
    after = state._replace(weight=state.weights * mask.masked_fill(~state.alive, 0.0))
    return SoftReduction(after, mask if objective.method.on_hidden else None)


def objective_loss(
    objective: Objective, call: EncoderCall, config: Any, modules: Sequence[nn.Module], budget: nn.Module | None
) -> torch.Tensor:
    """What the objective adds to the loss of a call in the soft phase: a scalar.

    Args:
        call: what the call collected: the states after each soft site, and the layers' work.
        modules: the masks of the sites.
        budget: the multipliers, where there is a budget.
    """
    match objective.name:
        case "ltp":
            return objective.penalty * _mean_over_sites(_mean_weight(state, prefix=0) for _, state in call.softened)
        case "dynamicvit":
            misses = ((_mean_weight(state, state.input.prefix) - site.value).square() for site, state in call.softened)
            return objective.penalty * _mean_over_sites(misses)
        case "power_bert":
            mass = ((site.layer + 1) * module.clamped.sum() for (site, _), module in zip(call.softened, modules))
            return objective.penalty * sum(mass)
        case _:
            excess = expected_ratio(call, config) - objective.target_macs
            return budget(excess) + objective.penalty * excess.square()


def expected_ratio(call: EncoderCall, config: Any) -> torch.Tensor:
    """The MAC ratio of a call, over all its samples together: a scalar, with a gradient in the soft phase."""
    macs, whole = sample_macs(call, config)
    return (macs / whole.sum()).sum()


def _mean_over_sites(values: Any) -> torch.Tensor:
    """Values [B] per site -> their mean over samples and sites."""
    return torch.stack(list(values)).mean()


def _mean_weight(state: TokenState, prefix: int) -> torch.Tensor:
    """The mean weight of each sample's own tokens behind the prefix.  [B]"""
    there = state.alive & (state.alive.cumsum(dim=1) > prefix)
    return torch.where(there, state.weights, 0.0).sum(dim=1) / there.sum(dim=1).clamp(min=1)
