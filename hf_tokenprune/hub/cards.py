"""Model cards from what was measured: nothing in them is typed that a run has not written down."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..modeling.pruning_config import PruningConfig
from ..training.comparison import CONTROL, quality_table, time_table


NEEDED = ("title", "base_model", "license", "language", "pipeline_tag", "dataset", "dataset_title", "split", "limits")


def read_about(recipe: str | Path) -> dict[str, Any]:
    """What no run can know: `card.yaml` of a recipe's folder.

    Raises:
        OSError: there is none.
        ValueError: something is missing in it.
    """
    path = Path(recipe) / "card.yaml"
    about = yaml.safe_load(path.read_text())
    missing = [name for name in NEEDED if name not in (about if isinstance(about, Mapping) else {})]
    if missing:
        raise ValueError(f"{path} must have {', '.join(missing)}")
    return about


def model_card(
    about: Mapping[str, Any],
    evidence: Mapping[str, Any],
    *,
    command: str,
    picture: str,
    template: str | Path,
) -> ModelCard:
    """The card of the pruned model of a comparison.

    Args:
        about: as `read_about` gives it. evidence: what `run_comparison.py` wrote.
        command: what reproduces it. picture: its accuracy over MACs, as the card names the file.
        template: a Jinja file.
    """
    rows = {row["run"]: row for row in evidence["quality"]}
    pruned = rows["pruned"]
    data = ModelCardData(
        base_model=about["base_model"],
        datasets=[about["dataset"]],
        eval_results=[_result(about, pruned)],
        language=about["language"],
        library_name="transformers",
        license=about["license"],
        metrics=["accuracy"],
        model_name=about["title"],
        pipeline_tag=about["pipeline_tag"],
        tags=["token-pruning", "hf_tokenprune"],
    )
    pruning = PruningConfig.from_dict(evidence["prunings"][0])
    return ModelCard.from_template(
        data,
        template_path=str(template),
        title=about["title"],
        about=about,
        pruned=pruned,
        control=rows[CONTROL],
        quality=quality_table(evidence["quality"]),
        speed=time_table(**evidence["speed"]) if "speed" in evidence else None,
        timed=evidence.get("speed", {}).get("rows", [{}])[-1],
        sites=[(layer, site) for layer, site in sorted(pruning.sites.items())],
        budgets=[macs for macs, _ in pruning.budgets],
        seeds=evidence["seeds"],
        machine=evidence["machine"],
        recipe=evidence["recipe"],
        command=command,
        picture=picture,
    )


def _result(about: Mapping[str, Any], pruned: Mapping[str, Any]) -> EvalResult:
    return EvalResult(
        task_type=about["pipeline_tag"],
        dataset_type=about["dataset"],
        dataset_name=about["dataset_title"],
        dataset_split=about["split"],
        metric_type="accuracy",
        metric_name=f"accuracy at {pruned['mac_ratio_to_unpadded']:.3f} of the unpadded model's MACs",
        metric_value=round(pruned["accuracy"] / 100, 4),
    )
