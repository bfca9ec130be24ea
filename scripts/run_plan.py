"""From a target to a pruning: what to take away so that a model costs, or takes, just so much.

    python scripts/run_plan.py --model_name_or_path your/classifier --dataset_name your/data --target_macs 0.5
    python scripts/run_plan.py --how calibrate --split train --max_inputs 256 ... --target_macs 0.5
    python scripts/run_plan.py --how search --max_inputs 256 ... --target_macs 0.4
    python scripts/run_profile.py --pruning outputs/plan/pruning.json ...        # and what that does to other inputs
    python scripts/run_profile.py --model_name_or_path outputs/plan/model ...    # likewise, with --prior_share

plan: `top_k` whose cost follows from lengths, or from this device's clock (--target_speedup, --target_latency).
With `--held_back N` the pruning that was found is tested on N labelled inputs of the other split, beside `top_k` at the
usual three sites (and, of calibrate, at its own sites with its own saliency) that costs on the inputs that were planned
for what the pruning does.

calibrate: thresholds by which each input gets its own; with `--prior_share`, the model is saved, too, in `model`, for
its table of what ids are worth. search: the best of many schedules on labelled inputs; it goes
on where it was when started again, and draws front.png. All write pruning.json and plan.json into `output_dir`.
"""

import json
import os
import shutil


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_tokenprune import Calibration, PruningConfig, calibrate, plan, prune, search_schedule
from hf_tokenprune.checkpoints import problem_of
from hf_tokenprune.command_line import parse_arguments
from hf_tokenprune.files import check_writable, write_atomically
from hf_tokenprune.metrics import TITLES
from hf_tokenprune.modeling.pruning_config import default_layers
from hf_tokenprune.planning.held_back import compare_held_back, run_pruned, top_k_of_same_cost
from hf_tokenprune.planning.search import METRICS
from hf_tokenprune.profiling import count_macs
from hf_tokenprune.profiling.arguments import ProfileArguments
from hf_tokenprune.profiling.baselines import speed_table, time_against_baselines
from hf_tokenprune.profiling.machine import describe_machine
from hf_tokenprune.profiling.run import accelerator_on
from hf_tokenprune.profiling.subject import Subject, load_subject
from hf_tokenprune.viz.search_plots import pareto_front


HOW = ("plan", "calibrate", "search")
# Arguments that only some of these look at.
GO_WITH = {
    "target_speedup": ("plan",),
    "target_latency": ("plan",),
    "layers": ("plan", "calibrate"),
    "saliency": ("calibrate",),
    "relative_to": ("calibrate",),
    "prior_share": ("calibrate",),
}
FAR = {"pearson": "squared error", "f1_micro": "KL"}  # to the logits of the unpruned model
MISSED = 0.9  # of the promised speed-up: less than this is said


@dataclass(kw_only=True)
class PlanArguments(ProfileArguments):
    """Those of `run_profile.py` that name a model and inputs, and a target."""

    output_dir: str = field(default="outputs/plan", metadata={"help": "Where pruning.json, plan.json, front.png go."})
    how: str = field(default="plan", metadata={"help": f"One of {', '.join(HOW)}."})
    target_macs: float | None = field(default=None, metadata={"help": "Of the stock encoder's multiply-accumulates."})
    target_speedup: float | None = field(default=None, metadata={"help": "Over nothing pruned, here; how plan."})
    target_latency: float | None = field(default=None, metadata={"help": "Seconds of a batch, here; how plan."})
    layers: list[int] | None = field(default=None, metadata={"help": "The sites; how plan and calibrate."})
    saliency: str = field(default="cls_attention", metadata={"help": "The score; how calibrate."})
    relative_to: str = field(
        default="median", metadata={"help": "What thresholds are relative to, as adaptive has it; how calibrate."}
    )
    prior_share: float = field(
        default=0.0,
        metadata={"help": "Of the tokens, those that go before the first layer by their id alone; how calibrate."},
    )
    held_back: int = field(
        default=0, metadata={"help": "Test on so many labelled inputs of the split that was not planned on; 0: not."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.how not in HOW:
            raise ValueError(f"how ({self.how!r}) must be one of {', '.join(HOW)}")
        for each in fields(self):
            value, hows = getattr(self, each.name), GO_WITH.get(each.name, HOW)
            if self.how not in hows and value != each.default:
                raise ValueError(f"{each.name} ({value!r}) goes with how {' and '.join(hows)} alone, not {self.how}")
        if self.how != "plan" and self.target_macs is None:
            raise ValueError(f"target_macs (None) must be given to {self.how}")
        if self.held_back < 0 or (self.held_back and (self.dataset_name is None or self.target_macs is None)):
            raise ValueError(f"held_back ({self.held_back}) must be >= 0, and needs dataset_name and target_macs")


def protected(subject: Subject) -> dict[str, Any]:
    separator = getattr(getattr(subject.collate, "tokenizer", None), "sep_token_id", None)
    return {} if separator is None else {"protected_token_ids": [separator]}


def measure(
    model: PreTrainedModel, pruning: PruningConfig, batch: dict[str, torch.Tensor], arguments: PlanArguments
) -> list[dict[str, Any]]:
    """The padded stock model, our engine with nothing pruned and the planned pruning on the batch that was planned for.

    Returns:
        As `speed_table`: each speed-up says over which of them.
    """
    pruned = prune(model, pruning).eval()
    # One batch has one order: what is sorted by length is left out.
    timings = time_against_baselines(model, pruned, [batch], [], rounds=arguments.rounds, seconds=arguments.seconds)
    timings = {name: timing for name, timing in timings.items() if name in ("padded", "unpadded", "pruned")}
    count = count_macs(pruned, batch)
    return speed_table(timings, len(next(iter(batch.values()))), {"pruned": count.total / count.lossless})


def labelled(subject: Subject, size: int) -> list[dict[str, torch.Tensor]]:
    """The inputs in batches with their labels."""
    if subject.labels is None:
        raise ValueError(f"search and held_back must have labels, and there are none: {subject.unlabelled}")
    labels = torch.tensor(subject.labels, device=subject.device).split(size)
    return [batch | {"labels": own} for batch, own in zip(subject.batches(size), labels)]


def held_back(
    model: PreTrainedModel, subject: Subject, found: dict[str, Any], arguments: PlanArguments
) -> list[dict[str, Any]]:
    """What was found, and `top_k` that costs as much on the inputs it was found on, on inputs of the other split.

    `top_k` is at the usual sites, and for calibrate at its own with its own saliency, too, where those are others.
    """
    other = "train" if arguments.split == "test" else "test"
    unseen = load_subject(replace(arguments, split=other, max_inputs=arguments.held_back), subject.device)
    pruning = None if found["pruning"] is None else PruningConfig.from_dict(found["pruning"])
    usual = {"layers": default_layers(model.config.num_hidden_layers), "saliency": "cls_attention"}
    wishes = {"top_k at the usual sites": usual}
    if arguments.how == "calibrate":
        own = {"layers": list(pruning.stages[-1].layers), "saliency": arguments.saliency}
        wishes |= {f"top_k at {own['layers']} by {own['saliency']}": own} if own != usual else {}
    seen = subject.batches(arguments.batch_size)
    prunings, planned = {}, {"nothing": run_pruned(model, None, seen)[0]}
    for name, wish in wishes.items():
        prunings[name], planned[name], planned[arguments.how] = top_k_of_same_cost(
            model, seen, pruning, **wish, **protected(subject)
        )
    prunings |= {arguments.how: pruning, "nothing": None}
    rows = compare_held_back(model, labelled(unseen, arguments.batch_size), prunings)
    return [row | {"macs_where_found": planned[row["pruning"]]} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    metric = rows[0].get("metric")  # None: accuracy
    heading = (
        "accuracy, % | points [95 %] | KL"
        if metric is None
        else f"{TITLES[metric]} | difference [95 %] | {FAR[metric]}"
    )
    lines = [f"| pruning | of the MACs | {heading} |", "| --- | --- | --- | --- | --- |"]
    score, difference, places = ("accuracy", "points", 2) if metric is None else ("score", "difference", 4)
    for row in rows:
        low, high = (f"{end:+.{places}f}" for end in row["interval"])
        figures = f"{row['macs']:.3f} | {row[score]:.{places}f} | {row[difference]:+.{places}f} [{low}, {high}]"
        lines.append(f"| {row['pruning']} | {figures} | {row['divergence']:.4f} |")
    return "\n".join(lines)


def keep(subject: Subject, found: Calibration, folder: Path) -> PreTrainedModel:
    """Saves the model with the table that its pruning looks ids up in, and returns it."""
    model = prune(subject.models["baseline"], found.pruning)
    model.base_model.set_token_prior(found.prior)
    model.save_pretrained(folder)
    if tokenizer := getattr(subject.collate, "tokenizer", None):
        tokenizer.save_pretrained(folder)
    return model


def remove_earlier_model(arguments: PlanArguments) -> None:
    """Removes the model that the run before left in `output_dir`, unless it is the one that was planned for."""
    folder = Path(arguments.output_dir)
    report, model = folder / "plan.json", folder / "model"
    earlier = json.loads(report.read_text()).get("arguments", {}) if report.exists() else {}
    ours = earlier.get("how") == "calibrate" and earlier.get("prior_share")
    if ours and model.resolve() != Path(arguments.model_name_or_path).resolve():
        shutil.rmtree(model, ignore_errors=True)


def run(arguments: PlanArguments, subject: Subject) -> tuple[dict[str, Any], str, PreTrainedModel]:
    """What was found, with `pruning`; a sentence; and the model with what the pruning needs."""
    model, batches = subject.models["baseline"], subject.batches(arguments.batch_size)
    if arguments.how == "plan":
        targets = {name: getattr(arguments, name) for name in ("target_macs", "target_speedup", "target_latency")}
        planned = plan(model, batches[0], **targets, layers=arguments.layers, **protected(subject))
        found = asdict(planned) | {"pruning": planned.pruning and planned.pruning.to_dict()}
        if planned.pruning is None or planned.speedup is None:
            return found, planned.verdict, model
        measured = measure(model, planned.pruning, batches[0], arguments)
        over = [measured[-1][f"speedup_to_{name}"] for name in ("unpadded", "padded")]
        words = "Measured: {:.2f}x over nothing pruned, {:.2f}x over the padded stock model.".format(*over)
        if over[0] < MISSED * planned.speedup:
            words += f" That misses the promised {planned.speedup:.2f}x."
        return found | {"measured": measured}, f"{planned.verdict} {words}", model
    common = {"target_macs": arguments.target_macs, "progress": tqdm, **protected(subject)}
    if arguments.how == "calibrate":
        given = {name: getattr(arguments, name) for name in ("layers", "saliency", "relative_to", "prior_share")}
        found = calibrate(model, batches, **given, **common)
        words = f"{found.inputs} inputs cost {found.macs:.3f} of the MACs, each {found.least:.3f} to {found.most:.3f}."
        if not found.met:
            words = f"{arguments.target_macs:.3f} of the MACs cannot be met; the closest: {words}"
        report = {name: value for name, value in vars(found).items() if name != "prior"}
        if found.prior is not None:
            folder = Path(arguments.output_dir) / "model"
            model, words = keep(subject, found, folder), f"{words} The model with its table is {folder}."
        return report | {"pruning": found.pruning.to_dict()}, words, model
    given = labelled(subject, arguments.batch_size)
    folder, metric = Path(arguments.output_dir), METRICS[problem_of(model.config)]
    search = search_schedule(model, given, resume_from=folder / "points.json", metric=metric, **common)
    name, score = Path(arguments.model_name_or_path).name, TITLES[metric.__name__]
    pareto_front(search, folder / "front.png", title=name, score=score)
    chosen = search.chosen
    words = f"The best of {len(search.points)} points: {chosen.score:.4f} at {chosen.macs:.3f} of the MACs."
    if not search.met:
        words = f"{arguments.target_macs:.3f} of the MACs cannot be met within 0.01; of the closest: {words}"
    if chosen.pruning is None:
        words = f"With nothing pruned it costs {chosen.macs:.3f} of the MACs already."
    front = [asdict(point) for point in search.front]
    return asdict(search) | {"pruning": chosen.pruning, "front": front}, words, model


def write(found: dict[str, Any], words: str, subject: Subject, arguments: PlanArguments) -> None:
    if arguments.how != "calibrate" or not arguments.prior_share:
        remove_earlier_model(arguments)
    folder = Path(arguments.output_dir)
    where = describe_machine(subject.device) | {"dtype": arguments.dtype}
    report = {"verdict": words, "where": where, "arguments": asdict(arguments)} | found
    write_atomically(folder / "plan.json", json.dumps(report, indent=1).encode())
    write_atomically(
        folder / "pruning.json", json.dumps(found["pruning"] or PruningConfig().to_dict(), indent=1).encode()
    )


def main() -> None:
    try:
        (arguments,) = parse_arguments(PlanArguments)
        check_writable(arguments.output_dir)
        subject = load_subject(arguments, accelerator_on(arguments.device).device)
        if arguments.held_back:
            labelled(subject, arguments.batch_size)  # or an error, before anything is looked for
        found, words, model = run(arguments, subject)
        if arguments.held_back:
            found["held_back"] = held_back(model, subject, found, arguments)
            words += f" On inputs that it was not found on:\n{table(found['held_back'])}\n"
        write(found, words, subject, arguments)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    print(f"{words} Everything is in {arguments.output_dir}.")


if __name__ == "__main__":
    main()
