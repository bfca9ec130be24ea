"""`calibrate`: the threshold at which inputs cost a given share on average, and each of them its own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..convert import prune
from ..modeling.pruning_config import PruningConfig, default_layers
from ..modeling.token_outputs import EncoderCall
from ..profiling.macs import count_call, evaluating


HIGHEST = 64.0  # of a threshold: nothing scores so often the average but by the class token alone
STEPS = 16


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it costs.

    Args:
        pruning: preset `adaptive` with that threshold.
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
    progress: Callable = iter,
    **common: Any,
) -> Calibration:
    """Finds the threshold of preset `adaptive` at which unlabelled inputs cost `target_macs` on average.

    Training-free and deterministic: bisection over the threshold, every step one pass over the inputs.

    Args:
        model: a native model of a supported family, or one of ours.
        batches: a few hundred inputs as the model will meet them, without labels.
        target_macs: multiply-accumulates of the pruned encoder / of the stock encoder on the same unpadded tokens.
        layers: the sites; a quarter, half and three quarters of the depth if not given.
        progress: wraps the iteration over the steps, for example `tqdm`.
        common: `protected_token_ids`, `min_tokens`, `execution`.

    Raises:
        ValueError: a target outside (0, 1], or no inputs.
    """
    if isinstance(target_macs, bool) or not isinstance(target_macs, int | float) or not 0 < target_macs <= 1:
        raise ValueError(f"target_macs ({target_macs!r}) must be in (0, 1]")
    batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    if not batches:
        raise ValueError("batches (0) must hold at least one batch of inputs")
    layers = default_layers(model.config.num_hidden_layers) if layers is None else layers

    def at(threshold: float) -> Calibration:
        pruning = PruningConfig.preset("adaptive", layers=layers, threshold=threshold, saliency=saliency, **common)
        costs, whole = _costs(prune(model, pruning), batches)
        ratios = costs / whole
        mean = (costs.sum() / whole.sum()).item()
        return Calibration(pruning, True, mean, ratios.min().item(), ratios.max().item(), len(ratios))

    low, high = at(0.0), at(HIGHEST)
    if low.macs <= target_macs:
        return low
    if high.macs > target_macs:
        return Calibration(**{**vars(high), "met": False})
    cheap, dear = HIGHEST, HIGHEST / 2**20  # halved on a logarithmic scale
    for _ in progress(range(STEPS)):
        middle = (cheap * dear) ** 0.5
        found = at(middle)
        if found.macs <= target_macs:
            cheap, high = middle, found
        else:
            dear, low = middle, found
    return min(low, high, key=lambda one: abs(one.macs - target_macs))


@torch.no_grad()
def _costs(model: PreTrainedModel, batches: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What each input costs pruned and in the stock encoder, [inputs]."""
    costs, whole = [], []
    for batch in batches:
        call = EncoderCall(work=True)
        with evaluating(model):
            model(**batch, encoder_call=call)
        count = count_call(call, model.config)
        costs += count.per_sample
        whole += count.unpruned_per_sample
    return torch.tensor(costs, dtype=torch.float64), torch.tensor(whole, dtype=torch.float64)
