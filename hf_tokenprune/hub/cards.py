"""Model cards from what was measured: nothing in them is typed that a run has not written down."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from transformers import PreTrainedModel

from ..checkpoints import CLASSIFY, HEADS, NO_HEAD, pipeline_tag_of, problem_of
from ..command_line import read_mapping, written_pruning
from ..labels import CLASSES, MULTI_LABEL, REGRESSION
from ..metrics import LOWER_IS_BETTER
from ..modeling.modeling_tokenprune import Prunable
from ..modeling.pruning_config import PruningConfig
from ..training.comparison import Recipe, Score, parsed, quality_table, scores_of, time_table
from ..viz.schedule_plot import schedule_picture


NEEDED = ("title", "base", "layers", "license", "pipeline_tag", "dataset", "dataset_title", "split", "limits")
TEXTS = tuple(name for name in NEEDED if name not in ("layers", "limits"))
OF_A_TASK = ("dataset_name", "model_name_or_path")  # what is said first where two recipes differ in more
KINDS = {
    CLASSES: "A classifier",
    REGRESSION: "A regression model",
    MULTI_LABEL: "A classifier of several labels",
}
TAGS = Prunable.model_tags
SOMEWHERE = "this/repository"


def read_about(recipe: str | Path) -> dict[str, Any]:
    """What no run can know: `card.yaml` of a recipe's folder.

    Raises:
        OSError: there is none.
        ValueError: something is missing in it, or of another type.
    """
    path = Path(recipe) / "card.yaml"
    about = yaml.safe_load(path.read_text())
    missing = [name for name in NEEDED if name not in (about if isinstance(about, Mapping) else {})]
    if missing:
        raise ValueError(f"{path} must have {', '.join(missing)}")
    _check_kinds(about, path)
    return about


def _check_kinds(about: Mapping[str, Any], path: Path) -> None:
    for name in (each for each in (*TEXTS, "base_model") if each in about):
        if not isinstance(about[name], str) or not about[name]:
            raise ValueError(f"{name} ({about[name]!r}) of {path} must be a string that is not empty")
    layers, language, limits = about["layers"], about.get("language", "en"), about["limits"]
    if type(layers) is not int or layers < 1:
        raise ValueError(f"layers ({layers!r}) of {path} must be a whole number >= 1")
    # YAML takes the code of Norwegian for False.
    if not language or not isinstance(language, str | list):
        raise ValueError(f"language ({language!r}) of {path} must be a code in quotes, or a list of them")
    wrong = [each for each in limits if not isinstance(each, str)] if isinstance(limits, list) else [limits]
    if wrong:
        raise ValueError(f"limits ({wrong[0]!r}) of {path} must be a list of strings: quote one that has ': ' in it")


def read_evidence(path: str | Path, recipe: str | Path) -> dict[str, Any]:
    """What `run_comparison.py` wrote of the recipe in a folder.

    Raises:
        OSError: there is none, or no such recipe.
        ValueError: another file, or one of another recipe.
    """
    evidence = read_mapping(path)
    missing = [name for name in ("quality", "seeds", "prunings", "machine") if name not in evidence]
    if missing:
        raise ValueError(f"{path} must be what run_comparison.py wrote, and has no {', '.join(missing)}")
    if evidence.get("recipe"):
        _check_recipe(evidence["recipe"], path, recipe)
    else:  # older comparisons did not tell it
        _check_sites(evidence["prunings"], path, recipe)
    return evidence


def _check_recipe(measured: Mapping[str, Any], path: str | Path, recipe: str | Path) -> None:
    """Raises a ValueError for the first argument in which what was measured is not what the recipe says."""
    read = Recipe.read(recipe)
    own = {"baseline": read.baseline, **read.others}
    if not isinstance(measured, Mapping) or not all(isinstance(run, Mapping) for run in measured.values()):
        raise ValueError(f"recipe ({measured!r}) of {path} must hold the arguments of each run")
    for run in (run for run in own if run in measured):
        wish, told = own[run], measured[run]
        for name in (*OF_A_TASK, *wish, *told):
            if parsed(wish.get(name)) != parsed(told.get(name)):
                raise ValueError(
                    f"{name} ({wish.get(name)!r}) of {recipe}, {run}, must be {told.get(name)!r}, which {path} was "
                    "measured with"
                )
    if differ := sorted(set(own) ^ set(measured)):
        raise ValueError(f"the runs of {recipe} must be those of {path}: one alone has {', '.join(differ)}")


def _check_sites(prunings: Sequence[Mapping[str, Any]], path: str | Path, recipe: str | Path) -> None:
    """Raises a ValueError for prunings that training, which sets their values, cannot have made of the recipe's."""
    own = written_pruning(_as_text(Recipe.read(recipe).others["pruned"]["pruning"]), None)
    wish = _sites(PruningConfig.coerce(own, read_about(recipe)["layers"]))
    for pruning in prunings:
        found = _sites(PruningConfig.from_dict(pruning))
        if found != wish:
            raise ValueError(f"pruning (sites {wish}) of {recipe} must be {found}, which {path} was measured with")


def _sites(pruning: PruningConfig) -> list[str]:
    return [f"{layer}: {site.saliency}, {site.rule}, {site.place}" for layer, site in sorted(pruning.sites.items())]


def _as_text(pruning: str | Mapping[str, Any]) -> str:
    return pruning if isinstance(pruning, str) else json.dumps(pruning)


def measured_card(
    about: Mapping[str, Any],
    evidence: Mapping[str, Any],
    *,
    recipe: str,
    picture: str,
    template: str | Path,
    schedule: str | None = None,
    address: str = SOMEWHERE,
    seed: int = 0,
) -> ModelCard:
    """The card of the pruned model of a comparison.

    Args:
        about: as `read_about` gives it. evidence: what `run_comparison.py` wrote.
        recipe: its folder's name. picture: its accuracy over MACs, as the card names the file.
        template: a Jinja file.
        schedule: the picture that `schedule_of` draws, likewise; without it the card has none.
        address: what the card says that the model loads from, a repository's id or a folder.
        seed: whose values the card shows, by its place among the comparison's.

    Raises:
        ValueError: a comparison that arguments were chosen by.
    """
    if evidence.get("held_out_samples") is not None:
        raise ValueError(f"held_out_samples ({evidence['held_out_samples']}) must be null: a card is of the test split")
    rows = {row["run"]: row for row in evidence["quality"]}
    timed = {row["model"]: row for row in evidence.get("speed", {}).get("rows", ())}
    beside = [name for name in rows if name in timed and name != "pruned"]
    pruned = rows["pruned"]
    pruning = PruningConfig.from_dict(evidence["prunings"][seed])
    seeds = " ".join(map(str, evidence["seeds"]))
    data = _metadata(
        about["title"],
        base_model=about.get("base_model"),
        datasets=[about["dataset"]],
        eval_results=[_result(about, pruned, score) for score in scores_of(pruned)],
        language=about.get("language"),
        license=about["license"],
        metrics=list(dict.fromkeys(score.words["hub_name"] for score in scores_of(pruned))),
        pipeline_tag=about["pipeline_tag"],
    )
    return ModelCard.from_template(
        data,
        template_path=str(template),
        about=about,
        measured={
            "kind": KINDS[evidence.get("problem_type") or CLASSES],  # older comparisons were all of classes
            "pruned": pruned,
            "baseline": rows["baseline"],
            "control": rows["control"],
            "scores": {run: scores_of(rows[run]) for run in ("pruned", "baseline", "control")},
            "better_before": _is_better(*(scores_of(rows[run])[0] for run in ("baseline", "control"))),
            "to_baseline": to_baseline(rows),
            "quality": quality_table(evidence["quality"]),
            "speed": time_table(**evidence["speed"]) if "speed" in evidence else None,
            "timed": timed.get("pruned", {}),
            "seeds": evidence["seeds"],
            "of_seed": evidence["seeds"][seed],
            "of_seeds": ("seed " if len(evidence["seeds"]) == 1 else "mean of seeds ") + seeds.replace(" ", ", "),
            "machine": evidence["machine"],
            "command": f"python scripts/run_comparison.py --recipe recipes/{recipe} --seeds {seeds} "
            f"--output_dir outputs/{recipe}" + (f" --timed_runs {shlex.join(beside)}" if beside else ""),
            "picture": picture,
            "schedule": schedule,
            "budgets": _at_budgets(pruned),
            "alike": all(own == evidence["prunings"][0] for own in evidence["prunings"]),
        },
        **_of_pruning(pruning, about["pipeline_tag"], address, bool(evidence.get("interpolated"))),
        problem=evidence.get("problem_type") or CLASSES,
    )


def unmeasured_card(
    model: PreTrainedModel,
    *,
    title: str,
    base_model: str | None,
    license: str | None,
    template: str | Path,
    address: str = SOMEWHERE,
    interpolated: bool = False,
) -> ModelCard:
    """The card of a model that nothing was measured of: what its config says, and that.

    Args:
        address: as in `measured_card`. interpolated: whether its images are not of the model's size.
    """
    tag = pipeline_tag_of(model)
    return ModelCard.from_template(
        _metadata(title, base_model=base_model, license=license, pipeline_tag=tag),
        template_path=str(template),
        about={"title": title, "limits": []},
        measured=None,
        **_of_pruning(model.config.pruning, tag, address, interpolated),
        problem=problem_of(model.config) if tag in CLASSIFY else CLASSES,
    )


def evaluation_results(about: Mapping[str, Any], evidence: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the pruned model comes to, in the form of the Hub's `.eval_results` files."""
    pruned = next(row for row in evidence["quality"] if row["run"] == "pruned")
    score, seeds = scores_of(pruned)[0], ", ".join(map(str, evidence["seeds"]))
    entry = EvalResultEntry(
        dataset_id=about["dataset"],
        task_id=about["pipeline_tag"],
        value=_value(score),
        notes=f"{score.words['title']} on {about['split']}, {_at_macs(pruned)}, seeds {seeds}",
    )
    return eval_result_entries_to_yaml([entry])


def schedule_of(evidence: Mapping[str, Any], about: Mapping[str, Any], path: str | Path, seed: int = 0) -> Path:
    """Draws the schedule of one seed of a comparison, by its place among them.

    Raises:
        ImportError: matplotlib is missing.
    """
    pruned = next(row for row in evidence["quality"] if row["run"] == "pruned")
    return schedule_picture(
        PruningConfig.from_dict(evidence["prunings"][seed]),
        path,
        layers=about["layers"],
        title=about["title"],
        mac_ratio=pruned["mac_ratio_to_unpadded"],
    )


def to_baseline(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the pruned model gained or lost on the baseline that it started from, in points or the metric's units.

    Args:
        rows: the runs of a comparison by name. `interval_to_baseline` of the pruned one is a paired interval, which
            takes predictions; scores alone give none.
    """
    own, before = (scores_of(rows[run])[0] for run in ("pruned", "baseline"))
    differences = [after - start for after, start in zip(own.of_each_seed, before.of_each_seed)]
    points = sum(differences) / len(differences)
    return {"points": points, "of_each_seed": differences, "interval": own.interval_to_baseline}


def _is_better(one: Score, other: Score) -> bool:
    lower = one.metric in LOWER_IS_BETTER
    return one.value < other.value if lower else one.value > other.value


def _metadata(title: str, **known: Any) -> ModelCardData:
    return ModelCardData(
        library_name="transformers",
        model_name=title,
        tags=list(TAGS),
        **{k: v for k, v in known.items() if v is not None},
    )


def _at_budgets(pruned: Mapping[str, Any]) -> list[dict[str, float]]:
    """What one checkpoint costs and gets right at each of its budgets: the means over seeds."""
    by_budget = zip(*pruned.get("at_budgets", ()))
    return [{name: sum(each[name] for each in own) / len(own) for name in own[0]} for own in by_budget]


def _of_pruning(pruning: PruningConfig | None, tag: str, address: str, interpolated: bool) -> dict[str, Any]:
    """What the template says of a pruning, and of how such a model is loaded."""
    return {
        "sites": [] if pruning is None else sorted(pruning.sites.items()),
        "budgets": [] if pruning is None else [macs for macs, _ in pruning.budgets],
        "auto_class": next((task.auto for task in HEADS.values() if task.pipeline_tag == tag), NO_HEAD.auto).__name__,
        "address": address,
        "images": tag.startswith("image-"),
        "interpolated": interpolated,
    }


def _at_macs(pruned: Mapping[str, Any]) -> str:
    return f"at {pruned['mac_ratio_to_unpadded']:.3f} of the unpadded model's MACs"


def _value(score: Score) -> float:
    """As the Hub has it: accuracy as a share."""
    return round(score.value / score.words["scale"], 4)


def _result(about: Mapping[str, Any], pruned: Mapping[str, Any], score: Score) -> EvalResult:
    return EvalResult(
        task_type=about["pipeline_tag"],
        dataset_type=about["dataset"],
        dataset_name=about["dataset_title"],
        dataset_split=about["split"],
        metric_type=score.words["hub_name"],
        metric_name=f"{score.words['title']} {_at_macs(pruned)}",
        metric_value=_value(score),
    )
