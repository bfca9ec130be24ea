"""What is profiled: one model three times, and the inputs that go through each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the top level's wants torchvision

from ..checkpoints import load_model, saved_task, takes_images
from ..command_line import model_source, written_pruning
from ..convert import prune
from ..data import read_images, tokenize
from ..images import Sizing, collate
from ..labels import check_problem
from .arguments import ProfileArguments
from .baselines import stock_model
from .labels import model_labels, why_unlabelled


DEFAULT_PRUNING = '{"preset": "top_k", "keep_rate": 0.7}'

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """The same weights, and adapters where there are any, as the stock model ("baseline"), as our engine with nothing
    pruned ("unpadded"), and "pruned"; and inputs, of which `batch` makes what the models take, on their device.

    name: what reports call it. inputs: single rows, as `collate` takes them. labels: one for each row, or None: its
    class, as the model numbers it, its number, or 0 or 1 for each label of the model. unlabelled: why there are none,
    in words.
    """

    name: str
    models: dict[str, PreTrainedModel]
    inputs: list[dict[str, Any]]
    labels: list[Any] | None
    collate: Callable[[list], Mapping[str, torch.Tensor]]
    unlabelled: str | None = None

    @property
    def device(self) -> torch.device:
        return self.models["pruned"].device

    def lengths(self) -> list[int]:
        """Real tokens of each text; images are all alike."""
        return [len(row.get("input_ids", ())) for row in self.inputs]

    def batches(self, size: int, *, by_length: bool = False) -> list[Batch]:
        """All inputs, in arrival order or sorted, in batches of `size`."""
        order = list(range(len(self.inputs)))
        if by_length:
            order.sort(key=self.lengths().__getitem__)
        return [self.batch(order[first : first + size]) for first in range(0, len(order), size)]

    def batch(self, rows: list[int]) -> Batch:
        given = self.collate([self.inputs[row] for row in rows])
        dtype = self.models["pruned"].dtype
        floats = {name for name, value in given.items() if value.is_floating_point()}
        given = {name: value.to(self.device, dtype if name in floats else None) for name, value in given.items()}
        return Sizing.of(self.models["pruned"])(given)


def load_subject(arguments: ProfileArguments, device: torch.device) -> Subject:
    """The models and inputs as asked for.

    Raises:
        OSError: no such model or data set.
        TypeError: a model that cannot be pruned, listing those that can.
        ValueError: a pruning without sites, an impossible one, weights that the stock model needs and this one has not,
            data that `load_classification` refuses or without rows, or labels that the model does not have.
    """
    set_seed(arguments.seed)
    source = model_source(arguments.model_name_or_path)
    model = _load_model(source, arguments).to(device).eval()
    images = takes_images(model.config)
    tokenizer = None if images else _tokenizer(source)
    stock = stock_model(model).eval()
    own = getattr(model.config, "pruning", None) if arguments.pruning is None else None
    # Of the model itself, whose predictors and tables the stock one does not have.
    pruned = prune(model, own or written_pruning(arguments.pruning or DEFAULT_PRUNING, tokenizer)).eval()
    if not pruned.config.pruning.sites:
        raise ValueError("pruning (no sites) must have a layer at which tokens go: there is nothing to profile")
    models = {"baseline": stock, "unpadded": prune(stock, None).eval(), "pruned": pruned}
    name = _shape(stock) if arguments.random_weights else arguments.model_name_or_path
    if arguments.dataset_name is None:
        rows = _made_up_images(arguments, model) if images else _made_up_texts(arguments, model)
        make = collate if images else _padded
        return Subject(name, models, rows, None, make, "the inputs are made up")
    splits = arguments.load(labelled=False)
    rows = _drawn(splits, arguments)
    random = "the weights are random" if arguments.random_weights else None
    unlabelled = random or why_unlabelled(stock, rows, arguments.label_column)
    labels = None if unlabelled else model_labels(splits, rows, stock.config)
    longest = pruned.base_model.longest_input
    inputs, make = _real_inputs(rows, arguments, source, tokenizer, min(arguments.max_length, longest))
    return Subject(name, models, inputs, labels, make, unlabelled)


def _load_model(source: str | Path, arguments: ProfileArguments) -> PreTrainedModel:
    given = {"dtype": getattr(torch, arguments.dtype), "attn_implementation": arguments.attn_implementation}
    asked = {} if arguments.problem_type is None else {"problem_type": check_problem(arguments.problem_type)}
    config = AutoConfig.from_pretrained(source, **arguments.overrides | asked)
    if arguments.random_weights:
        return saved_task(config).auto.from_config(config, **given)
    return load_model(source, config=config, **given)


def _shape(model: PreTrainedModel) -> str:
    depth, width = model.config.num_hidden_layers, model.config.hidden_size
    return f"{type(model).__name__} of {depth} layers, {width} wide, with random weights"


def _tokenizer(source: str | Path) -> PreTrainedTokenizerBase | None:
    """None: made-up inputs of a bare config need none."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        return None


def _made_up_texts(arguments: ProfileArguments, model: PreTrainedModel) -> list[dict[str, Any]]:
    longest, chance = model.config.max_position_embeddings, torch.Generator().manual_seed(arguments.seed)
    if max(arguments.lengths) > longest:
        raise ValueError(f"lengths ({max(arguments.lengths)}) must be at most {longest}: the model takes no more")
    count = max([arguments.batch_size, *arguments.batch_sizes])
    first = min(1000, model.config.vocab_size // 2)  # past special tokens
    lengths = [arguments.lengths[i % len(arguments.lengths)] for i in range(count)]
    return [
        {"input_ids": torch.randint(first, model.config.vocab_size, (length,), generator=chance).tolist()}
        for length in lengths
    ]


def _padded(rows: list[dict[str, Any]]) -> Batch:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[place, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _made_up_images(arguments: ProfileArguments, model: PreTrainedModel) -> list[dict[str, Any]]:
    chance = torch.Generator().manual_seed(arguments.seed)
    size = arguments.image_size or model.config.image_size
    sides = (size, size) if isinstance(size, int) else size
    shape = (model.config.num_channels, *sides)
    count = max([arguments.batch_size, *arguments.batch_sizes])
    return [{"pixel_values": torch.randn(shape, generator=chance)} for _ in range(count)]


def _drawn(splits: datasets.DatasetDict, arguments: ProfileArguments) -> datasets.Dataset:
    rows = splits[arguments.split].shuffle(seed=arguments.seed)
    rows = rows.select(range(min(arguments.max_inputs, len(rows))))
    if not len(rows):
        raise ValueError(f"{arguments.dataset_name} must have rows to read, and has none")
    return rows


def _real_inputs(
    rows: datasets.Dataset,
    arguments: ProfileArguments,
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
) -> tuple[list[dict[str, Any]], Callable]:
    only = datasets.DatasetDict(rows=rows)
    if arguments.image_column is not None:
        processor = AutoImageProcessor.from_pretrained(source, backend="pil")
        read = list(read_images(only, processor, arguments.image_size)["rows"])
        return [{"pixel_values": row["pixel_values"]} for row in read], collate
    if tokenizer is None:
        raise ValueError(f"{arguments.model_name_or_path} must have a tokenizer to read texts")
    rows = tokenize(only, tokenizer, max_length)["rows"]
    taken = [name for name in tokenizer.model_input_names if name in rows.column_names]
    return [dict(row) for row in rows.select_columns(taken)], DataCollatorWithPadding(tokenizer)
