"""The whole way once: fine-tune an encoder, prune its tokens, fine-tune on, measure, save, load as a stranger.

    python scripts/run_quickstart.py                  # MiniLM on two groups of 20 Newsgroups
    python scripts/run_quickstart.py --fast           # BERT-tiny, a minute and a half at most
    python scripts/run_quickstart.py --model_name_or_path your/bert --dataset_name imdb --pruning \
        '{"preset": "top_k", "layers": [3, 6, 9], "keep_rate": 0.6}'

Four models are compared: the baseline, the same weights pruned without training, the baseline trained on without
pruning (the control), and the baseline trained on as long with pruning.
"""

import copy
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import torch
from scipy.stats import binomtest
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_tokenprune import PruningConfig, packaged, prune
from hf_tokenprune.command_line import model_source, parse_arguments, written_pruning
from hf_tokenprune.data import load_classification, tokenize
from hf_tokenprune.files import write_atomically
from hf_tokenprune.hub import run_in_fresh_process
from hf_tokenprune.labels import CLASSES, problem_of_labels
from hf_tokenprune.metrics import Accuracy, paired_bootstrap
from hf_tokenprune.modeling.token_outputs import EncoderCall
from hf_tokenprune.profiling import Timing
from hf_tokenprune.profiling.baselines import speed_table, time_against_baselines
from hf_tokenprune.profiling.machine import describe_machine
from hf_tokenprune.profiling.macs import MacCount, count_call
from hf_tokenprune.viz import OperatingPoint, accuracy_over_macs, document_views, render_page, write_page


# What is taken where nothing is asked for.
USUAL = {
    "model_name_or_path": "minilm-l6",
    "max_length": 128,
    "pruning": '{"preset": "adaptive", "layers": [1, 2, 3], "threshold": 0.08}',
    "timed_rounds": 7,
    "shown_documents": 6,
}
FAST = {
    "model_name_or_path": "bert-tiny",
    "max_length": 64,
    "pruning": '{"preset": "top_k", "layers": [0], "keep_rate": 0.4}',
    "max_train_samples": 320,
    "max_test_samples": 160,
    "timed_rounds": 5,
    "shown_documents": 3,
}
COUNTS = (
    "batch_size",
    "eval_batch_size",
    "max_train_samples",
    "max_test_samples",
    "timed_documents",
    "timed_rounds",
    "shown_documents",
)


@dataclass
class QuickstartArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "a packaged model's short name (minilm-l6), a folder, or a Hub id"}
    )
    dataset_name: str = field(
        default="20newsgroups-religion", metadata={"help": "a packaged set's short name, a Hub id, or a file"}
    )
    dataset_config: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    problem_type: str | None = field(
        default=None, metadata={"help": f"{CLASSES} takes whole numbers or texts as classes, however many there are"}
    )
    pruning: str | None = field(
        default=None, metadata={"help": "a preset's name, or JSON with its hyper-parameters; adaptive if not given"}
    )
    max_length: int | None = field(default=None, metadata={"help": "tokens that a text is cut to: 128"})
    epochs: float = field(default=1.0, metadata={"help": "of the baseline"})
    further_epochs: float = field(default=1.0, metadata={"help": "of the control and of the pruned model"})
    learning_rate: float = 1e-4
    further_learning_rate: float = 5e-5
    batch_size: int = 16
    eval_batch_size: int = 32
    max_train_samples: int | None = None
    max_test_samples: int | None = None
    timed_documents: int = field(default=128, metadata={"help": "test documents in the timing run"})
    timed_rounds: int | None = field(default=None, metadata={"help": "of the timing run: 7"})
    shown_documents: int | None = field(default=None, metadata={"help": "test documents on the page: 6"})
    seed: int = 0
    output_dir: str = "outputs/quickstart"
    fast: bool = field(
        default=False, metadata={"help": "BERT-tiny on few documents, where nothing else is asked for: no figures"}
    )

    def __post_init__(self) -> None:
        for name, value in (FAST if self.fast else USUAL).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.problem_type not in (None, CLASSES):
            raise ValueError(f"problem_type ({self.problem_type!r}) must be {CLASSES!r}: run_finetune.py trains others")
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be >= 1")
        for name in ("epochs", "further_epochs", "learning_rate", "further_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be > 0")


@dataclass
class Evaluation:
    """A model on the test split.

    right: whether each document was classified as labelled. macs: one count per batch.
    """

    accuracy: float
    right: list[bool]
    macs: list[MacCount]

    def macs_per_document(self, which: str = "total") -> float:
        return sum(getattr(count, which) for count in self.macs) / len(self.right)


class Quickstart:
    """The job's steps, in the order of `run`."""

    def __init__(self, arguments: QuickstartArguments):
        self.arguments = arguments
        self.folder = Path(arguments.output_dir)
        self.device = self._training_arguments(arguments.epochs, arguments.learning_rate).device

    def run(self) -> None:
        baseline = self.prepare()
        print(f"\n1/6 fine-tune the baseline: {self.arguments.model_name_or_path} on {self.arguments.dataset_name}")
        self.finetune(baseline, self.arguments.epochs, self.arguments.learning_rate)
        print("\n2/6 train on without pruning: the control")
        control = copy.deepcopy(baseline)
        self.finetune(control, self.arguments.further_epochs, self.arguments.further_learning_rate)
        print("\n3/6 train on as long with pruning")
        pruned = prune(copy.deepcopy(baseline), self.pruning)
        self.finetune(pruned, self.arguments.further_epochs, self.arguments.further_learning_rate)
        print("\n4/6 evaluate")
        evaluations = {
            name: self.evaluate(model, self.splits["test"], name)
            for name, model in {
                "baseline": prune(baseline, None),
                "pruned, training-free": prune(baseline, self.pruning),
                "control": prune(control, None),
                "pruned, fine-tuned": pruned,
            }.items()
        }
        print("\n5/6 time the padded, the unpadded and the pruned model in turn")
        timed = self.splits["test"].select(range(min(self.arguments.timed_documents, len(self.splits["test"]))))
        timings = self.time(timed, control, pruned)
        print("\n6/6 save, draw, and load as a stranger: in a new process without this package")
        self.save(pruned)
        report = {
            "arguments": asdict(self.arguments),
            "pruning": self.pruning.to_dict(),
            "machine": describe_machine(self.device),
            "quality": quality(evaluations),
            "speed": speed_table(timings, len(timed), {"pruned": self.mac_ratio(pruned, timed)}),
        }
        self.write(report)
        self.draw(evaluations, pruned)
        print(f"\n{table(report)}\n")
        self.write({**report, "stranger_differences": self.check_stranger(pruned)})

    def prepare(self) -> PreTrainedModel:
        """Loads what was asked for, or ends with one sentence before anything is trained."""
        try:
            self.model_path = model_source(self.arguments.model_name_or_path)
            self.tokenizer = AutoTokenizer.from_pretrained(self.model_path)
            self.collator = DataCollatorWithPadding(self.tokenizer)
            self.splits = self.load_data()
            baseline = self.load_baseline()
            self.pruning = self.resolve_pruning(baseline)
            self.folder.mkdir(parents=True, exist_ok=True)
        except (packaged.PackagedFileError, OSError, TypeError, ValueError) as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from error
        return baseline

    def write(self, report: dict) -> None:
        write_atomically(self.folder / "report.json", json.dumps(report, indent=2).encode())

    def load_data(self) -> datasets.DatasetDict:
        arguments = self.arguments
        splits = load_classification(
            arguments.dataset_name,
            config=arguments.dataset_config,
            input_column=arguments.text_column,
            label_column=arguments.label_column,
            problem_type=arguments.problem_type,
        )
        if problem_of_labels(splits) != CLASSES:
            raise ValueError(
                f"label_column ({arguments.label_column!r}) must hold one class a row here; run_finetune.py trains a "
                f"{problem_of_labels(splits)}, too"
            )
        splits = splits.shuffle(seed=arguments.seed)  # many sets come sorted by class
        limits = {"train": arguments.max_train_samples, "test": arguments.max_test_samples}
        for name, limit in limits.items():
            splits[name] = splits[name].select(range(min(limit or len(splits[name]), len(splits[name]))))
        return tokenize(splits, self.tokenizer, arguments.max_length)

    def load_baseline(self) -> PreTrainedModel:
        set_seed(self.arguments.seed)
        labels = dict(enumerate(self.splits["train"].features["label"].names))
        return AutoModelForSequenceClassification.from_pretrained(
            self.model_path,
            id2label=labels,
            label2id={name: index for index, name in labels.items()},
            ignore_mismatched_sizes=True,
        )

    def resolve_pruning(self, baseline: PreTrainedModel) -> PruningConfig:
        """The pruning as asked for, with the separator protected; fails here if the model cannot be pruned so."""
        pruned = prune(baseline, written_pruning(self.arguments.pruning, self.tokenizer))
        if pruned.base_model.looks_ids_up:
            raise ValueError("saliency ('token_prior') needs a table, which run_finetune.py fills and this does not")
        objective = pruned.config.pruning.objective
        if objective is not None and objective.learns_values and objective.phase == "soft":
            raise ValueError(f"objective ({objective.name!r}) learns values, as run_finetune.py does and this does not")
        return pruned.config.pruning

    def _training_arguments(self, epochs: float, learning_rate: float) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(self.folder / "trainer"),
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=self.arguments.batch_size,
            warmup_steps=5,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=False,
            dataloader_pin_memory=torch.accelerator.is_available(),
            seed=self.arguments.seed,
        )

    def finetune(self, model: PreTrainedModel, epochs: float, learning_rate: float) -> None:
        """Trains in place with the stock Trainer."""
        Trainer(
            model=model,
            args=self._training_arguments(epochs, learning_rate),
            train_dataset=self.splits["train"],
            data_collator=self.collator,
            processing_class=self.tokenizer,
        ).train()
        model.eval()

    def batches(self, split: datasets.Dataset, size: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        columns = [*self.tokenizer.model_input_names, "label"]
        for rows in split.select_columns([c for c in columns if c in split.column_names]).iter(
            size or self.arguments.eval_batch_size
        ):
            batch = self.collator([{name: rows[name][i] for name in rows} for i in range(len(rows["label"]))])
            yield {name: value.to(self.device) for name, value in batch.items()}

    @torch.inference_mode()
    def evaluate(self, model: PreTrainedModel, split: datasets.Dataset, name: str) -> Evaluation:
        """Accuracy on a split, and what each batch cost."""
        metric, right, macs = Accuracy(), [], []
        split = by_length(split)
        total = -(-len(split) // self.arguments.eval_batch_size)
        for batch in tqdm(self.batches(split), total=total, desc=name):
            labels = batch.pop("labels")
            call = EncoderCall(work=True)
            predictions = model(**batch, encoder_call=call).logits.argmax(dim=-1)
            metric.add_batch(predictions=predictions.tolist(), references=labels.tolist())
            right += (predictions == labels).tolist()
            macs.append(count_call(call, model.config))
        return Evaluation(metric.compute()["accuracy"], right, macs)

    def time(self, split: datasets.Dataset, stock: PreTrainedModel, pruned: PreTrainedModel) -> dict[str, Timing]:
        """Each baseline over the same documents, interleaved."""
        arrival, by_size = (list(self.batches(s)) for s in (split, by_length(split)))
        for batch in arrival + by_size:
            del batch["labels"]
        rounds = self.arguments.timed_rounds
        return time_against_baselines(
            stock, pruned, arrival, by_size, rounds=rounds, progress=lambda steps: tqdm(steps, desc="rounds")
        )

    def mac_ratio(self, model: PreTrainedModel, split: datasets.Dataset) -> float:
        counted = self.evaluate(model, split, "count the timed documents")
        return counted.macs_per_document() / counted.macs_per_document("lossless")

    def save(self, model: PreTrainedModel) -> None:
        model.save_pretrained(self.folder / "model")
        self.tokenizer.save_pretrained(self.folder / "model")

    @torch.inference_mode()
    def check_stranger(self, model: PreTrainedModel) -> dict[str, float]:
        """The largest difference between what we compute and what a process without this package computes."""
        batch = next(self.batches(self.splits["test"].select(range(min(4, len(self.splits["test"]))))))
        del batch["labels"]
        ours = {"AutoModel": model.base_model, "AutoModelForSequenceClassification": model}
        theirs = run_in_fresh_process(
            self.folder / "model", {name: value.tolist() for name, value in batch.items()}, list(ours)
        )
        differences = {}
        for name, loaded in ours.items():
            output = loaded(**batch)
            expected = output["logits"] if "logits" in output else output["last_hidden_state"]
            difference = (expected.cpu() - torch.tensor(theirs[name]["output"])).abs().max().item()
            differences[name] = difference
            print(f"{name}: {theirs[name]['class']}, largest difference {difference:.1e}")
            if difference > 1e-4 * max(1.0, expected.abs().max().item()):
                raise RuntimeError(f"{name} of the saved checkpoint is off by {difference:.1e} without the package")
        return differences

    @torch.inference_mode()
    def draw(self, evaluations: dict[str, Evaluation], pruned: PreTrainedModel) -> None:
        """Accuracy over MACs as PNG, and the kept words of some documents as HTML."""
        points = []
        for name, result in evaluations.items():
            low, high = accuracy_interval(result)
            points.append(OperatingPoint(name, result.macs_per_document() / 1e9, result.accuracy, low, high))
        title = f"{self.arguments.model_name_or_path} on {self.arguments.dataset_name}"
        accuracy_over_macs(points, self.folder / "accuracy_over_macs.png", title=title)
        shown = self.splits["test"].select(range(min(self.arguments.shown_documents, len(self.splits["test"]))))
        batch = next(self.batches(shown, len(shown)))
        labels = self.splits["test"].features["label"].names
        truth = [labels[i] for i in batch.pop("labels").tolist()]
        output = pruned(**batch, output_token_trace=True)
        unpruned = prune(pruned, None)(**batch).logits.argmax(dim=-1)
        tokens = [self.tokenizer.convert_ids_to_tokens(ids) for ids in shown["input_ids"]]
        confidence, prediction = output.logits.softmax(dim=-1).max(dim=-1)
        views = document_views(
            tokens,
            output.token_trace,
            labels=truth,
            predictions=[labels[i] for i in prediction.tolist()],
            predictions_unpruned=[labels[i] for i in unpruned.tolist()],
            confidences=confidence.tolist(),
            attention_mask=batch["attention_mask"],
        )
        write_page(self.folder / "kept_words.html", render_page(views, title=f"Kept words: {title}"))


def by_length(split: datasets.Dataset) -> datasets.Dataset:
    lengths = [len(ids) for ids in split["input_ids"]]
    return split.select(sorted(range(len(split)), key=lengths.__getitem__))


def accuracy_interval(result: Evaluation) -> tuple[float, float]:
    interval = binomtest(sum(result.right), len(result.right)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def quality(evaluations: dict[str, Evaluation]) -> list[dict]:
    """Accuracy and cost of each model; differences to the control with their 95 % interval."""
    control = evaluations["control"]
    return [
        {
            "model": name,
            "documents": len(result.right),
            "accuracy": result.accuracy,
            "accuracy_interval": accuracy_interval(result),
            "difference_to_control": result.accuracy - control.accuracy,
            "difference_interval": paired_bootstrap(result.right, control.right),
            "macs_per_document": result.macs_per_document(),
            "mac_ratio_to_unpadded": result.macs_per_document() / result.macs_per_document("lossless"),
            "mac_ratio_to_stock": result.macs_per_document() / result.macs_per_document("unpruned"),
        }
        for name, result in evaluations.items()
    ]


def table(report: dict) -> str:
    """The report as two tables of text."""
    lines = [f"{'model':34} {'accuracy':>8} {'to control [95 %]':>26} {'GMAC/document':>14} {'of unpadded':>12}"]
    for row in report["quality"]:
        low, high = (100 * bound for bound in row["difference_interval"])
        difference = f"{100 * row['difference_to_control']:+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(
            f"{row['model']:34} {100 * row['accuracy']:8.2f} {difference:>26} {row['macs_per_document'] / 1e9:14.3f} "
            f"{row['mac_ratio_to_unpadded']:12.3f}"
        )
    lines += [
        "",
        f"{'time':34} {'ms/document':>12} {'to padded':>10} {'to sorted':>10} {'to unpadded':>12} {'realised':>9}",
    ]
    for row in report["speed"]:
        realised = f"{row['realised']:9.2f}" if "realised" in row else ""
        lines.append(
            f"{row['model']:34} {row['milliseconds_per_input']:12.2f} {row['speedup_to_padded']:9.2f}x "
            f"{row['speedup_to_padded, sorted by length']:9.2f}x {row['speedup_to_unpadded']:11.2f}x {realised}"
        )
    where = report["machine"]
    lines += [
        "",
        f"{where['processor']}, {where['threads']} threads, {where['device']}, torch {where['torch']}, "
        f"transformers {where['transformers']}",
    ]
    return "\n".join(lines)


def main() -> None:
    try:
        (arguments,) = parse_arguments(QuickstartArguments)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    started = time.perf_counter()
    Quickstart(arguments).run()
    print(f"\ndone in {time.perf_counter() - started:.0f} s; everything is in {arguments.output_dir}")


if __name__ == "__main__":
    main()
