"""A recipe against its controls: what each run is, and what their reports say together.

A recipe is a folder with three files. `baseline.yaml` and `pruned.yaml` hold arguments of `run_finetune.py`; the pruned
model starts from the baseline, which is also its teacher where it has one. `controls.yaml` names the controls, and what
they change in `pruned.yaml`: all else, the steps included, is the same.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..command_line import read_mapping
from ..metrics import paired_bootstrap


# How a pruning is trained: a run without one takes none of these, and shares all else with the pruned one.
OF_A_PRUNING = (
    "target_macs",
    "keep_rate_warmup_start",
    "keep_rate_warmup_end",
    "in_place_distillation",
    "sandwich_samples",
    "budgets",
)
# A control of such a name would stand in another's place: of a run, or of what is timed beside the runs.
TAKEN_NAMES = ("baseline", "pruned", "padded", "padded, sorted by length", "unpadded")
CONTROL = "control"  # the baseline trained on with nothing pruned, which all others are compared with


@dataclass(frozen=True)
class Recipe:
    """The arguments of each run.

    Args:
        baseline: of the model that all others start from.
        others: by name: `pruned`, `control`, and further controls.
    """

    baseline: dict[str, Any]
    others: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: str | Path) -> "Recipe":
        """Raises an OSError for a file that is not there, and a ValueError for one that says something else."""
        files = {name: Path(folder) / f"{name}.yaml" for name in ("baseline", "pruned", "controls")}
        read = {name: read_mapping(path) for name, path in files.items()}
        pruned, controls = read["pruned"], read["controls"]
        if not pruned.get("pruning"):
            raise ValueError(f"pruning ({pruned.get('pruning')!r}) of {files['pruned']} must be given")
        if controls.get(CONTROL) != {"pruning": None}:
            raise ValueError(f"{CONTROL} ({controls.get(CONTROL)!r}) in {files['controls']} must be {{pruning: null}}")
        for name, changes in controls.items():
            if name in TAKEN_NAMES or not isinstance(name, str):
                raise ValueError(
                    f"{name!r} ({changes!r}) in {files['controls']} must be a name other than {', '.join(TAKEN_NAMES)}"
                )
            if not isinstance(changes, Mapping):
                raise ValueError(f"{name!r} ({changes!r}) in {files['controls']} must hold a mapping")
        return cls(
            read["baseline"], {"pruned": pruned} | {name: pruned | changes for name, changes in controls.items()}
        )

    def arguments(self, name: str, folder: Path, seed: int) -> dict[str, Any]:
        """What one run of one seed is called with; `folder` holds a folder for each run of that seed."""
        place = {"output_dir": str(folder / name), "seed": seed}
        if name == "baseline":
            return self.baseline | place
        baseline = str(folder / "baseline" / "model")
        given = self.others[name] | place | {"model_name_or_path": baseline}
        if given.get("pruning") is None:
            given = {argument: value for argument, value in given.items() if argument not in OF_A_PRUNING}
        taught = any(given.get(weight) for weight in ("distillation_weight", "token_distillation_weight"))
        return given | ({"teacher_name_or_path": baseline} if taught else {})


def parsed(value: Any) -> Any:
    """An argument of a run; a mapping, where a string holds one in JSON: a file may have either."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def summarise(reports: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each run of a recipe, over its seeds.

    Args:
        reports: of `run_finetune.py`, by run, one for each seed, in the same order of seeds; `control` among them.

    Returns:
        Accuracies and MACs; the difference to the control in points of accuracy, with its 95 % interval by a paired
        bootstrap over test inputs and seeds; and that interval to the baseline, where it is among the runs.

    Raises:
        ValueError: runs that were tested on other inputs than the control.
    """
    control = right(reports[CONTROL])
    unpadded = _mean(reports[CONTROL], "test_gmacs")
    rows = []
    for name, own in reports.items():
        if [report["labels"] for report in own] != [report["labels"] for report in reports[CONTROL]]:
            raise ValueError(f"{name!r} must be tested on the inputs that {CONTROL!r} was tested on, in the same order")
        low, high = paired_bootstrap(right(own), control)
        started = {}
        if "baseline" in reports:
            ends = paired_bootstrap(right(own), right(reports["baseline"]))
            started = {"interval_to_baseline": [100 * end for end in ends]}
        rows.append(
            {
                "run": name,
                "seeds": [report["training"]["seed"] for report in own],
                "inputs": len(own[0]["labels"]),
                "accuracy": 100 * _mean(own, "test_accuracy"),
                "accuracies": [100 * report["test"]["test_accuracy"] for report in own],
                "points_to_control": 100 * float((right(own) - control).mean()),
                "interval": [100 * low, 100 * high],
                **started,
                "gmacs": _mean(own, "test_gmacs"),
                "mac_ratio_to_unpadded": _mean(own, "test_gmacs") / unpadded,
                "mac_ratio_to_stock": _mean(own, "test_mac_ratio"),
                "training_seconds": [report["train"]["train_runtime"] for report in own],
                "at_budgets": [_at_budgets(report) for report in own],
            }
        )
    return rows


def _at_budgets(report: Mapping[str, Any]) -> list[dict[str, float]]:
    """What one checkpoint costs and gets right at each of its budgets."""
    names = {"budget": "budget", "test_mac_ratio": "mac_ratio_to_stock", "test_accuracy": "accuracy"}
    return [{new: budget[old] for old, new in names.items()} for budget in report.get("budgets", ())]


def right(reports: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Whether each test input was classified as labelled: float [seeds, inputs]."""
    return np.array([np.equal(report["predicted"], report["labels"]) for report in reports], dtype=float)


def _mean(reports: Sequence[Mapping[str, Any]], metric: str) -> float:
    return float(np.mean([report["test"][metric] for report in reports]))


def quality_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `summarise` as Markdown."""
    lines = [
        "| run | accuracy, % | of each seed | points to the control [95 %] | GMACs | of unpadded |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        seeds = ", ".join(f"{accuracy:.2f}" for accuracy in row["accuracies"])
        low, high = row["interval"]
        lines.append(
            f"| {row['run']} | {row['accuracy']:.2f} | {seeds} | {row['points_to_control']:+.2f} "
            f"[{low:+.2f}, {high:+.2f}] | {row['gmacs']:.3f} | {row['mac_ratio_to_unpadded']:.3f} |"
        )
    return "\n".join(lines)


def time_table(rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> str:
    """The rows of `speed_table` as Markdown, and where they were measured."""

    def bound(least: float) -> str:
        return f" (>= {least:.2f})" if least else ""  # of few rounds there is none

    lines = [
        "| time | ms per input | to padded | to padded, sorted | to unpadded | realised |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ratios = " | ".join(
            f"{row[f'speedup_to_{other}']:.2f}x" + bound(row[f"speedup_to_{other}_at_least"])
            for other in ("padded", "padded, sorted by length", "unpadded")
        )
        realised = f"{row['realised']:.2f}" if "realised" in row else ""
        lines.append(f"| {row['model']} | {row['milliseconds_per_input']:.2f} | {ratios} | {realised} |")
    where = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}"
    return "\n".join([*lines, "", f"Timed on {where}, transformers {machine['transformers']}."])
