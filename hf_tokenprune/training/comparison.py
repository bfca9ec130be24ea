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
from ..labels import CLASSES
from ..metrics import HUB_NAMES, JUDGEMENTS, TITLES, bootstrap, paired_bootstrap


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
        MACs, and what each run comes to: `accuracy` and `accuracies` with the difference to the control in points; or
        `scores` by metric, each in its own units. Differences have their 95 % interval by a paired bootstrap over test
        inputs and seeds, and that to the baseline, too, where it is among the runs. `scores_of` reads both.

    Raises:
        ValueError: runs that were tested on other inputs than the control, or as another kind of problem.
    """
    unpadded = _mean(reports[CONTROL], "test_gmacs")
    problem = _problem(reports[CONTROL][0])
    rows = []
    for name, own in reports.items():
        if [report["labels"] for report in own] != [report["labels"] for report in reports[CONTROL]]:
            raise ValueError(f"{name!r} must be tested on the inputs that {CONTROL!r} was tested on, in the same order")
        if any(_problem(report) != problem for report in own):
            raise ValueError(f"{name!r} must be tested on a {problem}, as {CONTROL!r} was")
        beside = {CONTROL: reports[CONTROL]} | {other: reports[other] for other in ("baseline",) if other in reports}
        rows.append(
            {
                "run": name,
                "seeds": [report["training"]["seed"] for report in own],
                "inputs": len(own[0]["labels"]),
                **(_accuracies(own, beside) if problem == CLASSES else {"scores": _scores(own, beside, problem)}),
                "gmacs": _mean(own, "test_gmacs"),
                "mac_ratio_to_unpadded": _mean(own, "test_gmacs") / unpadded,
                "mac_ratio_to_stock": _mean(own, "test_mac_ratio"),
                "training_seconds": [report["train"]["train_runtime"] for report in own],
                "at_budgets": [_at_budgets(report) for report in own],
            }
        )
    return rows


def _problem(report: Mapping[str, Any]) -> str:
    return report.get("problem_type") or CLASSES  # older reports were all of classes


def _accuracies(own: Sequence[Mapping[str, Any]], beside: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """In percent and points."""
    control = right(beside[CONTROL])
    made = {
        "accuracy": 100 * _mean(own, "test_accuracy"),
        "accuracies": [100 * report["test"]["test_accuracy"] for report in own],
        "points_to_control": 100 * float((right(own) - control).mean()),
        "interval": [100 * end for end in paired_bootstrap(right(own), control)],
    }
    if "baseline" in beside:
        ends = paired_bootstrap(right(own), right(beside["baseline"]))
        made["interval_to_baseline"] = [100 * end for end in ends]
    return made


def _scores(
    own: Sequence[Mapping[str, Any]], beside: Mapping[str, Sequence[Mapping[str, Any]]], problem: str
) -> dict[str, dict[str, Any]]:
    """By metric, in its own units."""
    labels = own[0]["labels"]
    predicted = [report["predicted"] for report in own]
    scores = {}
    for name in JUDGEMENTS[problem].names:
        values, control = ([report["test"][f"test_{name}"] for report in each] for each in (own, beside[CONTROL]))
        scores[name] = {
            "value": float(np.mean(values)),
            "of_each_seed": values,
            "to_control": float(np.mean(np.subtract(values, control))),
        }
        for other, key in ((CONTROL, "interval"), ("baseline", "interval_to_baseline")):
            if other in beside:
                others = [report["predicted"] for report in beside[other]]
                scores[name][key] = list(bootstrap(name, predicted, labels, others))
    return scores


@dataclass(frozen=True)
class Score:
    """What a run of a comparison comes to by one metric, in its own units; accuracy is in percent, and points of it.

    Args:
        metric: its name in reports. value: the mean over seeds. to_control, interval: the difference to the control,
            and its 95 % interval. interval_to_baseline: of the difference to the baseline; None: it was not computed.
    """

    metric: str
    value: float
    of_each_seed: list[float]
    to_control: float
    interval: list[float]
    interval_to_baseline: list[float] | None = None

    @property
    def words(self) -> dict[str, Any]:
        """How a card and a table write it."""
        title, percent = TITLES[self.metric], self.metric == "accuracy"
        return {
            "title": title,
            "hub_name": HUB_NAMES[self.metric],
            "plain": "%.2f" if percent else "%.4f",
            "signed": "%+.2f" if percent else "%+.4f",
            "unit": " %" if percent else "",
            "points": " points" if percent else "",
            "points_of": " points of accuracy" if percent else f" in {title}",
            "scale": 100 if percent else 1,
        }


def scores_of(row: Mapping[str, Any]) -> list[Score]:
    """All scores of a row of `summarise`; the first is that by which runs are compared."""
    if "scores" in row:
        return [Score(name, **score) for name, score in row["scores"].items()]
    names = "accuracy", "accuracies", "points_to_control", "interval", "interval_to_baseline"
    return [Score("accuracy", *map(row.get, names))]


def _at_budgets(report: Mapping[str, Any]) -> list[dict[str, float]]:
    """What one checkpoint costs and gets right at each of its budgets."""
    names = {"budget": "budget", "test_mac_ratio": "mac_ratio_to_stock"}
    names |= {f"test_{name}": name for name in JUDGEMENTS[_problem(report)].names}
    return [{new: budget[old] for old, new in names.items()} for budget in report.get("budgets", ())]


def right(reports: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Whether each test input was classified as labelled: float [seeds, inputs]."""
    return np.array([np.equal(report["predicted"], report["labels"]) for report in reports], dtype=float)


def _mean(reports: Sequence[Mapping[str, Any]], metric: str) -> float:
    return float(np.mean([report["test"][metric] for report in reports]))


def quality_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `summarise` as Markdown."""
    columns = [name for score in scores_of(rows[0]) for name in _heading(score)]
    lines = [f"| run | {' | '.join(columns)} | GMACs | of unpadded |", "| --- " * (len(columns) + 3) + "|"]
    for row in rows:
        cells = [cell for score in scores_of(row) for cell in _cells(score)]
        lines.append(
            f"| {row['run']} | {' | '.join(cells)} | {row['gmacs']:.3f} | {row['mac_ratio_to_unpadded']:.3f} |"
        )
    return "\n".join(lines)


def _heading(score: Score) -> tuple[str, str, str]:
    title, unit = score.words["title"], score.words["unit"]
    return (
        f"{title}{',' if unit else ''}{unit}",
        "of each seed",
        f"{score.words['points']} to the control [95 %]".strip(),
    )


def _cells(score: Score) -> tuple[str, str, str]:
    plain, signed = score.words["plain"], score.words["signed"]
    low, high = (signed % end for end in score.interval)
    seeds = ", ".join(plain % value for value in score.of_each_seed)
    return plain % score.value, seeds, f"{signed % score.to_control} [{low}, {high}]"


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
