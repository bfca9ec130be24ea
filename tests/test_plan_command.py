"""`run_plan.py` as a user runs it; what it writes is what `run_profile.py` takes."""

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from hf_tokenprune import PruningConfig
from hf_tokenprune.command_line import written_pruning
from hf_tokenprune.planning import latency_curve
from hf_tokenprune.profiling import Timing, baselines, machine
from hf_tokenprune.profiling.arguments import ProfileArguments
from hf_tokenprune.profiling.subject import load_subject


SCRIPT = Path(__file__).parents[1] / "scripts" / "run_plan.py"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("planned")
    tiny.save_text_model(folder / "model")
    rows = [json.dumps({"text": "w20 w9 " * (3 + i % 9), "label": "abc"[i % 3]}) + "\n" for i in range(60)]
    (folder / "data.jsonl").write_text("".join(rows))
    arguments = {"model_name_or_path": folder / "model", "dataset_name": folder / "data.jsonl", "device": "cpu"}
    return [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def run(given, tmp_path, monkeypatch, capsys):
    def call(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given, "--output_dir", str(tmp_path), *more])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_what_cannot_be_held_back_is_said_before_anything_is_found(run, tmp_path, monkeypatch):
    folder = tmp_path / "regression"
    config = copy.deepcopy(tiny.BERT)
    config.num_labels = 1
    BertForSequenceClassification(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    monkeypatch.setattr("hf_tokenprune.calibrate", None)  # never come to
    with pytest.raises(SystemExit) as error:
        run("--model_name_or_path", str(folder), "--how", "calibrate", "--target_macs", "0.6", "--held_back", "20")
    assert "must have labels, and there are none: BertForSequenceClassification (num_labels 1" in error.value.code


@pytest.mark.parametrize("how", ["plan", "calibrate", "search"])
def test_a_target_becomes_a_pruning(run, tmp_path, how):
    given = ("--target_macs", "0.6", "--max_inputs", "24", "--batch_size", "12", "--held_back", "20")
    said = run("--how", how, *given)
    report = json.loads((tmp_path / "plan.json").read_text())
    assert said.startswith(report["verdict"]) and " of the MACs" in said
    pruning = PruningConfig.from_dict(written_pruning(str(tmp_path / "pruning.json"), None))
    assert pruning.to_dict() == report["pruning"] and pruning.protected_token_ids == (3,)
    assert (tmp_path / "front.png").exists() == (how == "search")
    costs = {row["pruning"]: row["macs_where_found"] for row in report["held_back"]}
    found, nothing = costs.pop(how), costs.pop("nothing")
    assert found < nothing < 1 and list(costs) == ["top_k at the usual sites"]
    assert abs(costs["top_k at the usual sites"] - found) <= 0.002, "compared at one cost"


def test_a_table_goes_with_its_model(run, tmp_path):
    given = ("--target_macs", "0.6", "--max_inputs", "12", "--held_back", "20", "--prior_share", "0.2")
    said = run("--how", "calibrate", "--layers", "1", "2", *given)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    report = json.loads((tmp_path / "plan.json").read_text())
    assert f"is {tmp_path / 'model'}." in said and model.config.pruning.to_dict() == report["pruning"]
    assert not model.base_model.prior_tables()[0].empty
    rows = {row["pruning"]: row for row in report["held_back"]}
    usual, own = "top_k at the usual sites", "top_k at [1, 2] by cls_attention"
    assert list(rows) == [usual, own, "calibrate", "nothing"]
    assert rows["calibrate"]["macs_where_found"] == pytest.approx(report["macs"])
    subject = load_subject(ProfileArguments(model_name_or_path=str(tmp_path / "model"), lengths=[32]), "cpu")
    assert torch.equal(subject.models["pruned"].base_model.prior_tables()[0].worth, model.bert.prior_tables()[0].worth)


def test_a_model_does_not_outlive_its_pruning(run, tmp_path):
    few, model = ("--max_inputs", "6", "--target_macs", "0.6"), tmp_path / "model"
    for own in ("--how", "calibrate"), ("--model_name_or_path", str(model)):
        run("--how", "calibrate", "--layers", "1", "2", "--prior_share", "0.2", *few)
        assert model.exists()
        run(*own, *few)
        assert model.exists() == (own[0] == "--model_name_or_path"), "what was planned for stays"


def test_a_speedup_is_measured_again_over_each_baseline(run, tmp_path, monkeypatch):
    def time_interleaved(calls: dict, **_: object) -> dict[object, Timing]:
        return {name: Timing((2.0 if name == "stock" else 0.4 + name,) * 3) for name in calls}

    monkeypatch.setenv("HF_TOKENPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(latency_curve, "time_interleaved", time_interleaved)  # planned by this, measured by the clock
    said = run("--target_speedup", "1.5", "--max_inputs", "12", "--batch_size", "6", "--rounds", "3")
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["met"] and report["speedup"] == 1.5
    rows = {row["model"]: row for row in report["measured"]}
    assert list(rows) == ["padded", "unpadded", "pruned"]
    for name, row in rows.items():
        low, high = row["quartiles"]
        assert row["rounds"] == 3 and row["inputs"] == 6 and 0 < low <= row["milliseconds_per_input"] <= high
        for other, slower in rows.items():
            assert row[f"speedup_to_{other}"] * slower[f"speedup_to_{name}"] == pytest.approx(1.0)
            assert row[f"speedup_to_{other}_at_least"] <= row[f"speedup_to_{other}"]
    pruned = rows["pruned"]
    assert 0 < pruned["mac_ratio_to_unpadded"] < 1
    assert pruned["realised"] == pytest.approx(pruned["speedup_to_unpadded"] * pruned["mac_ratio_to_unpadded"])
    over = [pruned[f"speedup_to_{name}"] for name in ("unpadded", "padded")]
    assert "Measured: {:.2f}x over nothing pruned, {:.2f}x over the padded stock model.".format(*over) in said
    assert ("That misses the promised 1.50x." in said) == (over[0] < 0.9 * 1.5)


@pytest.mark.parametrize("speedup", [1.2, 1.4])
def test_a_promise_that_is_missed_is_said(run, tmp_path, monkeypatch, speedup):
    def time_interleaved(calls: dict, **_: object) -> dict[object, Timing]:
        known = {"unpadded": 1.0, "pruned": 1.0 / speedup}
        times = {name: 0.4 + name if isinstance(name, float) else known.get(name, 2.0) for name in calls}
        return {name: Timing((seconds,) * 3) for name, seconds in times.items()}

    monkeypatch.setenv("HF_TOKENPRUNE_CACHE", str(tmp_path))
    for module in (latency_curve, baselines):
        monkeypatch.setattr(module, "time_interleaved", time_interleaved)
    said = run("--target_speedup", "1.5", "--max_inputs", "12", "--batch_size", "6")
    assert f"Measured: {speedup:.2f}x over nothing pruned" in said
    assert ("That misses the promised 1.50x." in said) == (speedup < 1.35)


def test_a_calibration_that_misses_says_so(run, tmp_path):
    said = run("--how", "calibrate", "--target_macs", "0.05", "--max_inputs", "6")
    report = json.loads((tmp_path / "plan.json").read_text())
    assert not report["met"] and said.startswith("0.050 of the MACs cannot be met; the closest: 6 inputs cost 0.")


def test_where_nothing_is_to_be_pruned(run, tmp_path):
    assert "costs" in run("--target_macs", "1.0")
    assert PruningConfig.from_dict(json.loads((tmp_path / "pruning.json").read_text())) == PruningConfig()


MISTAKES = {
    "target": (["--how", "search"], "target_macs (None) must be given to search"),
    "device": (["--target_macs", "0.5", "--device", "fridge"], "device ('fridge') must be cpu or cuda"),
    "clock of calibrate": (
        ["--how", "calibrate", "--target_macs", "0.5", "--target_speedup", "1.5"],
        "target_speedup (1.5) goes with how plan alone, not calibrate",
    ),
    "clock of search": (
        ["--how", "search", "--target_latency", "0.5"],
        "target_latency (0.5) goes with how plan alone, not search",
    ),
    "layers of search": (
        ["--how", "search", "--target_macs", "0.5", "--layers", "1", "2"],
        "layers ([1, 2]) goes with how plan and calibrate alone, not search",
    ),
    "score of plan": (
        ["--target_macs", "0.5", "--saliency", "cls_value_norm"],
        "saliency ('cls_value_norm') goes with how calibrate alone, not plan",
    ),
    "relative plan": (
        ["--target_macs", "0.5", "--relative_to", "total"],
        "relative_to ('total') goes with how calibrate alone, not plan",
    ),
    "prior of plan": (
        ["--target_macs", "0.5", "--prior_share", "0.2"],
        "prior_share (0.2) goes with how calibrate alone, not plan",
    ),
    "prior of search": (
        ["--how", "search", "--target_macs", "0.5", "--prior_share", "0.2"],
        "prior_share (0.2) goes with how calibrate alone, not search",
    ),
    "no CUDA": (["--target_macs", "0.5", "--device", "cuda"], "device ('cuda') must be there, and torch finds no"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(run, tmp_path, monkeypatch, mistake):
    more, words = MISTAKES[mistake]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        run(*more)
    assert error.value.code.startswith(f"ValueError: {words}") and "\n" not in error.value.code
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_is_said_before_anything_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_tokenprune.profiling.subject.load_subject", None)  # never come to
    (tmp_path / "file").touch()
    for output in ("file", "file/folder"):
        with pytest.raises(SystemExit) as error:
            run("--target_macs", "0.6", "--output_dir", str(tmp_path / output))
        assert str(tmp_path / output) in error.value.code and "\n" not in error.value.code


def test_a_report_that_cannot_be_written_is_one_sentence(run, monkeypatch):
    def write_atomically(path: Path, _: bytes) -> None:
        raise OSError(f"no space left for {path.name}")

    monkeypatch.setattr("hf_tokenprune.files.write_atomically", write_atomically)
    with pytest.raises(SystemExit) as error:
        run("--target_macs", "0.6", "--max_inputs", "6")
    assert error.value.code == "OSError: no space left for plan.json"


def test_another_search_in_the_same_folder_is_told_what_to_do(run, tmp_path):
    run("--how", "search", "--target_macs", "1.0", "--max_inputs", "6")
    with pytest.raises(SystemExit) as error:
        run("--how", "search", "--target_macs", "1.0", "--max_inputs", "8")
    file = tmp_path / "points.json"
    assert error.value.code.startswith(f"ValueError: resume_from ({file}) must be of a search with the same model")
    assert error.value.code.endswith("remove the file or take another (of run_plan.py: another output_dir)")
    file.unlink()
    run("--how", "search", "--target_macs", "1.0", "--max_inputs", "8")


def test_data_without_rows_are_one_sentence(run, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(SystemExit) as error:
        run("--target_macs", "0.5", "--dataset_name", str(empty))
    assert error.value.code == f"ValueError: {empty} must have at least one row in every split"


def test_the_report_says_on_which_device(run, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "describe_machine", lambda *device: {"device": [str(each) for each in device]})
    run("--target_macs", "0.6", "--max_inputs", "6")
    assert json.loads((tmp_path / "plan.json").read_text())["where"] == {"device": ["cpu"], "dtype": "float32"}


@pytest.fixture
def unlabelled(tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join('{"text": "w20 w9 w4 w5"}\n' for _ in range(20)))
    return ["--dataset_name", str(tmp_path / "texts.jsonl"), "--target_macs", "0.6", "--max_inputs", "4"]


@pytest.mark.parametrize("how", ["plan", "calibrate"])
def test_a_target_takes_no_labels(run, tmp_path, unlabelled, how):
    run("--how", how, *unlabelled)
    assert json.loads((tmp_path / "pruning.json").read_text())["stages"]


@pytest.mark.parametrize("more", [["--how", "search"], ["--held_back", "4"]], ids=["search", "held_back"])
def test_what_takes_labels_says_so_before_it_looks_for_anything(run, tmp_path, unlabelled, more):
    with pytest.raises(SystemExit) as error:
        run(*unlabelled, *more)
    said = "search and held_back must have labels, and there are none: the data have no column 'label'"
    assert error.value.code == f"ValueError: {said}" and not (tmp_path / "plan.json").exists()
