"""What the runs of a comparison take, timed in turn on the same inputs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel

from ..images import Sizing
from ..profiling.baselines import speed_table, time_against_baselines
from ..profiling.macs import count_macs
from .finetune import FinetuneArguments, load_splits, prepare


TAKEN = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")


@dataclass(frozen=True)
class Run:
    """What `finetune` left in a folder, and its first test inputs as that run takes them: cut, scaled."""

    load: Callable[[Path], PreTrainedModel]
    model: PreTrainedModel
    rows: list[dict[str, Any]]
    batch: Callable[[list[dict[str, Any]]], list[dict[str, torch.Tensor]]]

    @classmethod
    def read(cls, folder: Path, stock: Path, inputs: int) -> "Run":
        """At most so many inputs, made by the tokenizer or processor of `stock`."""
        report = json.loads((folder / "report.json").read_text())
        arguments, size = FinetuneArguments(**report["arguments"]), report["training"]["per_device_eval_batch_size"]
        arguments = replace(arguments, problem_type=report.get("problem_type"))  # older runs were all of classes
        splits, _, collate = prepare(arguments, stock, load_splits(arguments, report["training"]["seed"]))
        test = splits["test"].select(range(min(inputs, len(splits["test"]))))
        rows = [{name: value for name, value in row.items() if name in TAKEN} for row in test]
        kind = AutoModelForSequenceClassification if arguments.image_column is None else AutoModelForImageClassification

        def load(path: Path) -> PreTrainedModel:
            return kind.from_pretrained(path).eval()

        model = load(folder / "model")
        sized = Sizing.of(model)

        def batch(rows: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
            return [sized(collate(rows[first : first + size])) for first in range(0, len(rows), size)]

        return cls(load, model, rows, batch)


def time_runs(folder: Path, others: Sequence[str], *, inputs: int, rounds: int) -> list[dict[str, Any]]:
    """Times the run `pruned` on its test inputs, beside the stock and the unpadded model, and other runs of its seed.

    Args:
        folder: holds a folder for each run of a seed, `baseline` among them, whose weights the stock model has.
        others: names of runs that are timed in turn with these, each on the same inputs as it takes them.
        inputs: test inputs, at most.

    Returns:
        As `speed_table`.
    """
    stock = folder / "baseline" / "model"
    pruned = Run.read(folder / "pruned", stock, inputs)
    by_length = sorted(pruned.rows, key=lambda row: len(row.get("input_ids", ())))
    arrival, by_length = pruned.batch(pruned.rows), pruned.batch(by_length)
    beside = {name: Run.read(folder / name, stock, inputs) for name in others}
    beside = {name: (run.model, run.batch(run.rows)) for name, run in beside.items()}
    whole = sum(count_macs(pruned.model, batch).lossless for batch in arrival)
    ratios = {
        name: sum(count_macs(model, batch).total for batch in batches) / whole
        for name, (model, batches) in {"pruned": (pruned.model, arrival), **beside}.items()
    }
    timings = time_against_baselines(
        pruned.load(stock), pruned.model, arrival, by_length, rounds=rounds, others=beside, progress=tqdm
    )
    return speed_table(timings, len(pruned.rows), ratios)
