"""The job of `run_finetune.py`: from its arguments to a trained, tested and saved classifier, and a report."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from filelock import FileLock, Timeout
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BaseImageProcessor,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the top level's wants torchvision

from .. import images, packaged
from ..checkpoints import saved_problem
from ..command_line import model_source, parse_mapping, written_pruning
from ..convert import prune
from ..data import NAMED, DataArguments, processor_sizes, read_images, tokenize
from ..files import write_atomically
from ..labels import MULTI_LABEL, check_problem, described, label_names, problem_of_labels, targets
from ..metrics import JUDGEMENTS, answers
from ..profiling.machine import describe_machine
from .arguments import TokenPruneTrainingArguments
from .processes import check_together
from .resuming import last_whole_checkpoint
from .trainer import TokenPruneTrainer


logger = logging.getLogger(__name__)

# What the metrics need: the logits of all test inputs, in one array, at once.
NEEDED = {"eval_do_concat_batches": True, "batch_eval_metrics": False, "prediction_loss_only": False}
OTHER_METRICS = ("loss", "mac_ratio", "gmacs", "runtime", "samples_per_second", "steps_per_second")
STEPS = (
    "seed",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "max_grad_norm",
    "label_smoothing_factor",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)


@dataclass(kw_only=True)
class FinetuneArguments(DataArguments):
    model_name_or_path: str = field(
        default="minilm-l6", metadata={"help": f"Hub id, folder, or one of {', '.join(packaged.available_models())}."}
    )
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "Unpruned model for the distillation terms: Hub id or folder."}
    )
    dataset_name: str = field(default="20newsgroups-religion", metadata=NAMED)
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many inputs."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Test on so many inputs."})
    held_out_samples: int | None = field(
        default=None,
        metadata={
            "help": "To choose arguments by: test on so many inputs of the training split, which are not trained on, "
            "and leave the test split alone."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "JSON of fields of the model's config to change: '{\"attention_probs_dropout_prob\": 0}'."},
    )
    pruning: str | None = field(
        default=None,
        metadata={"help": "A preset's name, or JSON as PruningConfig takes it; None: nothing pruned."},
    )


def load_splits(arguments: FinetuneArguments, seed: int, usual_problem: str | None = None) -> datasets.DatasetDict:
    splits = arguments.load(usual_problem=usual_problem)
    # Many sets come sorted by class. The test split's inputs are the same, in the same order, for all seeds.
    splits["train"], splits["test"] = splits["train"].shuffle(seed=seed), splits["test"].shuffle(seed=0)
    if arguments.held_out_samples is not None:
        splits = hold_out(splits["train"], arguments.held_out_samples)
    for name, limit in (("train", arguments.max_train_samples), ("test", arguments.max_test_samples)):
        if limit is not None and limit < 1:
            raise ValueError(f"max_{name}_samples ({limit}) must be >= 1")
        splits[name] = splits[name].select(range(min(limit or len(splits[name]), len(splits[name]))))
    return splits


def hold_out(train: datasets.Dataset, inputs: int) -> datasets.DatasetDict:
    """The last inputs take the place of the test split, so that with another number of training inputs, too, a seed's
    runs do not train on them."""
    if not 1 <= inputs < len(train):
        raise ValueError(f"held_out_samples ({inputs}) must be in [1, {len(train) - 1}], of {len(train)} to train on")
    first = len(train) - inputs
    return datasets.DatasetDict(train=train.select(range(first)), test=train.select(range(first, len(train))))


def load_classifier(
    kind: type, source: str | Path, problem: str, labels: list[str], overrides: dict
) -> PreTrainedModel:
    return kind.from_pretrained(
        source,
        **overrides,
        problem_type=problem,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
    )


def measured(problem: str, prediction: EvalPrediction) -> dict[str, float]:
    return JUDGEMENTS[problem](answers(problem, prediction.predictions), prediction.label_ids)


def check_testing(training: TokenPruneTrainingArguments) -> None:
    for name, needed in NEEDED.items():
        value = getattr(training, name)
        if bool(value) != needed:
            raise ValueError(f"{name} ({value}) must be {needed}: the metrics are of the logits of all test inputs")


def check_best(problem: str, metric: str | None) -> None:
    """Raises a ValueError for a `metric_for_best_model` that no evaluation has: Trainer says so after the first one."""
    names = (*JUDGEMENTS[problem].names, *OTHER_METRICS)
    if metric is not None and metric.removeprefix("eval_") not in names:
        raise ValueError(f"metric_for_best_model ({metric!r}) must be one of {', '.join(names)}: labels are {problem}")


def make_trainer(arguments: FinetuneArguments, training: TokenPruneTrainingArguments) -> TokenPruneTrainer:
    set_seed(training.seed)
    training.dataloader_pin_memory = training.dataloader_pin_memory and torch.accelerator.is_available()
    source = model_source(arguments.model_name_or_path)
    kind = AutoModelForSequenceClassification
    if arguments.image_column is not None:
        kind, training.remove_unused_columns = AutoModelForImageClassification, False  # images are read by the column
    overrides = parse_mapping("config_overrides", arguments.config_overrides or "{}")
    own = AutoConfig.from_pretrained(source)
    usual = saved_problem(own)
    asked = check_problem(overrides.pop("problem_type", None) or arguments.problem_type)
    splits = load_splits(replace(arguments, problem_type=asked), training.seed, usual)
    problem = problem_of_labels(splits)
    if training.process_index == 0:
        logger.warning(described(splits, arguments.label_column, asked=asked is not None, checkpoint=usual))
    check_best(problem, training.metric_for_best_model)
    model = load_classifier(kind, source, problem, _names(splits, own), overrides)
    splits, processing, collate = prepare(arguments, source, splits)
    if arguments.image_column is not None:
        collate = images.Sizing.of(model).collate
    tokenizer = processing if arguments.image_column is None else None
    teacher = arguments.teacher_name_or_path
    return TokenPruneTrainer(
        prune(model, None if arguments.pruning is None else written_pruning(arguments.pruning, tokenizer)),
        training,
        teacher=None if teacher is None else kind.from_pretrained(teacher),
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        data_collator=collate,
        processing_class=processing,
        compute_metrics=partial(measured, problem),
    )


def _names(splits: datasets.DatasetDict, own: PreTrainedConfig) -> list[str]:
    """Of the model's outputs: the data's; where they have none, the checkpoint's, if it has as many."""
    names = label_names(splits) or ["LABEL_0"]
    usual = [f"LABEL_{place}" for place in range(len(names))]
    return list(own.id2label.values()) if names == usual and own.num_labels == len(names) else names


def prepare(
    arguments: FinetuneArguments, source: str | Path, splits: datasets.DatasetDict
) -> tuple[datasets.DatasetDict, PreTrainedTokenizerBase | BaseImageProcessor, Callable]:
    """What the model takes, what makes it, and what makes batches of it."""
    splits = targets(splits)
    if arguments.image_column is not None:
        processor = load_processor(source, arguments.image_size)
        return read_images(splits, processor, arguments.image_size), processor, images.collate
    tokenizer = AutoTokenizer.from_pretrained(source)
    return tokenize(splits, tokenizer, arguments.max_length), tokenizer, DataCollatorWithPadding(tokenizer)


def load_processor(source: str | Path, pixels: int | None) -> BaseImageProcessor:
    """The processor of images, for that side if one is given: it is saved so, for those who predict."""
    processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    if pixels is None:
        return processor
    return AutoImageProcessor.from_pretrained(source, backend="pil", **processor_sizes(processor, pixels))


def check_same_run(path: Path, asked: dict, last: str | None) -> None:
    """Writes what is asked for, or raises a ValueError where a checkpoint or report of another run is there."""
    if path.exists() and (last is not None or (path.parent / "report.json").exists()):
        found = json.loads(path.read_text())
        for name in asked:
            if found.get(name, asked[name]) != asked[name]:
                raise ValueError(
                    f"output_dir ({path.parent}) holds a run with {name} {found[name]!r}, now {asked[name]!r} is "
                    "asked for: go on with the same, or take another output_dir"
                )
    write_atomically(path, json.dumps(asked, indent=1).encode())


def _decisive(training: TokenPruneTrainingArguments) -> dict[str, Any]:
    """What another value of would make another run: the pruning's own arguments, and those that set the steps."""
    stock = {each.name for each in fields(TrainingArguments)}
    own = [each.name for each in fields(training) if each.name not in stock]
    return {name: getattr(training, name) for name in (*own, *STEPS)}


def finetune(arguments: FinetuneArguments, training: TokenPruneTrainingArguments) -> dict:
    """Trains, tests, saves; the report.

    Raises:
        ImportError, OSError, TypeError, ValueError: arguments that do not fit, or a folder that another process trains
            into, before it trains.
    """
    check_together(training)
    check_testing(training)
    folder = Path(training.output_dir)
    with alone_in(folder) if training.process_index == 0 else nullcontext():
        return _finetune(arguments, training, folder)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Raises a ValueError where another process is in there; one that was killed is not."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"output_dir ({folder}) must be nobody else's: another process is training into it") from error


def _finetune(arguments: FinetuneArguments, training: TokenPruneTrainingArguments, folder: Path) -> dict:
    last = last_whole_checkpoint(folder)
    check_same_run(folder / "run.json", asdict(arguments) | _decisive(training), last)
    try:
        trainer = make_trainer(arguments, training)
    except RuntimeError as error:  # what is not installed, or weights that do not fit; later ones keep their traceback
        raise ValueError(str(error)) from error
    last = training.resume_from_checkpoint or last
    trained = trainer.train(resume_from_checkpoint=last)
    tested = trainer.predict(trainer.eval_dataset)
    trainer.save_model(str(folder / "model"))
    pruning, problem = trainer.pruned.config.pruning, trainer.pruned.config.problem_type
    report = {
        "arguments": asdict(arguments),
        "problem_type": problem,
        "training": training.to_sanitized_dict(),
        "pruning": None if pruning is None else pruning.to_dict(),
        "interpolated": arguments.image_column is not None
        and images.interpolates(trainer.pruned, trainer.processing_class),
        "machine": describe_machine(training.device),
        "train": trained.metrics if last is None else _of_the_whole_training(folder, trained.metrics),
        "test": tested.metrics,
        "budgets": at_each_budget(trainer),
        "predicted": answers(problem, tested.predictions).tolist(),
        "labels": tested.label_ids.astype(int if problem == MULTI_LABEL else tested.label_ids.dtype).tolist(),
        "log": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        write_atomically(folder / "report.json", json.dumps(report, indent=1).encode())
    return report


def _of_the_whole_training(folder: Path, metrics: dict[str, float]) -> dict[str, float | None]:
    """The metrics of a training that was gone on with, of which Trainer knows the last part alone: those of an earlier
    report, or None for what only the whole could tell."""
    report = folder / "report.json"
    if report.exists():
        return json.loads(report.read_text())["train"]
    return {name: None if name.startswith("train_") else value for name, value in metrics.items()}


def at_each_budget(trainer: TokenPruneTrainer) -> list[dict[str, float]]:
    """The metrics at each of the pruning's budgets; the model is left as it was."""
    model, pruning = trainer.pruned, trainer.pruned.config.pruning
    tested = []
    for budget, _ in () if pruning is None else pruning.budgets:
        model.set_budget(budget)
        tested.append({"budget": budget, **trainer.predict(trainer.eval_dataset).metrics})
    model.set_pruning(pruning)
    return tested
