"""`calibrate`: the thresholds at which inputs cost a given share on average, and each of them its own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from transformers import PreTrainedModel

from ..convert import prune
from ..modeling.pruning_config import PruningConfig, default_layers
from ..modeling.pruning_stage import PruningStage
from ..modeling.selection import relative_scores
from ..modeling.token_outputs import EncoderCall
from ..profiling.linear_macs import evaluating, linear_macs
from ..profiling.macs import count_call
from ..training.budget import HIGHEST, thresholds_for_budget
from ..training.token_prior import TINY, fit_token_prior
from .held_back import Batches, all_batches, sample


CLOSE = 0.02  # of the MAC ratio: as far as a target may be missed where scores tie or tokens are few


@dataclass(frozen=True)
class Calibration:
    """Thresholds and what they cost.

    Args:
        pruning: preset `adaptive` with them.
        met: whether the target is met: within 0.02, or already where no threshold takes anything.
        macs: the MAC ratio over all calibration inputs together.
        least, most: the MAC ratios of the cheapest and of the dearest input.
        inputs: how many there were.
        prior: the table of worths [V] for `set_token_prior`, where there is a site for it.
    """

    pruning: PruningConfig
    met: bool
    macs: float
    least: float
    most: float
    inputs: int
    prior: torch.Tensor | None = field(default=None, compare=False)


def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    target_macs: float,
    layers: Sequence[int] | None = None,
    saliency: str = "cls_attention",
    relative_to: str = "median",
    prior_share: float = 0.0,
    progress: Callable = iter,
    **common: Any,
) -> Calibration:
    """Finds the thresholds of preset `adaptive` at which unlabelled inputs cost `target_macs` on average.

    Training-free and deterministic. First the keep rate at which `top_k` costs the target; then, site after site, the
    quantile of the scores that as many tokens reach; at last one factor on all thresholds, until the target is met or
    nothing comes closer: tokens of equal scores go together.

    Args:
        model: a native model of a supported family, or one of ours.
        batches: a few hundred inputs as the model will meet them, without labels.
        target_macs: multiply-accumulates of the pruned encoder / of the stock encoder on the same unpadded tokens.
        layers: the sites; a quarter, half and three quarters of the depth if not given.
        saliency, relative_to: as `adaptive` takes them.
        prior_share: of the unprotected tokens, those that go before the first layer by what their id is worth on
            average.
        progress: wraps the iteration over the sites, each of which is a pass over the inputs, for example `tqdm`.
        common: `protected_token_ids`, `min_tokens`, `execution`.

    Raises:
        TypeError: a model of an unsupported family, listing the supported ones, or one batch in place of several.
        ValueError: a target outside (0, 1], a share outside [0, 1), or no inputs.
    """
    if isinstance(target_macs, bool) or not isinstance(target_macs, int | float) or not 0 < target_macs <= 1:
        raise ValueError(f"target_macs ({target_macs!r}) must be in (0, 1]")
    prune(model, None)  # or an error, before a config of a family that is not supported is asked for anything
    batches = [{k: value for k, value in batch.items() if k != "labels"} for batch in all_batches(batches)]
    if not batches:
        raise ValueError("batches (0) must hold at least one batch of inputs")
    if layers is None:  # the first layer's site may be the prior's
        layers = [layer for layer in default_layers(model.config.num_hidden_layers) if layer or not prior_share]
        if not layers:
            raise ValueError(f"prior_share ({prior_share}) must be 0 with a model of one layer: it takes the only site")
    layers = list(layers)

    def adaptive(thresholds: Sequence[float]) -> PruningConfig:
        return PruningConfig.preset(
            "adaptive",
            layers=layers[: len(thresholds)],
            threshold=list(thresholds),
            saliency=saliency,
            relative_to=relative_to,
            **common,
        )

    stages, table = (), None
    if check_prior_share(prior_share):
        model, stages = _with_prior(model, adaptive([TINY] * len(layers)), batches, prior_share)
        table = model.base_model.prior_tables()[0].worth

    def measured(pruning: PruningConfig, inputs: Batches) -> Calibration:
        found = _measured(model, behind(stages, pruning), inputs)
        return replace(found, met=abs(found.macs - target_macs) <= CLOSE, prior=table)

    nothing = measured(adaptive([0.0] * len(layers)), batches)
    if nothing.macs <= target_macs:
        return replace(nothing, met=True)
    everything = measured(adaptive([HIGHEST] * len(layers)), batches)
    if everything.macs > target_macs:
        return everything
    some = sample(batches)
    top_k = partial(PruningConfig.preset, "top_k", layers=layers, saliency=saliency, **common)
    rate = _rate(lambda rate: measured(top_k(keep_rate=rate), some).macs, target_macs)
    thresholds: list[float] = []
    for _ in progress(range(len(layers))):
        tried = behind(stages, adaptive([*thresholds, TINY]))
        scores = _scores(model, tried, layers[len(thresholds)], batches)
        thresholds.append(_quantile(scores, 1.0 - rate) if len(scores) else TINY)
    start = adaptive([max(threshold, TINY) for threshold in thresholds])
    pruning = thresholds_for_budget(start, target_macs, lambda tried: measured(tried, batches).macs)
    return measured(pruning, batches)


def check_prior_share(share: float) -> float:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise ValueError(f"prior_share ({share!r}) must be in [0, 1)")
    return share


def behind(stages: Sequence[PruningStage], pruning: PruningConfig) -> PruningConfig:
    """The pruning with further stages in front of its own."""
    return replace(pruning, stages=(*stages, *pruning.stages))


def _with_prior(
    model: PreTrainedModel, watched: PruningConfig, batches: Batches, share: float
) -> tuple[PreTrainedModel, tuple[PruningStage, ...]]:
    """A twin whose table is filled with what `watched` scores, and the stage that takes a share of the tokens by it."""
    stage = PruningStage([0], "token_prior", watched.stages[0].rule, [TINY], place="before")
    twin = prune(model, behind([stage], watched))
    fit_token_prior(twin, batches)
    threshold = _quantile(_scores(twin, twin.config.pruning, 0, batches), share)
    return twin, (replace(stage, values=[threshold]),)


def _quantile(scores: torch.Tensor, share: float) -> float:
    return float(np.quantile(scores.numpy(), share))  # torch's takes no more than 2**24


def _rate(ratio_at: Callable[[float], float], target: float) -> float:
    """The keep rate at which `top_k` costs the target, or the closest."""
    low, high = 0.001, 1.0
    if ratio_at(low) >= target or ratio_at(high) <= target:
        return low if ratio_at(low) >= target else high
    return float(brentq(lambda rate: ratio_at(rate) - target, low, high, xtol=0.005))


@torch.no_grad()
def _scores(model: PreTrainedModel, pruning: PruningConfig, layer: int, batches: Batches) -> torch.Tensor:
    """What the last site compares with its threshold, of all tokens that it may take; none where nobody reads them."""
    twin, found = prune(model, pruning), []
    rule = pruning.sites[layer].rule
    with evaluating(twin):
        for batch in batches:
            call = EncoderCall(scores=True)
            twin(**batch, encoder_call=call)
            for scores, state in [call.decided[layer]] if layer in call.decided else []:
                found.append(relative_scores(scores, state, rule)[state.alive & ~state.held].float().cpu())
    return torch.cat(found) if found else torch.zeros(0)


@torch.no_grad()
def _measured(model: PreTrainedModel, pruning: PruningConfig, batches: Batches) -> Calibration:
    """A pruning with what it costs."""
    twin, costs, whole = prune(model, pruning), [], []
    linear = linear_macs(twin)
    with evaluating(twin):
        for batch in batches:
            call = EncoderCall(work=True, linear_macs=linear)
            twin(**batch, encoder_call=call)
            count = count_call(call, twin.config)
            costs += count.per_sample
            whole += count.unpruned_per_sample
    ratios = [cost / full for cost, full in zip(costs, whole)]
    return Calibration(pruning, True, sum(costs) / sum(whole), min(ratios), max(ratios), len(ratios))
