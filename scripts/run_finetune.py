"""Fine-tune a text classifier under pruning; the arguments of `TokenPruneTrainingArguments` go with those below.

    python scripts/run_finetune.py --model_name_or_path minilm-l6 --dataset_name reuters-r8 --output_dir out \\
        --pruning '{"preset": "top_k", "layers": [1, 3], "keep_rate": 0.5}' --num_train_epochs 2
    python scripts/run_finetune.py recipe.yaml         # the same arguments, from a .json or .yaml file
    accelerate launch --multi_gpu --num_processes 2 scripts/run_finetune.py recipe.yaml

Started again with the same arguments, it goes on from the last checkpoint in `output_dir`, if it saved any. Writes the
model and `report.json`: the metrics, what each test document was taken for, and the machine.
"""

import json
import sys
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
    HfArgumentParser,
    PreTrainedModel,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_tokenprune import TokenPruneTrainer, TokenPruneTrainingArguments, packaged, prune
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


def parse() -> tuple[FinetuneArguments, TokenPruneTrainingArguments]:
    parser = HfArgumentParser((FinetuneArguments, TokenPruneTrainingArguments))
    readers = {".json": parser.parse_json_file, ".yaml": parser.parse_yaml_file, ".yml": parser.parse_yaml_file}
    suffix = Path(sys.argv[1]).suffix if len(sys.argv) == 2 else None
    return readers[suffix](sys.argv[1]) if suffix in readers else parser.parse_args_into_dataclasses()


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


def load_classifier(name: str, labels: list[str]) -> PreTrainedModel:
    path = packaged.model_path(name) if name in packaged.available_models() else name
    return AutoModelForSequenceClassification.from_pretrained(
        path,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
    )


def wanted_pruning(text: str | None, separator: int | None) -> dict | None:
    """The pruning as asked for, with the separator protected where nothing else is said."""
    if text is None:
        return None
    wish = json.loads(text) if text.lstrip().startswith("{") else {"preset": text}
    if separator is not None:
        wish.setdefault("protected_token_ids", [separator])
    return wish


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return Accuracy().compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)


def make_trainer(arguments: FinetuneArguments, training: TokenPruneTrainingArguments) -> TokenPruneTrainer:
    set_seed(training.seed)
    training.dataloader_pin_memory = training.dataloader_pin_memory and torch.accelerator.is_available()
    path = arguments.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(
        packaged.model_path(path) if path in packaged.available_models() else path
    )
    splits = load_splits(arguments, training.seed)
    labels = splits["train"].features["label"].names
    model = load_classifier(path, labels)
    teacher = arguments.teacher_name_or_path
    splits = tokenize(splits, tokenizer, arguments.max_length)
    return TokenPruneTrainer(
        prune(model, wanted_pruning(arguments.pruning, tokenizer.sep_token_id)),
        training,
        teacher=None if teacher is None else AutoModelForSequenceClassification.from_pretrained(teacher),
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )


def run(arguments: FinetuneArguments, training: TokenPruneTrainingArguments) -> dict:
    """Trains, tests, saves; the report."""
    trainer = make_trainer(arguments, training)
    folder = Path(training.output_dir)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
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
        arguments, training = parse()
        report = run(arguments, training)
    except (packaged.PackagedFileError, OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise SystemExit(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    test = report["test"]
    print(f"accuracy {test['test_accuracy']:.4f} at a MAC ratio of {test['test_mac_ratio']:.3f}; {training.output_dir}")


if __name__ == "__main__":
    main()
