"""From a target to a pruning: what to take away so that a model costs, or takes, just so much.

    python scripts/run_plan.py --model_name_or_path your/classifier --dataset_name your/data --target_macs 0.5
    python scripts/run_plan.py --how calibrate --split train --max_inputs 256 ... --target_macs 0.5
    python scripts/run_plan.py --how search --max_inputs 256 ... --target_macs 0.4
    python scripts/run_profile.py --pruning outputs/plan/pruning.json ...        # and what that does to other inputs

plan: `top_k` whose cost follows from lengths, or from this device's clock (--target_speedup, --target_latency).
calibrate: thresholds by which each input gets its own. search: the best of many schedules on labelled inputs; it goes
on where it was when started again, and draws front.png. All write pruning.json and plan.json into `output_dir`.
"""

import json
import os


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_tokenprune import PruningConfig, calibrate, plan, prune, search_schedule
from hf_tokenprune.command_line import parse_arguments
from hf_tokenprune.files import write_atomically
from hf_tokenprune.profiling import speedup, speedup_bound, time_interleaved
from hf_tokenprune.profiling.arguments import ProfileArguments
from hf_tokenprune.profiling.machine import describe_machine
from hf_tokenprune.profiling.subject import Subject, load_subject
from hf_tokenprune.viz.search_plots import pareto_front


HOW = ("plan", "calibrate", "search")


@dataclass
class PlanArguments(ProfileArguments):
    """Those of `run_profile.py` that name a model and inputs, and a target."""

    output_dir: str = field(default="outputs/plan", metadata={"help": "Where pruning.json, plan.json, front.png go."})
    how: str = field(default="plan", metadata={"help": f"One of {', '.join(HOW)}."})
    target_macs: float | None = field(default=None, metadata={"help": "Of the stock encoder's multiply-accumulates."})
    target_speedup: float | None = field(default=None, metadata={"help": "Over nothing pruned, here; how plan."})
    target_latency: float | None = field(default=None, metadata={"help": "Seconds of a batch, here; how plan."})
    layers: list[int] | None = field(default=None, metadata={"help": "The sites; how plan and calibrate."})
    saliency: str = field(default="cls_attention", metadata={"help": "The score; how calibrate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.how not in HOW:
            raise ValueError(f"how ({self.how!r}) must be one of {', '.join(HOW)}")
        if self.how != "plan" and self.target_macs is None:
            raise ValueError(f"target_macs (None) must be given to {self.how}")


def protected(subject: Subject) -> dict[str, Any]:
    separator = getattr(getattr(subject.collate, "tokenizer", None), "sep_token_id", None)
    return {} if separator is None else {"protected_token_ids": [separator]}


def measure(
    model: PreTrainedModel, pruning: PruningConfig, batch: dict[str, torch.Tensor], arguments: PlanArguments
) -> dict[str, float]:
    """The planned pruning and our engine with nothing pruned on the batch that was planned for, in turn."""
    unpadded, pruned = prune(model, None).eval(), prune(model, pruning).eval()
    with torch.inference_mode():
        timings = time_interleaved(
            {"unpadded": lambda: unpadded(**batch), "pruned": lambda: pruned(**batch)},
            rounds=arguments.rounds,
            seconds=arguments.seconds,
        )
    both = timings["unpadded"], timings["pruned"]
    return {
        "speedup": speedup(*both),
        "at_least": speedup_bound(*both),
        "seconds": timings["pruned"].median,
        "rounds": len(timings["pruned"].seconds),
    }


def run(arguments: PlanArguments) -> tuple[dict[str, Any], str]:
    """What was found, with `pruning`, and a sentence."""
    subject = load_subject(arguments, Accelerator(cpu=arguments.device == "cpu").device)
    model, batches = subject.models["baseline"], subject.batches(arguments.batch_size)
    if arguments.how == "plan":
        targets = {name: getattr(arguments, name) for name in ("target_macs", "target_speedup", "target_latency")}
        planned = plan(model, batches[0], **targets, layers=arguments.layers, **protected(subject))
        found = asdict(planned) | {"pruning": planned.pruning and planned.pruning.to_dict()}
        if planned.pruning is None or planned.speedup is None:
            return found, planned.verdict
        measured = measure(model, planned.pruning, batches[0], arguments)
        return found | {"measured": measured}, f"{planned.verdict} Measured: {measured['speedup']:.2f}x."
    common = {"target_macs": arguments.target_macs, "progress": tqdm, **protected(subject)}
    if arguments.how == "calibrate":
        found = calibrate(model, batches, layers=arguments.layers, saliency=arguments.saliency, **common)
        words = f"{found.inputs} inputs cost {found.macs:.3f} of the MACs, each {found.least:.3f} to {found.most:.3f}."
        return vars(found) | {"pruning": found.pruning.to_dict()}, words
    if subject.labels is None:
        raise ValueError("dataset_name (None) must be given to search: it needs labels")
    labels = torch.tensor(subject.labels, device=subject.device).split(arguments.batch_size)
    labelled = [batch | {"labels": own} for batch, own in zip(batches, labels)]
    search = search_schedule(model, labelled, resume_from=Path(arguments.output_dir) / "points.json", **common)
    pareto_front(search, Path(arguments.output_dir) / "front.png", title=Path(arguments.model_name_or_path).name)
    chosen = search.chosen
    words = f"The best of {len(search.points)} points: {chosen.score:.4f} at {chosen.macs:.3f} of the MACs."
    front = [asdict(point) for point in search.front]
    return asdict(search) | {"pruning": chosen.pruning, "front": front}, words


def main() -> None:
    try:
        (arguments,) = parse_arguments(PlanArguments)
        found, words = run(arguments)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError, yaml.YAMLError) as error:
        raise SystemExit(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    folder = Path(arguments.output_dir)
    where = describe_machine() | {"dtype": arguments.dtype}
    report = {"verdict": words, "where": where, "arguments": asdict(arguments)} | found
    write_atomically(folder / "plan.json", json.dumps(report, indent=1).encode())
    write_atomically(
        folder / "pruning.json", json.dumps(found["pruning"] or PruningConfig().to_dict(), indent=1).encode()
    )
    print(f"{words} Everything is in {folder}.")


if __name__ == "__main__":
    main()
