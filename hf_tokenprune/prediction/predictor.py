"""A model made ready: encoded rows in, columns of results out.

Shapes: B rows of a batch, R rows of a shard, N tokens, D features, C classes.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

# Not from the top, where older releases put a stand-in that asks for torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..command_line import model_source, written_pruning
from ..convert import prune
from ..data import check_max_length
from ..images import processed_size, size_name, sized
from ..labels import MULTI_LABEL, NUMBER, REGRESSION
from ..modeling.token_outputs import EncoderCall
from .arguments import PredictionArguments
from .inputs import Encoded, ImageEncoder, TextEncoder, token_batches
from .rows import Rows


# Fields of a model's config that its results do not depend on, or that are told apart otherwise.
_NO_RESULTS = ("architectures", "auto_map", "pruning", "transformers_version")


@dataclass(frozen=True)
class Predictor:
    """What turns values of the data into columns of results.

    Args:
        model: one of ours, in eval mode, on its device.
        encode: values of the data, and the row of the first, to an `Encoded`.
        head: the model and its inputs to one row of numbers each, [B, D] or [B, C].
        columns: these rows, [R, D] or [R, C] in float32, to columns of results.
        features: of the columns of results.
    """

    model: PreTrainedModel
    encode: Callable[[list[Any], int], Encoded]
    head: Callable[[PreTrainedModel, dict[str, torch.Tensor]], torch.Tensor]
    columns: Callable[[torch.Tensor], dict[str, pa.Array]]
    features: datasets.Features

    @torch.inference_mode()
    def __call__(
        self, encoded: Encoded, max_tokens: int, max_rows: int, progress: Callable[[int, int], None]
    ) -> dict[str, pa.Array]:
        """The columns of results of a shard, in the order of its rows.

        Args:
            progress: called after each batch with its rows and its real tokens.
        """
        order, numbers = [], []
        for rows in token_batches(encoded.lengths, max_tokens, max_rows):
            batch = {name: value.to(self.model.device) for name, value in encoded.batch(rows).items()}
            batch = sized(self.model, batch)
            numbers.append(self.head(self.model, batch).float())
            order += rows
            progress(len(rows), sum(encoded.lengths[row] for row in rows))
        sorted_rows = torch.cat(numbers).cpu()
        in_order = torch.empty_like(sorted_rows)
        in_order[torch.tensor(order)] = sorted_rows
        return self.columns(in_order)


def load_predictor(arguments: PredictionArguments, rows: Rows, device: torch.device) -> Predictor:
    """The model as asked for, with all that goes around it.

    Raises:
        OSError: no such model.
        TypeError: a model that cannot be pruned, listing those that can.
        ValueError: a checkpoint without the weights that the task needs, an impossible pruning or length.
    """
    path = model_source(arguments.model_name_or_path)
    shared = {"revision": arguments.model_revision, "trust_remote_code": arguments.trust_remote_code}
    shared = {key: value for key, value in shared.items() if value}
    model = _load_model(path, arguments, images=rows.images, **shared)
    tokenizer = None if rows.images else AutoTokenizer.from_pretrained(path, **shared)
    model = _pruned(model, arguments.pruning, tokenizer).to(device).eval()
    if rows.images:
        # The backend is named because the default one needs torchvision.
        processor = AutoImageProcessor.from_pretrained(path, backend="pil", **shared)
        encode = ImageEncoder(processor, rows.features[rows.column], _tokens_of_an_image(model, processor))
    else:
        encode = TextEncoder(tokenizer, _max_length(arguments.max_length, model, tokenizer))
    if arguments.task == "embed":
        features = {"embedding": datasets.List(datasets.Value("float32"), length=model.config.hidden_size)}
        columns = Embeddings(arguments.normalize)
        return Predictor(model, encode, _POOLING[arguments.pooling], columns, datasets.Features(features))
    columns = _columns(model.config, arguments.logits)
    return Predictor(model, encode, _logits, columns, columns.features)


def describe_model(predictor: Predictor, arguments: PredictionArguments) -> dict[str, Any]:
    """What decides the results of a model: its name and content, that of what makes its inputs, and the pruning."""
    hasher = hashlib.sha256()
    for key, value in sorted(predictor.model.state_dict().items()):
        if arguments.task == "predict" or "pooler" not in key:  # not read by embed, and random where there is none
            hasher.update(key.encode() + value.contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(predictor.encode, TextEncoder):
        tokenizer = predictor.encode.tokenizer
        content = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab()))
        hasher.update(content.encode())
        # Not in the content: they are settings of the class around it.
        cut = [predictor.encode.max_length, tokenizer.truncation_side, list(tokenizer.model_input_names)]
        hasher.update(json.dumps(cut).encode())
    else:
        hasher.update(json.dumps(predictor.encode.processor.to_dict(), sort_keys=True, default=str).encode())
    # What differs from the class's defaults: a later release may have more fields.
    config = {k: v for k, v in predictor.model.config.to_diff_dict().items() if k[0] != "_" and k not in _NO_RESULTS}
    hasher.update(json.dumps(config, sort_keys=True, default=str).encode())
    pruning = getattr(predictor.model.config, "pruning", None)
    return {
        "model": f"{arguments.model_name_or_path}, sha256 {hasher.hexdigest()[:16]}",
        "pruning": pruning and pruning.to_dict(),
    }


def _load_model(path: Any, arguments: PredictionArguments, *, images: bool, **shared: Any) -> PreTrainedModel:
    predict = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    auto = predict if arguments.task == "predict" else AutoModel
    set_seed(0)  # weights that a checkpoint lacks and nobody reads are the same in every process
    model, info = auto.from_pretrained(path, dtype=arguments.dtype, output_loading_info=True, **shared)
    model.config.problem_type = arguments.problem_type or model.config.problem_type
    missing = sorted(key for key in info["missing_keys"] if arguments.task == "predict" or "pooler" not in key)
    if missing:
        raise ValueError(
            f"{arguments.model_name_or_path} has no weights for {', '.join(missing)}; task {arguments.task!r} must have"
            " them"
        )
    return model


def _pruned(model: PreTrainedModel, text: str | None, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    model = model if hasattr(model, "set_pruning") else prune(model, None)
    if text is None:
        return model
    layers = model.base_model.token_layers()
    trained = [index for index, layer in enumerate(layers) if layer.predictor is not None]
    model.set_pruning(None if text == "none" else written_pruning(text, tokenizer))
    pruning = model.config.pruning
    for index, site in [] if pruning is None else sorted(pruning.sites.items()):
        if site.saliency == "learned" and index not in trained:
            raise ValueError(
                f"pruning ({text}) must find a trained predictor at each site that scores by 'learned': the checkpoint "
                f"has none in layer {index}"
            )
    return model


def _max_length(asked: int | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    places = model.config.max_position_embeddings
    if asked is not None and asked > places:
        raise ValueError(f"max_length ({asked}) must be at most max_position_embeddings ({places})")
    if asked is not None:
        check_max_length(asked, tokenizer)
    return min(places, tokenizer.model_max_length) if asked is None else asked


def _tokens_of_an_image(model: PreTrainedModel, processor: Any) -> int:
    sides = processed_size(processor)
    if sides is None:
        name = size_name(processor)
        size = {side: pixels for side, pixels in dict(getattr(processor, name, None) or {}).items() if pixels}
        raise ValueError(
            f"{name} ({size}) of the image processor must be a height and a width, or do_center_crop true with a "
            "crop_size: the images of a batch have one size"
        )
    patch = model.config.patch_size
    return model.base_model.structural_tokens + (sides[0] // patch) * (sides[1] // patch)


def _logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:  # [B, C]
    return model(**batch).logits


def _first_token(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:  # [B, D]
    # A model whose code came with its checkpoint may not know this package's way to ask for less.
    ours = type(model).__module__.startswith(__name__.partition(".")[0])
    asked = {"encoder_call": EncoderCall(first_token_only=True)} if ours else {}
    return model(**batch, **asked).last_hidden_state[:, 0]


def _mean(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:  # [B, D]
    hidden = model(**batch).last_hidden_state
    return _masked_mean(hidden, batch.get("attention_mask", torch.ones(hidden.shape[:2], device=hidden.device)))


def _kept_mean(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:  # [B, D]
    output = model(**batch, restore=False)
    return _masked_mean(output.last_hidden_state, output.attention_mask)


def _masked_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # [B, N, D], [B, N]
    weights = mask.float()
    return torch.einsum("bnd,bn->bd", hidden.float(), weights) / weights.sum(dim=1, keepdim=True).clamp(min=1)


_POOLING = {"mean": _mean, "kept_mean": _kept_mean, "cls": _first_token}


@dataclass(frozen=True)
class Embeddings:
    """[R, D] as one column of vectors, of length one if `normalize`."""

    normalize: bool

    def __call__(self, vectors: torch.Tensor) -> dict[str, pa.Array]:
        if self.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return {"embedding": _vectors(vectors)}


@dataclass(frozen=True)
class Answers(ABC):
    """Logits [R, C] as columns and, if asked for, themselves."""

    count: int
    with_logits: bool

    @property
    def features(self) -> datasets.Features:
        logits = {"logits": datasets.List(NUMBER, self.count)} if self.with_logits else {}
        return datasets.Features(self.own_features() | logits)

    def __call__(self, logits: torch.Tensor) -> dict[str, pa.Array]:
        return self.own_columns(logits) | ({"logits": _vectors(logits)} if self.with_logits else {})

    @abstractmethod
    def own_features(self) -> dict[str, Any]:
        """Of `own_columns`, by name."""

    @abstractmethod
    def own_columns(self, logits: torch.Tensor) -> dict[str, pa.Array]:
        """What the logits say."""


@dataclass(frozen=True)
class Classes(Answers):
    """The best label and its score, as Transformers' pipelines give it: by softmax, or sigmoid of one logit."""

    labels: dict[int, str]

    def own_features(self) -> dict[str, Any]:
        return {"label": datasets.Value("string"), "score": NUMBER}

    def own_columns(self, logits: torch.Tensor) -> dict[str, pa.Array]:
        best, index = (logits.softmax(dim=-1) if self.count > 1 else logits.sigmoid()).max(dim=-1)
        labels = [str(self.labels[i]) for i in index.tolist()]
        return {"label": pa.array(labels, pa.string()), "score": pa.array(best.numpy(), pa.float32())}


@dataclass(frozen=True)
class Numbers(Answers):
    """A regression's number as `score`, or several as `scores`."""

    def own_features(self) -> dict[str, Any]:
        return {"score": NUMBER} if self.count == 1 else {"scores": datasets.List(NUMBER, self.count)}

    def own_columns(self, logits: torch.Tensor) -> dict[str, pa.Array]:
        if self.count > 1:
            return {"scores": _vectors(logits)}
        return {"score": pa.array(logits[:, 0].numpy(), pa.float32())}


@dataclass(frozen=True)
class SeveralLabels(Answers):
    """The labels whose sigmoid is above 0.5, and the sigmoid of each, in the order of the model's `id2label`."""

    labels: dict[int, str]

    def own_features(self) -> dict[str, Any]:
        return {"labels": datasets.List(datasets.Value("string")), "scores": datasets.List(NUMBER, self.count)}

    def own_columns(self, logits: torch.Tensor) -> dict[str, pa.Array]:
        there = [[str(self.labels[i]) for i in row.nonzero()[:, 0].tolist()] for row in logits > 0]
        return {"labels": pa.array(there, pa.list_(pa.string())), "scores": _vectors(logits.sigmoid())}


def _columns(config: PreTrainedConfig, logits: bool) -> Answers:
    if config.problem_type == REGRESSION:
        return Numbers(config.num_labels, logits)
    kind = SeveralLabels if config.problem_type == MULTI_LABEL else Classes
    return kind(config.num_labels, logits, config.id2label)


def _vectors(values: torch.Tensor) -> pa.Array:
    flat = np.ascontiguousarray(values.numpy()).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), values.shape[1])
