"""The real scripts on numbers, several labels and classes: from a file to a model, its report, card and answers."""

import json
import random
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    ViTForImageClassification,
)

from hf_tokenprune import TokenPruneTrainingArguments
from hf_tokenprune.hub.cards import evaluation_results, measured_card, unmeasured_card
from hf_tokenprune.labels import CLASSES, MULTI_LABEL, REGRESSION
from hf_tokenprune.metrics import JUDGEMENTS
from hf_tokenprune.training.comparison import quality_table, scores_of, summarise
from hf_tokenprune.training.finetune import FinetuneArguments, finetune, make_trainer
from hf_tokenprune.viz import comparison_picture


ROOT = Path(__file__).parents[1]
PRUNING = '{"preset": "top_k", "layers": [1, 3], "keep_rate": 0.5}'
TRAINED = {
    "pruning": PRUNING, "max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 16, "report_to": "none",
    "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip
ABOUT = {
    "title": "a title", "base": "a base", "layers": 4, "license": "mit", "pipeline_tag": "text-classification",
    "dataset": "a-set", "dataset_title": "A set", "split": "test", "limits": ["One."],
}  # fmt: skip
FORMS = {
    REGRESSION: lambda number: number / 10,
    MULTI_LABEL: lambda number: [name for place, name in enumerate(("low", "odd", "ten")) if number >> place & 1],
    CLASSES: lambda number: "no" if number < 25 else "yes",
}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and 150 texts, whose number from 0 to 50 their words tell, labelled in three ways."""
    folder, chance = tmp_path_factory.mktemp("room"), random.Random(0)
    tiny.save_text_model(folder / "model")
    numbers = [chance.randrange(51) for _ in range(150)]
    texts = [" ".join([f"w{4 + number // 8}"] * chance.randrange(2, 9)) for number in numbers]
    for problem, form in FORMS.items():
        rows = [json.dumps({"text": text, "label": form(number)}) + "\n" for text, number in zip(texts, numbers)]
        (folder / f"{problem}.jsonl").write_text("".join(rows))
    rows = [f"{text},{number / 10}\n" for text, number in zip(texts, numbers)]
    (folder / f"{REGRESSION}.csv").write_text("text,label\n" + "".join(rows))
    return folder


def given(room: Path, problem: str, output: Path, **changes: Any) -> dict[str, Any]:
    data = room / f"{problem}.{'csv' if problem == REGRESSION else 'jsonl'}"
    place = {"model_name_or_path": str(room / "model"), "dataset_name": str(data), "output_dir": str(output)}
    return TRAINED | place | changes


def parsed(arguments: dict[str, Any]) -> tuple[FinetuneArguments, TokenPruneTrainingArguments]:
    return HfArgumentParser([FinetuneArguments, TokenPruneTrainingArguments]).parse_dict(arguments)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """A script in this process; what it prints."""

    def call(script: str, **arguments: Any) -> str:
        path = tmp_path / f"{script}.yaml"
        path.write_text(yaml.safe_dump(arguments))
        monkeypatch.setattr(sys, "argv", [script, str(path)])
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def trained(room: Path) -> Callable[[str], Path]:
    """The folder of a run on each kind of label, trained once."""

    def call(problem: str) -> Path:
        folder = room / f"trained-{problem}"
        if not (folder / "report.json").exists():
            finetune(*parsed(given(room, problem, folder)))
        return folder

    return call


@pytest.mark.parametrize("problem", FORMS)
def test_run_finetune_says_what_it_trains_and_judges_it_as_that(room, problem, run, caplog, tmp_path):
    said = run("run_finetune", **given(room, problem, tmp_path / "out"))
    lines = [record.getMessage() for record in caplog.records if "is read as" in record.getMessage()]
    assert len(lines) == 1 and f"label column 'label' is read as {problem}: " in lines[0]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    predicted, labels = np.array(report["predicted"]), np.array(report["labels"])
    judged = JUDGEMENTS[problem](predicted, labels)
    names = {name.removeprefix("test_") for name in report["test"]}
    for name, value in judged.items():
        assert report["test"][f"test_{name}"] == pytest.approx(value, abs=1e-6)
        assert f"{name} {value:.4f}" in said
    assert names.isdisjoint({name for other in JUDGEMENTS.values() for name in other.names} - set(judged))
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["problem_type"] == problem == report["problem_type"]
    outputs = {REGRESSION: ["LABEL_0"], MULTI_LABEL: ["low", "odd", "ten"], CLASSES: ["no", "yes"]}[problem]
    assert list(config["id2label"].values()) == outputs
    shape = {REGRESSION: (30,), MULTI_LABEL: (30, 3), CLASSES: (30,)}[problem]
    assert predicted.shape == labels.shape == shape
    if problem == REGRESSION:
        assert judged["pearson"] > 0.5 and judged["mse"] < labels.var()


@pytest.mark.parametrize("problem", [REGRESSION, MULTI_LABEL])
def test_images(problem, tmp_path):
    tiny.build(tiny.Case(ViTForImageClassification, tiny.VIT)).save_pretrained(tmp_path / "model")
    sides = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(sides))
    shades = np.random.default_rng(0).integers(0, 80, (20, 9, 9), dtype=np.uint8)
    label = [[0, 1, 1], [1, 0, 0]] * 10 if problem == MULTI_LABEL else [i / 8 for i in range(20)]
    datasets.Dataset.from_dict(
        {"pic": list(shades), "label": label},
        features=datasets.Features(
            {
                "pic": datasets.Image(mode="L"),
                "label": datasets.List(datasets.Value("int64"))
                if problem == MULTI_LABEL
                else datasets.Value("float64"),
            }
        ),
    ).to_parquet(tmp_path / "pics.parquet")
    place = {"dataset_name": str(tmp_path / "pics.parquet"), "image_column": "pic", "max_steps": 2}
    report = finetune(*parsed(given(tmp_path, problem, tmp_path / "out", **place)))
    assert report["problem_type"] == problem and len(report["labels"]) == 4
    assert {f"test_{name}" for name in JUDGEMENTS[problem].names} <= report["test"].keys()


def test_a_checkpoints_problem_is_respected(room, trained, tmp_path, caplog):
    """Natively saved, too: whole numbers stay numbers, and the head stays as it was trained."""
    rows = [json.loads(line) for line in (room / f"{REGRESSION}.jsonl").read_text().splitlines()]
    rows = [row | {"label": round(row["label"])} for row in rows]
    (tmp_path / "whole.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    native = tmp_path / "native"
    config = AutoConfig.from_pretrained(room / "model", num_labels=1, problem_type=REGRESSION)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(native)
    AutoTokenizer.from_pretrained(room / "model").save_pretrained(native)
    for number, source in enumerate((trained(REGRESSION) / "model", native)):
        place = {"dataset_name": str(tmp_path / "whole.jsonl"), "model_name_or_path": str(source)}
        trainer = make_trainer(*parsed(given(room, REGRESSION, tmp_path / str(number), **place)))
        assert trainer.pruned.config.problem_type == REGRESSION and trainer.pruned.config.num_labels == 1
        before = AutoModelForSequenceClassification.from_pretrained(source).classifier.weight
        torch.testing.assert_close(trainer.pruned.classifier.weight, before)
    place = {"dataset_name": str(tmp_path / "whole.jsonl"), "model_name_or_path": str(native), "problem_type": CLASSES}
    trainer = make_trainer(*parsed(given(room, REGRESSION, tmp_path / "asked", **place)))
    assert trainer.pruned.config.problem_type == CLASSES and trainer.pruned.config.num_labels == 6
    assert "the checkpoint's head is of regression" in caplog.text


def test_one_logit_of_a_checkpoint_that_says_nothing(room, run, tmp_path, caplog):
    """Natively it is trained as a number, and pipelines give its sigmoid."""
    native = tmp_path / "native"
    config = AutoConfig.from_pretrained(room / "model", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(native)
    AutoTokenizer.from_pretrained(room / "model").save_pretrained(native)
    assert json.loads((native / "config.json").read_text()).get("problem_type") is None
    rows = [json.dumps({"text": f"w{4 + i % 9}", "label": i % 6}) + "\n" for i in range(60)]
    (tmp_path / "whole.jsonl").write_text("".join(rows))
    place = {"dataset_name": str(tmp_path / "whole.jsonl"), "model_name_or_path": str(native)}
    trainer = make_trainer(*parsed(given(room, REGRESSION, tmp_path / "out", **place)))
    assert trainer.pruned.config.problem_type == REGRESSION and trainer.pruned.config.num_labels == 1
    before = AutoModelForSequenceClassification.from_pretrained(native).eval()
    torch.testing.assert_close(trainer.pruned.classifier.weight, before.classifier.weight)
    # Classes, which one number cannot be, take another head, and the log says so.
    named = place | {"dataset_name": str(room / f"{CLASSES}.jsonl")}
    trainer = make_trainer(*parsed(given(room, CLASSES, tmp_path / "named", **named)))
    assert trainer.pruned.config.problem_type == CLASSES
    assert "the checkpoint's head is of regression" in caplog.text
    run("run_predict", output_dir=str(tmp_path / "pipelines"), max_rows=5, logits=True, **place)
    read = datasets.load_dataset("parquet", data_files=str(tmp_path / "pipelines" / "*.parquet"), split="train",
                                 cache_dir=str(tmp_path / "cache"))  # fmt: skip
    torch.testing.assert_close(torch.tensor(read["score"][:]), torch.tensor(read["logits"][:])[:, 0].sigmoid())
    run("run_predict", output_dir=str(tmp_path / "seen"), max_rows=5, logits=True, problem_type=REGRESSION, **place)
    read = datasets.load_dataset("parquet", data_files=str(tmp_path / "seen" / "*.parquet"), split="train",
                                 cache_dir=str(tmp_path / "cache"))  # fmt: skip
    assert read.column_names == ["row", "score", "logits"]
    assert read["score"][:] == [logit for (logit,) in read["logits"]]
    run("run_predict", output_dir=str(tmp_path / "told"), max_rows=5, logits=True, problem_type=MULTI_LABEL, **place)
    read = datasets.load_dataset("parquet", data_files=str(tmp_path / "told" / "*.parquet"), split="train",
                                 cache_dir=str(tmp_path / "cache"))  # fmt: skip
    torch.testing.assert_close(torch.tensor(read["scores"][:]), torch.tensor(read["logits"][:]).sigmoid())
    # A base without a head has no problem, whatever its config counts.
    base = tmp_path / "base"
    AutoModel.from_config(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(room / "model").save_pretrained(base)
    trainer = make_trainer(*parsed(given(room, CLASSES, tmp_path / "new", **place | {"model_name_or_path": str(base)})))
    assert trainer.pruned.config.problem_type == CLASSES and trainer.pruned.config.num_labels == 6


def test_a_checkpoint_of_another_problem_learns_what_the_data_say(room, trained, tmp_path):
    for problem, source in ((CLASSES, MULTI_LABEL), (MULTI_LABEL, REGRESSION), (CLASSES, REGRESSION)):
        place = {"model_name_or_path": str(trained(source) / "model"), "max_steps": 1}
        report = finetune(*parsed(given(room, problem, tmp_path / f"{source}-{problem}", **place)))
        assert report["problem_type"] == problem and np.isfinite(report["test"]["test_loss"])


REFUSED = {
    "smoothing": (
        REGRESSION,
        {"label_smoothing_factor": 0.1},
        "label_smoothing_factor (0.1) must be 0 with problem_type",
    ),
    "a best of classes": (
        REGRESSION,
        {"metric_for_best_model": "accuracy"},
        "metric_for_best_model ('accuracy') must be one of pearson, spearman, mse, loss",
    ),
    "numbers as several": (REGRESSION, {"problem_type": MULTI_LABEL}, "must hold lists for problem_type"),
    "words as numbers": (CLASSES, {"problem_type": REGRESSION}, "must be a finite number, for a regression"),
    "another problem": (CLASSES, {"problem_type": "ranking"}, "problem_type ('ranking') must be one of regression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_sentence(room, case, run, tmp_path):
    problem, changes, words = REFUSED[case]
    with pytest.raises(SystemExit) as error:
        run("run_finetune", **given(room, problem, tmp_path / "out", **changes))
    assert words in error.value.code and "\n" not in error.value.code


def test_a_teacher_of_another_problem_is_refused(room, trained, tmp_path):
    config = AutoConfig.from_pretrained(room / "model", num_labels=2, problem_type=MULTI_LABEL)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "teacher")
    changes = {"teacher_name_or_path": str(tmp_path / "teacher"), "distillation_weight": 1.0}
    with pytest.raises(
        ValueError, match=r"problem_type \('multi_label_classification'\) must be the student's \('sing"
    ):
        make_trainer(*parsed(given(room, CLASSES, tmp_path / "out", **changes)))


def test_the_best_by_squared_error_is_the_lowest(room, tmp_path):
    changes = {
        "metric_for_best_model": "mse", "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4,
        "save_strategy": "steps", "save_steps": 4, "max_steps": 16, "learning_rate": 3e-2,
    }  # fmt: skip
    report = finetune(*parsed(given(room, REGRESSION, tmp_path / "out", **changes)))
    errors = [entry["eval_mse"] for entry in report["log"] if "eval_mse" in entry]
    assert len(errors) == 4 and max(errors) > min(errors)
    assert report["test"]["test_mse"] == pytest.approx(min(errors), rel=1e-4)
    for name, greater in (("pearson", True), ("eval_mse", False), ("eval_loss", False)):
        _, training = parsed(given(room, REGRESSION, tmp_path, **changes | {"metric_for_best_model": name}))
        assert training.greater_is_better == greater


@pytest.mark.parametrize("problem", FORMS)
def test_run_predict_answers_as_the_model_was_trained(room, trained, problem, run, tmp_path):
    folder = trained(problem)
    data = {"dataset_name": str(room / f"{problem}.jsonl"), "max_rows": 20, "logits": True}
    run("run_predict", model_name_or_path=str(folder / "model"), output_dir=str(tmp_path / "out"), **data)
    read = datasets.load_dataset("parquet", data_files=str(tmp_path / "out" / "*.parquet"), split="train",
                                 cache_dir=str(tmp_path / "cache"))  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    texts = [json.loads(line)["text"] for line in (room / f"{problem}.jsonl").read_text().splitlines()[:20]]
    with torch.no_grad():
        logits = model(
            **AutoTokenizer.from_pretrained(folder / "model")(texts, padding=True, return_tensors="pt")
        ).logits
    torch.testing.assert_close(torch.tensor(read["logits"][:]), logits, rtol=0, atol=1e-5)
    if problem == REGRESSION:
        assert read.column_names == ["row", "score", "logits"]
        torch.testing.assert_close(torch.tensor(read["score"][:]), logits[:, 0], rtol=0, atol=1e-5)
    elif problem == MULTI_LABEL:
        assert read.column_names == ["row", "labels", "scores", "logits"]
        torch.testing.assert_close(torch.tensor(read["scores"][:]), logits.sigmoid(), rtol=0, atol=1e-5)
        named = [[model.config.id2label[i] for i in range(3) if row[i] > 0.5] for row in logits.sigmoid()]
        assert read["labels"][:] == named and len(set(map(len, named))) > 1
    else:
        assert read["label"][:] == [model.config.id2label[i] for i in logits.argmax(-1).tolist()]


def test_run_predict_reads_logits_as_it_is_told(room, run, tmp_path):
    """A checkpoint that does not say what its logits are of."""
    data = {"dataset_name": str(room / f"{CLASSES}.jsonl"), "max_rows": 5, "model_name_or_path": str(room / "model")}
    for problem, columns in ((MULTI_LABEL, ["labels", "scores"]), (REGRESSION, ["scores"])):
        folder = tmp_path / problem
        run("run_predict", output_dir=str(folder), problem_type=problem, **data)
        read = datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train",
                                     cache_dir=str(tmp_path / "cache"))  # fmt: skip
        assert read.column_names == ["row", *columns]
    with pytest.raises(SystemExit, match=r"problem_type \('ranking'\) must be one of regression"):
        run("run_predict", output_dir=str(tmp_path / "none"), problem_type="ranking", **data)


@pytest.mark.parametrize("problem", [REGRESSION, MULTI_LABEL])
def test_run_explain_shows_both(room, trained, problem, run, tmp_path):
    data = {"dataset_name": str(room / f"{problem}.jsonl"), "inputs": 4, "output_dir": str(tmp_path / "seen")}
    run("run_explain", model_name_or_path=str(trained(problem) / "model"), **data)
    page = (tmp_path / "seen" / "explain.html").read_text()
    labels = {str(FORMS[REGRESSION](n)) for n in range(51)} | {", ".join(FORMS[MULTI_LABEL](n)) for n in range(51)}
    assert page.count("<article") == 4 and any(f">{label}<" in page for label in labels if label)


@pytest.mark.parametrize("problem, metric", [(REGRESSION, "Pearson's r"), (MULTI_LABEL, "micro F1")])
def test_run_plan_searches_and_holds_back(room, trained, problem, metric, run, tmp_path):
    data = {"dataset_name": str(room / f"{problem}.jsonl"), "target_macs": 0.6, "max_inputs": 12, "batch_size": 12}
    out = tmp_path / "planned"
    source = {"model_name_or_path": str(trained(problem) / "model"), "output_dir": str(out), "device": "cpu"}
    said = run("run_plan", how="search", held_back=20, **source, **data)
    assert f"| pruning | of the MACs | {metric} | difference [95 %] |" in said and "accuracy" not in said
    rows = json.loads((out / "plan.json").read_text())["held_back"]
    nothing = next(row for row in rows if row["pruning"] == "nothing")
    assert nothing["divergence"] == pytest.approx(0, abs=1e-6) and all(row["divergence"] >= -1e-6 for row in rows)
    assert {row["metric"] for row in rows} == {JUDGEMENTS[problem].names[0]}


def compared(room: Path, problem: str, folder: Path) -> dict[str, Any]:
    """What a comparison writes, of runs in this process."""
    start = given(room, problem, folder / "baseline", max_steps=4)
    baseline = str(folder / "baseline" / "model")
    taught = {"teacher_name_or_path": baseline, "distillation_weight": 1.0, "token_distillation_weight": 0.1}
    runs = {
        "baseline": start | {"pruning": None},
        "pruned": start | {"model_name_or_path": baseline, "budgets": [0.8]} | taught,
        "control": start | {"model_name_or_path": baseline, "pruning": None} | taught,
    }
    reports = {
        name: [finetune(*parsed(arguments | {"output_dir": str(folder / name)}))] for name, arguments in runs.items()
    }
    return {
        "quality": summarise(reports), "seeds": [42], "problem_type": problem,
        "machine": reports["pruned"][0]["machine"], "prunings": [reports["pruned"][0]["pruning"]],
    }  # fmt: skip


def use_is_as_it_says(card: str, problem: str) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    known: dict[str, Any] = {}
    exec(block, known)
    logits = known["outputs"].logits[0]
    if problem == REGRESSION:
        assert known["number"] == logits[0].item()
    else:
        names = known["model"].config.id2label
        assert known["labels"] == [names[i] for i in range(3) if logits[i] > 0]


@pytest.mark.parametrize("problem", [REGRESSION, MULTI_LABEL])
def test_a_card_has_the_metrics_of_its_problem(room, problem, tmp_path):
    evidence = json.loads(json.dumps(compared(room, problem, tmp_path)))
    rows = {row["run"]: scores_of(row) for row in evidence["quality"]}
    assert [score.metric for score in rows["pruned"]] == list(JUDGEMENTS[problem].names)
    for own, control in zip(rows["pruned"], rows["control"]):
        assert own.to_control == pytest.approx(own.value - control.value, abs=1e-9) and control.to_control == 0
        assert own.interval[0] <= own.to_control <= own.interval[1] and own.interval_to_baseline is not None
        assert control.interval == [0.0, 0.0]
    model, template = tmp_path / "pruned" / "model", ROOT / "model_cards" / "template.md"
    card = measured_card(ABOUT, evidence, recipe="r", picture="p.png", template=template, address=str(model))
    text, data = str(card), card.data
    assert "accuracy" not in text and not re.findall(r"Undefined|\bNone\b|\bnan\b", text.partition("## Use")[0])
    hub = {REGRESSION: ["pearsonr", "spearmanr", "mse"], MULTI_LABEL: ["f1", "exact_match"]}[problem]
    assert data.metrics == hub and data.eval_results[0].metric_type == hub[0]
    main = rows["pruned"][0]
    assert data.eval_results[0].metric_value == round(main.value, 4)
    title = main.words["title"]
    assert f"| {title} | {main.value:.4f} (seed 42) |" in text and f"{main.to_control:+.4f} in {title} (95 %" in text
    assert f"| 0.8 | {evidence['quality'][1]['at_budgets'][0][0]['mac_ratio_to_stock']:.3f} | " in text
    use_is_as_it_says(text, problem)
    bare = unmeasured_card(
        AutoModelForSequenceClassification.from_pretrained(model), title="t", base_model=None, license="mit",
        template=template, address=str(model),
    )  # fmt: skip
    use_is_as_it_says(str(bare), problem)
    assert quality_table(evidence["quality"]).splitlines()[0].startswith(f"| run | {title} | of each seed | to the con")
    (entry,) = evaluation_results(ABOUT, evidence)
    assert entry["value"] == round(main.value, 4) and title in entry["notes"]
    pytest.importorskip("matplotlib")
    assert comparison_picture(evidence, tmp_path / "p.png", title="t").stat().st_size > 1000


def test_a_regression_from_recipe_to_repository(room, tmp_path, run):
    """`run_comparison.py`, its timing and `run_push.py`, as a user runs them."""
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    data = {**TRAINED, "dataset_name": str(room / f"{REGRESSION}.csv"), "model_name_or_path": str(room / "model")}
    data["max_steps"] = 2
    files = {
        "baseline": data | {"pruning": None},
        "pruned": data | {"distillation_weight": 1.0},
        "controls": {"control": {"pruning": None}},
        "card": ABOUT,
    }
    for name, content in files.items():
        (recipe / f"{name}.yaml").write_text(yaml.safe_dump(content))
    asked = {
        "recipe": str(recipe),
        "output_dir": str(tmp_path / "out"),
        "seeds": [1],
        "timed_rounds": 3,
        "timed_inputs": 4,
    }
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(asked))
    command = [sys.executable, str(ROOT / "scripts" / "run_comparison.py"), str(tmp_path / "given.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| run | Pearson's r | of each seed | to the control [95 %] | Spearman's rho |" in done.stdout
    assert "accuracy" not in done.stdout
    log = (tmp_path / "out" / "seed-1" / "pruned" / "log.txt").read_text()
    assert log.count("is read as regression: numbers from 0 to 5") == 1
    evidence = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert evidence["problem_type"] == REGRESSION and evidence["speed"]["rows"]
    model = tmp_path / "out" / "seed-1" / "pruned" / "model"
    pushed = {"recipe": str(recipe), "evidence": str(tmp_path / "out" / "comparison.json")}
    run("run_push", model_name_or_path=str(model), stage_dir=str(tmp_path / "staged"), **pushed)
    card = (tmp_path / "staged" / "README.md").read_text()
    assert (
        "- pearsonr" in card
        and "A regression model that computes" in card
        and "accuracy" not in card.replace("accuracy_over_macs.png", "")
    )
    assert json.loads((tmp_path / "staged" / "config.json").read_text())["problem_type"] == REGRESSION
