"""What a pruned model did with some inputs, as views for the page: its trace, its scores, and both predictions.

Shapes: B samples, N padded length, S pruning sites, K rows.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import activation_of
from ..convert import prune
from ..modeling.pruning_config import PruningConfig
from ..modeling.selection import relative_scores
from ..modeling.token_outputs import EncoderCall
from .kept_words import DocumentView, Picture, document_views


@torch.inference_mode()
def explain(
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    processing: PreTrainedTokenizerBase | BaseImageProcessor,
    *,
    labels: Sequence[str] | None = None,
) -> list[DocumentView]:
    """Runs a batch with and without pruning.

    Args:
        model: one of ours, in evaluation mode.
        batch: what it takes: padded `input_ids` and `attention_mask`, or `pixel_values`.
        processing: its tokenizer, for the words, or its image processor, for the pictures under the patches.
        labels: what each input is, where that is known.

    Raises:
        ValueError: a model whose pruning has no sites.
    """
    pruning = model.config.pruning
    if pruning is None or not pruning.sites:
        raise ValueError(f"pruning ({pruning!r}) must have sites: there is nothing to explain")
    call = EncoderCall(trace=True, scores=True)
    pruned, whole = model(**batch, encoder_call=call), prune(model, None)(**batch)
    for layer in [layer for layer in call.states if pruning.sites[layer].idle]:
        del call.states[layer]  # nobody goes there
    trace = call.token_trace()
    shape = call.start.input.prefix, getattr(model.config, "patch_size", 0)
    pixels = batch.get("pixel_values")
    return document_views(
        _words(batch, processing, *shape),
        trace,
        labels=labels,
        attention_mask=batch.get("attention_mask"),
        scores=_scores(call, pruning),
        pictures=None if pixels is None else _pictures(pixels, processing, *shape),
        **_predictions(pruned, whole, model.config),
    )


def _words(batch: Mapping[str, torch.Tensor], processing: object, prefix: int, patch: int) -> list[list[str]]:
    """The tokens' names; patches have none, but their place."""
    if "input_ids" not in batch:
        rows, columns = (side // patch for side in batch["pixel_values"].shape[-2:])
        structural = ["[CLS]", *(f"[{number}]" for number in range(1, prefix))]
        return [structural + [""] * (rows * columns)] * len(batch["pixel_values"])
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return [processing.convert_ids_to_tokens(ids[own].tolist()) for ids, own in zip(batch["input_ids"], mask)]


def _pictures(pixels: torch.Tensor, processor: BaseImageProcessor, prefix: int, patch: int) -> list[Picture]:
    """What the model saw, normalisation undone where there was one. pixels: [B, 3, H, W]."""
    from PIL import Image

    pixels, pictures = pixels.cpu().float(), []
    normalised = [getattr(processor, name, None) for name in ("image_mean", "image_std")]
    if getattr(processor, "do_normalize", False) and all(each is not None for each in normalised):
        mean, std = (torch.tensor(each)[:, None, None] for each in normalised)
        pixels = pixels * std + mean
    for image in pixels.clamp(0, 1):
        rows, columns = (side // patch for side in image.shape[-2:])
        image = image[:, : rows * patch, : columns * patch]  # what is left over at the edges goes into no patch
        content = io.BytesIO()
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(content, format="PNG")
        pictures.append(Picture(content.getvalue(), columns=columns, first=prefix))
    return pictures


def _predictions(
    pruned: Mapping[str, torch.Tensor], whole: Mapping[str, torch.Tensor], config: PreTrainedConfig
) -> dict[str, list]:
    """What samples are taken for with and without pruning, where the head says so of each."""
    if "logits" not in pruned or pruned["logits"].dim() != 2:
        return {}
    own, unpruned = pruned["logits"].float(), whole["logits"].float()
    if activation_of(config) != "softmax":
        numbers = config.num_labels == 1 or activation_of(config) == "none"
        say = _numbers if numbers else partial(_labels, names=config.id2label)
        return {"predictions": [*map(say, own)], "predictions_unpruned": [*map(say, unpruned)]}
    confidence, best = own.softmax(dim=-1).max(dim=-1)
    return {
        "predictions": [config.id2label[each] for each in best.tolist()],
        "predictions_unpruned": [config.id2label[each] for each in unpruned.argmax(dim=-1).tolist()],
        "confidences": confidence.tolist(),
    }


def _numbers(logits: torch.Tensor) -> str:
    return ", ".join(f"{logit:.3g}" for logit in logits.tolist())


def _labels(logits: torch.Tensor, names: Mapping[int, str]) -> str:
    return ", ".join(names[each] for each in (logits > 0).nonzero()[:, 0].tolist()) or "none"


def _scores(call: EncoderCall, pruning: PruningConfig) -> torch.Tensor:
    """What each site's rule compared, for each position that was still there: float [S, B, N], NaN elsewhere."""
    batch, length = call.start.carrier.shape
    scores = torch.full((len(call.states), batch, length), torch.nan)
    for place, layer in enumerate(call.states):
        if layer not in call.decided:
            continue
        decided, state = call.decided[layer]
        site = pruning.sites[layer]
        # A match is judged by how alike the two are.
        alike = decided.match is not None
        values = -decided.saliency if alike else relative_scores(decided, state, site.rule)
        own = values.float().gather(1, state.carrier.clamp(min=0))
        scores[place] = own.masked_fill((state.carrier < 0) | ~own.isfinite(), torch.nan).cpu()
    return scores
