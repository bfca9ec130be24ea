"""`calibrate`: the thresholds at which inputs cost a given share on average, and each of them its own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import brentq
from transformers import PreTrainedModel

from ..convert import prune
from ..modeling.pruning_config import PruningConfig, default_layers
from ..modeling.selection import relative_scores
from ..modeling.token_outputs import EncoderCall
from ..profiling.macs import count_call, evaluating
from ..training.budget import HIGHEST, thresholds_for_budget
from .held_back import Batches


SAMPLE = 64  # inputs from which the rate is found that the thresholds start from
TINY = 1e-9  # a threshold that all reach


@dataclass(frozen=True)
class Calibration:
    """Thresholds and what they cost.

    Args:
        pruning: preset `adaptive` with them.
        met: whether the target can be met.
        macs: the MAC ratio over all calibration inputs together.
        least, most: the MAC ratios of the cheapest and of the dearest input.
        inputs: how many there were.
    """

    pruning: PruningConfig
    met: bool
    macs: float
    least: float
    most: float
    inputs: int


def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    target_macs: float,
    layers: Sequence[int] | None = None,
    saliency: str = "cls_attention",
    relative_to: str = "median",
    progress: Callable = iter,
    **common: Any,
) -> Calibration:
    """Finds the thresholds of preset `adaptive` at which unlabelled inputs cost `target_macs` on average.

    Training-free and deterministic. First the keep rate at which `top_k` costs the target; then, site after site, the
    quantile of the scores that as many tokens reach; at last one factor on all thresholds, until the target is met.

    Args:
        model: a native model of a supported family, or one of ours.
        batches: a few hundred inputs as the model will meet them, without labels.
        target_macs: multiply-accumulates of the pruned encoder / of the stock encoder on the same unpadded tokens.
        layers: the sites; a quarter, half and three quarters of the depth if not given.
        saliency, relative_to: as `adaptive` takes them.
        progress: wraps the iteration over the sites, each of which is a pass over the inputs, for example `tqdm`.
        common: `protected_token_ids`, `min_tokens`, `execution`.

    Raises:
        ValueError: a target outside (0, 1], or no inputs.
    """
    if isinstance(target_macs, bool) or not isinstance(target_macs, int | float) or not 0 < target_macs <= 1:
        raise ValueError(f"target_macs ({target_macs!r}) must be in (0, 1]")
    batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    if not batches:
        raise ValueError("batches (0) must hold at least one batch of inputs")
    layers = default_layers(model.config.num_hidden_layers) if layers is None else list(layers)

    def adaptive(thresholds: Sequence[float]) -> PruningConfig:
        return PruningConfig.preset(
            "adaptive",
            layers=layers[: len(thresholds)],
            threshold=list(thresholds),
            saliency=saliency,
            relative_to=relative_to,
            **common,
        )

    nothing = _measured(model, adaptive([0.0] * len(layers)), batches, True)
    if nothing.macs <= target_macs:
        return nothing
    everything = _measured(model, adaptive([HIGHEST] * len(layers)), batches, False)
    if everything.macs > target_macs:
        return everything
    rate = _rate(model, batches, target_macs, layers, saliency, common)
    thresholds: list[float] = []
    for _ in progress(range(len(layers))):
        scores = _scores(model, adaptive([*thresholds, TINY]), layers[len(thresholds)], batches)
        thresholds.append(float(torch.quantile(scores, 1.0 - rate)) if len(scores) else TINY)
    start = adaptive([max(threshold, TINY) for threshold in thresholds])
    pruning = thresholds_for_budget(start, target_macs, lambda tried: _measured(model, tried, batches, True).macs)
    return _measured(model, pruning, batches, True)


def _rate(
    model: PreTrainedModel,
    batches: Batches,
    target: float,
    layers: Sequence[int],
    saliency: str,
    common: Mapping[str, Any],
) -> float:
    """The keep rate at which `top_k` costs the target on some inputs, or the closest."""
    some, count = [], 0
    for batch in batches:
        some.append(batch)
        count += len(next(iter(batch.values())))
        if count >= SAMPLE:
            break

    def excess(rate: float) -> float:
        pruning = PruningConfig.preset("top_k", layers=layers, keep_rate=rate, saliency=saliency, **common)
        return _measured(model, pruning, some, True).macs - target

    low, high = 0.001, 1.0
    if excess(low) >= 0 or excess(high) <= 0:
        return low if excess(low) >= 0 else high
    return float(brentq(excess, low, high, xtol=0.005))


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
def _measured(model: PreTrainedModel, pruning: PruningConfig, batches: Batches, met: bool) -> Calibration:
    """A pruning with what it costs."""
    twin, costs, whole = prune(model, pruning), [], []
    with evaluating(twin):
        for batch in batches:
            call = EncoderCall(work=True)
            twin(**batch, encoder_call=call)
            count = count_call(call, twin.config)
            costs += count.per_sample
            whole += count.unpruned_per_sample
    ratios = [cost / full for cost, full in zip(costs, whole)]
    return Calibration(pruning, met, sum(costs) / sum(whole), min(ratios), max(ratios), len(ratios))
