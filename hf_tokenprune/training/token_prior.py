"""`fit_token_prior`: what a token is worth by its id alone, from what later sites score when nothing is pruned."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..convert import prune
from ..modeling.pruning_config import PruningConfig, default_layers
from ..modeling.pruning_stage import SALIENCIES, PruningStage
from ..modeling.selection import relative_scores
from ..modeling.token_outputs import EncoderCall
from ..modeling.token_state import TokenState
from ..profiling.linear_macs import evaluating


TINY = 1e-9  # a threshold that all reach
OUTLIER = 10.0  # times the median: more attention than that is a sink's, and says nothing of the token
SEEN = 3  # an id that was met as often has half of its worth from itself


def prior_is_empty(model: PreTrainedModel) -> bool:
    """Whether a model of ours has a site that looks ids up, and a table for it that nobody has filled yet."""
    base = model.base_model
    return base.looks_ids_up and all(table.empty for table in base.prior_tables())


@torch.no_grad()
def fit_token_prior(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], *, progress: Callable = iter
) -> torch.Tensor:
    """Fills the table of saliency `"token_prior"` from unlabelled inputs.

    Nothing is pruned meanwhile, but what gets no attention at all. A token's worth is what the pruning's other sites
    score, relative to the median token of its input, summed over the sites (over `cls_attention` at a quarter, half and
    three quarters of the depth, where there are none that could tell); an id's worth is the mean over its tokens, drawn
    to that of rare ids if it was met seldom.

    Args:
        model: ours, with a site of that saliency.
        batches: several hundred inputs with `input_ids`, as the model will meet them.
        progress: wraps the batches, for example `tqdm`.

    Returns:
        The table, float32 [V].

    Raises:
        ValueError: a model without such a site, or no inputs.
    """
    model.base_model.prior_tables()
    twin = prune(model, watching(model.config.pruning, model.config.num_hidden_layers))
    total, met = (torch.zeros(model.config.vocab_size, device=model.device) for _ in range(2))
    with evaluating(twin):
        for batch in progress(batches):
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            call = EncoderCall(scores=True, trace=True)
            twin(**inputs, encoder_call=call)
            _add(met, inputs["input_ids"], call.start, torch.ones_like(call.start.positions, dtype=torch.float32))
            for scores, state in call.decided.values():
                worth = relative_scores(scores, state, "median_threshold").nan_to_num(0.0)
                _add(total, inputs["input_ids"], state, worth.clamp(max=OUTLIER))
    if not met.any():
        raise ValueError("batches (0) must hold at least one input")
    worth = _drawn_to_rare(total, met)
    model.base_model.set_token_prior(worth)
    return worth


def _add(table: torch.Tensor, token_ids: torch.Tensor, state: TokenState, values: torch.Tensor) -> None:
    """Adds the values [B, K] of the rows that may go to the places of their ids. token_ids: [B, N]."""
    free = state.alive & ~state.held
    table.index_add_(0, token_ids.gather(1, state.positions)[free], values[free].float())


def watching(pruning: PruningConfig, num_layers: int) -> PruningConfig:
    """The sites that can tell what a token is worth, and nothing removed there."""
    stages = [
        replace(stage, rule="median_threshold", values=[TINY] * len(stage.layers), reduction="drop", cut=None)
        for stage in pruning.stages
        if stage.saliency not in ("token_prior", "random", "learned") and not SALIENCIES[stage.saliency].similarity
    ]
    if not stages:
        layers = default_layers(num_layers)
        stages = [PruningStage(layers, "cls_attention", "median_threshold", [TINY] * len(layers))]
    return PruningConfig(stages=stages, protected_token_ids=pruning.protected_token_ids, execution=pruning.execution)


def _drawn_to_rare(total: torch.Tensor, met: torch.Tensor) -> torch.Tensor:
    """Mean worth of each id, as if it had been met `SEEN` times more with the mean worth of rare ones.

    total: worth of all tokens of an id, [V]. met: how many there were, [V].
    """
    rare = (met > 0) & (met <= SEEN)
    rare = rare if bool(rare.any()) else met > 0
    usual = total[rare].sum() / met[rare].sum()
    return (total + SEEN * usual) / (met + SEEN)
