"""Fine-tune a text classifier under pruning; the arguments of `TokenPruneTrainingArguments` go with those below.

    python scripts/run_finetune.py --model_name_or_path minilm-l6 --dataset_name reuters-r8 --output_dir out \\
        --pruning '{"preset": "top_k", "layers": [1, 3], "keep_rate": 0.5}' --num_train_epochs 2
    python scripts/run_finetune.py recipe.yaml         # the same arguments, from a .json or .yaml file
    accelerate launch --multi_gpu --num_processes 2 scripts/run_finetune.py recipe.yaml

Started again with the same arguments, it goes on from the last checkpoint in `output_dir`, if it saved any. Writes the
model and `report.json`: the metrics, what each test document was taken for, and the machine.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import torch
import yaml
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_tokenprune import TokenPruneTrainer, TokenPruneTrainingArguments, packaged, prune
from hf_tokenprune.command_line import model_source, parse_arguments, written_pruning
from hf_tokenprune.files import write_atomically
from hf_tokenprune.metrics import Accuracy
from hf_tokenprune.profiling.machine import describe_machine
from hf_tokenprune.training.text import load_text_classification, tokenize


@dataclass
class FinetuneArguments:
    model_name_or_path: str = field(
        default="minilm-l6", metadata={"help": f"Hub id, folder, or one of {', '.join(packaged.available_models())}."}
    )
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "Unpruned model for the distillation terms: Hub id or folder."}
    )
    dataset_name: str = field(
        default="20newsgroups-religion",
        metadata={"help": f"Hub id, folder, file, or one of {', '.join(packaged.available_datasets())}."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    label_column: str = field(default="label", metadata={"help": "Column with the class."})
    max_length: int = field(default=256, metadata={"help": "Tokens that a text is cut to."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many texts."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Test on so many texts."})
    pruning: str | None = field(
        default=None,
        metadata={"help": "A preset's name, or JSON as PruningConfig takes it; None: nothing pruned."},
    )


def load_splits(arguments: FinetuneArguments, seed: int) -> datasets.DatasetDict:
    splits = load_text_classification(
        arguments.dataset_name,
        config=arguments.dataset_config,
        text_column=arguments.text_column,
        label_column=arguments.label_column,
    ).shuffle(seed=seed)  # many sets come sorted by class
    for name, limit in (("train", arguments.max_train_samples), ("test", arguments.max_test_samples)):
        if limit is not None and limit < 1:
            raise ValueError(f"max_{name}_samples ({limit}) must be >= 1")
        splits[name] = splits[name].select(range(min(limit or len(splits[name]), len(splits[name]))))
    return splits


def load_classifier(source: str | Path, labels: list[str]) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(
        source,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return Accuracy().compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)


def make_trainer(arguments: FinetuneArguments, training: TokenPruneTrainingArguments) -> TokenPruneTrainer:
    set_seed(training.seed)
    training.dataloader_pin_memory = training.dataloader_pin_memory and torch.accelerator.is_available()
    source = model_source(arguments.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(source)
    splits = load_splits(arguments, training.seed)
    labels = splits["train"].features["label"].names
    model = load_classifier(source, labels)
    pruning = None if arguments.pruning is None else written_pruning(arguments.pruning, tokenizer)
    teacher = arguments.teacher_name_or_path
    splits = tokenize(splits, tokenizer, arguments.max_length)
    return TokenPruneTrainer(
        prune(model, pruning),
        training,
        teacher=None if teacher is None else AutoModelForSequenceClassification.from_pretrained(teacher),
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )


def check_same_run(path: Path, asked: dict, last: str | None) -> None:
    """Writes what is asked for, or raises a ValueError where the checkpoint that is there is of another run."""
    if last is not None and path.exists():
        found = json.loads(path.read_text())
        for name in asked:
            if found.get(name) != asked[name]:
                raise ValueError(
                    f"output_dir ({path.parent}) holds a run with {name} {found.get(name)!r}, now {asked[name]!r} is "
                    "asked for: go on with the same, or take another output_dir"
                )
    write_atomically(path, json.dumps(asked, indent=1).encode())


def run(arguments: FinetuneArguments, training: TokenPruneTrainingArguments) -> dict:
    """Trains, tests, saves; the report."""
    folder = Path(training.output_dir)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    check_same_run(folder / "run.json", asdict(arguments) | {"seed": training.seed}, last)
    trainer = make_trainer(arguments, training)
    trained = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or last)
    tested = trainer.predict(trainer.eval_dataset)
    trainer.save_model(str(folder / "model"))
    pruning = trainer.pruned.config.pruning
    report = {
        "arguments": asdict(arguments),
        "training": training.to_sanitized_dict(),
        "pruning": None if pruning is None else pruning.to_dict(),
        "machine": describe_machine(training.device),
        "train": trained.metrics,
        "test": tested.metrics,
        "predicted": tested.predictions.argmax(-1).tolist(),
        "labels": tested.label_ids.tolist(),
        "log": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        write_atomically(folder / "report.json", json.dumps(report, indent=1).encode())
    return report


def main() -> None:
    try:
        arguments, training = parse_arguments(FinetuneArguments, TokenPruneTrainingArguments)
        report = run(arguments, training)
    except (packaged.PackagedFileError, OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise SystemExit(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    test = report["test"]
    if training.process_index:
        return
    print(f"accuracy {test['test_accuracy']:.4f} at a MAC ratio of {test['test_mac_ratio']:.3f}; {training.output_dir}")


if __name__ == "__main__":
    main()
