"""A recipe and its controls: what each run is called with, what their reports say, and the command on a tiny model."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from transformers import HfArgumentParser

from hf_tokenprune import PruningConfig, TokenPruneTrainingArguments
from hf_tokenprune.checkpoints import weights_digest
from hf_tokenprune.command_line import written_pruning
from hf_tokenprune.training.comparison import Recipe, summarise
from hf_tokenprune.training.finetune import FinetuneArguments


SCRIPT = Path(__file__).parents[1] / "scripts" / "run_comparison.py"
TRAINED = {"learning_rate": 1e-3, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 2}
PRUNED = {**TRAINED, "pruning": '{"preset": "top_k", "layers": [1], "keep_rate": 0.5}', "distillation_weight": 1.0}


def write_recipe(folder: Path, **changes: dict) -> Path:
    files = {"baseline": TRAINED, "pruned": PRUNED, "controls": {"control": {"pruning": None}}} | changes
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


def test_a_control_differs_in_what_it_names(tmp_path):
    controls = {"control": {"pruning": None}, "short": {"pruning": None, "max_length": 9, "distillation_weight": 0}}
    recipe = Recipe.read(write_recipe(tmp_path / "recipe", controls=controls))
    runs = {name: recipe.arguments(name, tmp_path / "seed-3", 3) for name in ("baseline", *recipe.others)}
    assert list(runs) == ["baseline", "pruned", "control", "short"]
    assert all(run["seed"] == 3 and Path(run["output_dir"]).name == name for name, run in runs.items())
    baseline = str(tmp_path / "seed-3" / "baseline" / "model")
    assert runs["pruned"]["model_name_or_path"] == runs["pruned"]["teacher_name_or_path"] == baseline
    place = {"output_dir": str(tmp_path / "seed-3" / "control"), "pruning": None}
    assert runs["control"] == runs["pruned"] | place
    assert "teacher_name_or_path" not in runs["short"] and runs["short"]["max_length"] == 9
    with pytest.raises(ValueError, match="must be given"):
        Recipe.read(write_recipe(tmp_path / "recipe", pruned=TRAINED))
    with pytest.raises(ValueError, match=r"control \(None\) in .* must be {pruning: null}"):
        Recipe.read(write_recipe(tmp_path / "recipe", pruned=PRUNED, controls={"a": {}}))


@pytest.mark.parametrize("name", ["baseline", "pruned", "padded", "padded, sorted by length", "unpadded", 86])
def test_a_control_takes_no_others_place(name, tmp_path):
    controls = {"control": {"pruning": None}, name: {"max_length": 9}}
    said = rf"{name!r} \({{'max_length': 9}}\) in .*controls.yaml must be a name other than baseline, pruned, padded"
    with pytest.raises(ValueError, match=said):
        Recipe.read(write_recipe(tmp_path / "recipe", controls=controls))


@pytest.mark.parametrize("changes", [None, [9], "max_length"])
def test_what_a_control_changes_is_a_mapping(changes, tmp_path):
    controls = {"control": {"pruning": None}, "short": changes}
    with pytest.raises(ValueError, match=rf"'short' \({re.escape(repr(changes))}\) in .*controls.yaml must hold a map"):
        Recipe.read(write_recipe(tmp_path / "recipe", controls=controls))


def test_a_recipe_holds_numbers_and_mappings_as_yaml_has_them(tmp_path):
    folder = write_recipe(tmp_path / "recipe")
    (folder / "pruned.yaml").write_text("learning_rate: 2e-5\npruning: {preset: top_k, keep_rate: 5E-1}\n")
    pruned = Recipe.read(folder).others["pruned"]
    assert pruned == {"learning_rate": 2e-5, "pruning": {"preset": "top_k", "keep_rate": 0.5}}
    (folder / "pruned.yaml").write_text("- pruning\n")
    with pytest.raises(ValueError, match=r"pruned.yaml \(\['pruning'\]\) must hold a mapping"):
        Recipe.read(folder)


def test_rows_are_over_seeds_and_paired():
    def report(predicted, gmacs, seed):
        accuracy = sum(a == b for a, b in zip(predicted, [0, 1, 1, 0])) / 4
        test = {"test_accuracy": accuracy, "test_gmacs": gmacs, "test_mac_ratio": gmacs / 4}
        return {
            "predicted": predicted,
            "labels": [0, 1, 1, 0],
            "test": test,
            "training": {"seed": seed},
            "train": {"train_runtime": 1.0},
        }

    control = [report([0, 1, 1, 1], 3.0, 0), report([0, 1, 1, 0], 3.0, 1)]
    pruned = [report([0, 1, 1, 0], 1.0, 0), report([0, 1, 0, 0], 2.0, 1)]
    row, same = summarise({"pruned": pruned, "control": control})
    assert row["accuracies"] == [100.0, 75.0] and row["points_to_control"] == 0.0
    assert row["interval"][0] < 0 < row["interval"][1] and same["interval"] == [0.0, 0.0]
    assert row["gmacs"] == 1.5 and row["mac_ratio_to_unpadded"] == 0.5
    control[0]["labels"] = [0, 0, 0, 0]
    with pytest.raises(ValueError, match="'pruned' must be tested on the inputs"):
        summarise({"pruned": pruned, "control": control})


def test_the_command(tmp_path):
    tiny.save_text_model(tmp_path / "model")
    rows = [json.dumps({"text": f"w{5 + i % 2} " + "w20 " * (i % 9), "label": "ab"[i % 2]}) + "\n" for i in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(rows))
    data = {"dataset_name": str(tmp_path / "data.jsonl"), "model_name_or_path": str(tmp_path / "model")}
    write_recipe(tmp_path / "recipe", baseline=TRAINED | data, pruned=PRUNED | data)
    given = {"recipe": str(tmp_path / "recipe"), "output_dir": str(tmp_path / "out"), "seeds": [4], "processes": 2}
    given["held_out_samples"] = 7
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(given | {"timed_rounds": 3, "timed_runs": ["control"]}))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "given.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    _, pruned, control = report["quality"]
    assert pruned["inputs"] == 7
    assert pruned["mac_ratio_to_unpadded"] < 0.9 and control["mac_ratio_to_unpadded"] == 1.0
    timed = {row["model"]: row for row in report["speed"]["rows"]}
    assert list(timed) == ["padded", "padded, sorted by length", "unpadded", "pruned", "control"]
    for row in (pruned, control):
        own = timed[row["run"]]
        assert own["mac_ratio_to_unpadded"] == pytest.approx(row["mac_ratio_to_unpadded"]) and own["realised"] > 0
    assert report["interpolated"] is False  # of images alone
    assert report["weights"] == [weights_digest(tmp_path / "out" / "seed-4" / "pruned" / "model")]
    assert ">=" not in done.stdout.split("| time |")[1]  # three rounds bound nothing
    assert done.stdout == (tmp_path / "out" / "comparison.md").read_text() and "| pruned | " in done.stdout
    report = tmp_path / "out" / "seed-4" / "pruned" / "report.json"
    before = report.stat().st_mtime_ns
    asked = [*command[:2], "--recipe", given["recipe"], "--output_dir", given["output_dir"], "--seeds", "4"]
    asked += ["--timed_inputs", "0"]
    again = subprocess.run([*asked, "--held_out_samples", "7"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and report.stat().st_mtime_ns == before  # what is done is not done again
    other = subprocess.run(asked, capture_output=True, text=True, timeout=300)
    assert other.returncode == 1 and "ValueError: held_out_samples (None) must be 7" in other.stderr


@pytest.mark.parametrize(
    "given, said",
    [
        ({"learnig_rate": 1e-4}, r"pruned of .* has 'learnig_rate', no run_finetune\.py argument"),
        ({"max_length": "long"}, r"max_length \('long'\) in pruned of .* must be int"),
    ],
    ids=["unknown", "type"],
)
def test_an_argument_that_cannot_be_is_said_before_any_run(given, said, tmp_path):
    recipe = str(write_recipe(tmp_path / "recipe", pruned=PRUNED | given))
    run_comparison = runpy.run_path(str(SCRIPT))
    with pytest.raises(ValueError, match=said):
        run_comparison["Comparison"](run_comparison["ComparisonArguments"](recipe, str(tmp_path)))


def test_runs_to_time_are_of_the_recipe(tmp_path):
    run_comparison = runpy.run_path(str(SCRIPT))
    recipe = str(write_recipe(tmp_path / "recipe"))
    for names in (["truncated"], ["pruned"], ["control", "control"]):
        arguments = run_comparison["ComparisonArguments"](recipe, str(tmp_path), timed_runs=names)
        with pytest.raises(ValueError, match=rf"timed_runs \('{names[0]}'\) must be, once, one of control"):
            run_comparison["Comparison"](arguments)


@pytest.mark.parametrize(("fails", "begun"), [("baseline", 1), ("pruned", 4)])
def test_after_a_failure_no_other_run_begins(fails, begun, tmp_path):
    run_comparison, runs = runpy.run_path(str(SCRIPT)), []
    arguments = run_comparison["ComparisonArguments"](str(write_recipe(tmp_path / "recipe")), str(tmp_path), [0, 1, 2])
    comparison = run_comparison["Comparison"](arguments)

    def finetune(name: str, seed: int) -> dict:
        runs.append((name, seed))
        if name == fails:
            raise RuntimeError(f"{name} of seed {seed} ended with 1")
        return {}

    comparison.finetune = finetune
    with pytest.raises(RuntimeError, match=f"{fails} of seed 0 ended with 1"):
        comparison.run()
    assert len(runs) == begun


def test_a_done_run_with_other_arguments_is_refused(tmp_path):
    run_comparison = runpy.run_path(str(SCRIPT))

    def check(folder: Path, seed: int = 4, **pruned: object) -> None:
        recipe = write_recipe(tmp_path / "recipe", pruned=PRUNED | pruned)
        arguments = run_comparison["ComparisonArguments"](str(recipe), str(folder), [seed])
        comparison = run_comparison["Comparison"](arguments)
        for name in ("baseline", "pruned", "control"):
            comparison.check_done(name, seed)

    recipe = Recipe.read(write_recipe(tmp_path / "recipe"))
    for name in ("baseline", *recipe.others):
        folder = tmp_path / "out" / "seed-4" / name
        folder.mkdir(parents=True)
        (folder / "arguments.yaml").write_text(yaml.safe_dump(recipe.arguments(name, folder.parent, 4)))
        (folder / "report.json").touch()
    check(tmp_path / "out")
    with pytest.raises(ValueError, match=r"max_steps \(3\) must be 2, as in .*pruned.*: take another output_dir"):
        check(tmp_path / "out", max_steps=3)
    with pytest.raises(ValueError, match=r"weight_decay \(0.1\) must be None"):
        check(tmp_path / "out", weight_decay=0.1)
    check(tmp_path / "out", pruning=json.loads(PRUNED["pruning"]))  # the same, as a file may hold it
    with pytest.raises(ValueError, match=r"pruning \({'preset': 'evit'}\) must be '{"):
        check(tmp_path / "out", pruning={"preset": "evit"})
    check(tmp_path / "out", seed=5, max_steps=3)  # nothing is done of that seed
    (tmp_path / "out").rename(tmp_path / "moved")
    check(tmp_path / "moved")


@pytest.mark.parametrize("folder", sorted((SCRIPT.parents[1] / "recipes").iterdir()), ids=lambda folder: folder.name)
def test_recipes_are_what_run_finetune_takes(folder, tmp_path):
    recipe = Recipe.read(folder)
    parser = HfArgumentParser([FinetuneArguments, TokenPruneTrainingArguments])
    for name in ("baseline", *recipe.others):
        arguments, training = parser.parse_dict(recipe.arguments(name, tmp_path, 0) | {"use_cpu": True})
        assert isinstance(training.learning_rate, float)
        if arguments.pruning is not None:
            PruningConfig.coerce(written_pruning(arguments.pruning, None), 6)
