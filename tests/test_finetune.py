"""`run_finetune.py` as a user runs it: from a file, killed and gone on with, and with mistakes."""

import json
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from transformers import HfArgumentParser, ViTForImageClassification

from hf_tokenprune import PruningConfig, TokenPruneTrainingArguments
from hf_tokenprune.command_line import parse_arguments
from hf_tokenprune.training.finetune import FinetuneArguments, alone_in, finetune, load_processor, load_splits
from hf_tokenprune.training.resuming import last_whole_checkpoint


SCRIPT = Path(__file__).parents[1] / "scripts" / "run_finetune.py"
PRUNING = {"preset": "adaptive", "layers": [1, 2], "threshold": 0.5}
PRUNING["objective"] = {"name": "budget", "target_macs": 0.65}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer, and texts whose class is in one word."""
    folder = tmp_path_factory.mktemp("room")
    tiny.save_text_model(folder / "model")
    chance, rows = random.Random(0), []
    for index in range(120):
        text = [f"w{chance.randrange(10, 50)}" for _ in range(chance.randrange(3, 28))]
        text[chance.randrange(len(text))] = f"w{4 + index % 3}"
        rows.append(json.dumps({"text": " ".join(text), "label": "abc"[index % 3]}) + "\n")
    (folder / "data.jsonl").write_text("".join(rows))
    return folder


def recipe(room: Path, output: Path, **changes: Any) -> Path:
    given = {
        "model_name_or_path": str(room / "model"),
        "dataset_name": str(room / "data.jsonl"),
        "output_dir": str(output),
        "pruning": json.dumps(PRUNING),
        "max_steps": 24,
        "per_device_train_batch_size": 8,
        "pruner_learning_rate": 0.1,
        "learning_rate": 1e-3,
        "final_temperature": 0.05,
        "save_strategy": "steps",
        "save_steps": 8,
        "logging_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(given | changes))
    return path


def run(path: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True, timeout=300)


def parse(path: Path) -> tuple[FinetuneArguments, TokenPruneTrainingArguments]:
    return HfArgumentParser([FinetuneArguments, TokenPruneTrainingArguments]).parse_yaml_file(path)


@pytest.fixture(scope="module")
def straight(room: Path) -> Path:
    done = run(recipe(room, room / "straight"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "at a MAC ratio of 0." in done.stdout
    return room / "straight"


def test_the_report_says_what_was_measured(straight):
    report = json.loads((straight / "report.json").read_text())
    right = [a == b for a, b in zip(report["predicted"], report["labels"], strict=True)]
    assert len(right) == 24 and report["test"]["test_accuracy"] == pytest.approx(sum(right) / 24)
    assert report["test"]["test_mac_ratio"] == pytest.approx(0.65, abs=0.05)  # 24 texts of their own
    assert {"torch", "transformers", "processor"} <= set(report["machine"])
    pruning = PruningConfig.from_dict(report["pruning"])
    assert pruning.objective is None and pruning.protected_token_ids == (3,)
    saved = json.loads((straight / "model" / "config.json").read_text())
    assert saved["pruning"] == report["pruning"]
    assert not any("token_mask" in name for name in load_file(straight / "model" / "model.safetensors"))


@pytest.mark.parametrize("step", [8, 16])  # in the soft and in the hard phase
def test_killed_and_gone_on_with(room, straight, step, tmp_path):
    path = recipe(room, tmp_path / "killed")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    mark, end = tmp_path / "killed" / f"checkpoint-{step}" / "trainer_state.json", time.monotonic() + 120
    while not mark.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert mark.exists()
    goes_on_as(path, straight)


def goes_on_as(path: Path, straight: Path) -> None:
    """A stopped run ends with the weights and the thresholds of one that was not stopped, from where it was stopped."""
    killed = path.with_suffix("")
    last = last_whole_checkpoint(killed)
    states = [] if last is None else [Path(last) / "trainer_state.json"]
    written = [state.stat().st_mtime_ns for state in states]
    finetune(*parse(path))
    assert [state.stat().st_mtime_ns for state in states] == written  # and not again from the start
    weights, expected = (load_file(f / "model" / "model.safetensors") for f in (killed, straight))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6, msg=name)
    # Trainer knows the last part alone: no time of the whole training is told.
    train = json.loads((killed / "report.json").read_text())["train"]
    assert last is None or (train["train_runtime"] is None and train["train_loss"] is None)
    pruning = [json.loads((f / "report.json").read_text())["pruning"] for f in (killed, straight)]
    assert pruning[0]["stages"][0]["values"] == pytest.approx(pruning[1]["stages"][0]["values"], abs=1e-6)


@pytest.mark.parametrize("torn", [[24], [8, 16, 24]], ids=str)
def test_killed_while_a_checkpoint_was_written(room, straight, torn, tmp_path):
    path = recipe(room, tmp_path / "killed")
    shutil.copytree(straight, tmp_path / "killed", ignore=shutil.ignore_patterns("model", "report.json"))
    (tmp_path / "killed" / "run.json").unlink()
    for step in torn:
        folder = tmp_path / "killed" / f"checkpoint-{step}"
        state = folder / "trainer_state.json"
        state.write_text(state.read_text()[: 10 * (step % 16)])  # broken off, or not begun
        (folder / "optimizer.pt").unlink()
    whole = [step for step in (8, 16, 24) if step not in torn]
    last = last_whole_checkpoint(tmp_path / "killed")
    assert last == (str(tmp_path / "killed" / f"checkpoint-{whole[-1]}") if whole else None)
    goes_on_as(path, straight)


@pytest.mark.parametrize("step", [8, 16])  # thresholds still rise, and rise no more
def test_a_run_whose_thresholds_were_moved_is_gone_on_with(room, step, tmp_path):
    pruning = {"preset": "adaptive", "layers": [1, 2], "threshold": [0.02, 0.04], "relative_to": "total"}
    changes = {"pruning": json.dumps({**pruning, "prior_threshold": 0.02}), "pruner_learning_rate": None}
    changes |= {"target_macs": 0.65, "keep_rate_warmup_end": 0.6, "distillation_weight": 1.0}
    changes |= {"teacher_name_or_path": str(room / "model"), "final_temperature": None}
    finetune(*parse(recipe(room, tmp_path / "straight", **changes)))
    path = recipe(room, tmp_path / "killed", **changes)
    later = [f"checkpoint-{other}" for other in (16, 24) if other > step]
    ignored = shutil.ignore_patterns("model", "report.json", *later)
    shutil.copytree(tmp_path / "straight", tmp_path / "killed", ignore=ignored)
    (tmp_path / "killed" / "run.json").unlink()
    assert last_whole_checkpoint(tmp_path / "killed") == str(tmp_path / "killed" / f"checkpoint-{step}")
    goes_on_as(path, tmp_path / "straight")


def test_started_once_more_it_keeps_what_it_measured(room, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "again")
    before = json.loads((straight / "report.json").read_text())
    finetune(*parse(recipe(room, tmp_path / "again")))
    report = json.loads((tmp_path / "again" / "report.json").read_text())
    assert report["train"] == before["train"] and report["predicted"] == before["predicted"]


def test_two_do_not_train_into_one_folder(room, tmp_path):
    path = recipe(room, tmp_path / "shared")
    with alone_in(tmp_path / "shared"):
        done = run(path)
        assert done.returncode == 1 and "another process is training into it" in done.stderr.splitlines()[-1]
        with pytest.raises(ValueError, match="another process is training into it"):
            finetune(*parse(path))
    assert {each.name for each in (tmp_path / "shared").iterdir()} <= {".lock"}


MISTAKES = {
    "pruning": ({"pruning": "top_q"}, "unknown preset 'top_q'"),
    "budget": ({"pruning": json.dumps({**PRUNING, "objective": {"name": "budget", "target_macs": 0.01}})}, "at least"),
    "samples": ({"max_test_samples": 0}, "max_test_samples (0) must be >= 1"),
    "held out": ({"held_out_samples": 96}, "held_out_samples (96) must be in [1, 95], of 96 to train on"),
    "batches apart": ({"eval_do_concat_batches": False}, "eval_do_concat_batches (False) must be True"),
    "batch by batch": ({"batch_eval_metrics": True}, "batch_eval_metrics (True) must be False"),
    "no logits": ({"prediction_loss_only": True}, "prediction_loss_only (True) must be False"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_before_training(room, mistake, tmp_path):
    changes, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=re.escape(words)):
        finetune(*parse(recipe(room, tmp_path / "wrong", **changes)))
    assert not list((tmp_path / "wrong").glob("checkpoint-*"))


def test_a_file_holds_numbers_and_mappings_as_yaml_has_them(monkeypatch, tmp_path):
    def read(name: str, text: str) -> tuple[FinetuneArguments, TokenPruneTrainingArguments]:
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / name)])
        return parse_arguments(FinetuneArguments, TokenPruneTrainingArguments)

    written = "use_cpu: true\nlearning_rate: 2e-5\nadam_epsilon: 1E-7\nconfig_overrides: {hidden_dropout_prob: 0}\n"
    arguments, training = read("a.yaml", written + "pruning:\n  preset: top_k\n  layers: [1]\n  keep_rate: .5e0\n")
    assert (training.learning_rate, training.adam_epsilon) == (2e-5, 1e-7)
    assert json.loads(arguments.pruning) == {"preset": "top_k", "layers": [1], "keep_rate": 0.5}
    assert json.loads(arguments.config_overrides) == {"hidden_dropout_prob": 0}
    arguments, _ = read("a.json", json.dumps({"use_cpu": True, "pruning": {"preset": "top_k"}}))
    assert arguments.pruning == '{"preset": "top_k"}'
    for text, words in (("use_gpu: true", "use_gpu"), ("", r"a.yaml \(None\) must hold a mapping")):
        with pytest.raises(ValueError, match=words):
            read("a.yaml", text)


@pytest.mark.parametrize("changes", [{"max_steps": 30}, {"final_temperature": 0.1}, {"max_length": 9}], ids=str)
def test_another_run_in_the_same_folder_is_refused(room, straight, changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"holds a run with {name} .*, now {value} is asked for"):
        finetune(*parse(recipe(room, straight, **changes)))


def test_a_finished_run_without_checkpoints_is_not_written_over(room, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "done", ignore=shutil.ignore_patterns("checkpoint-*"))
    path = recipe(room, tmp_path / "done", weight_decay=0.3, save_strategy="no")
    with pytest.raises(ValueError, match=r"holds a run with weight_decay 0.0, now 0.3 is asked for"):
        finetune(*parse(path))


def test_held_out_inputs_are_of_the_training_split_and_not_trained_on(room):
    given = FinetuneArguments(dataset_name=str(room / "data.jsonl"))
    usual, chosen, fewer = (
        load_splits(replace(given, **changes), seed=3)
        for changes in ({}, {"held_out_samples": 20}, {"held_out_samples": 20, "max_train_samples": 30})
    )
    assert chosen["test"]["text"] == usual["train"]["text"][-20:]
    assert chosen["train"]["text"] == usual["train"]["text"][:-20]
    assert fewer["test"]["text"] == chosen["test"]["text"] and len(fewer["train"]) == 30


def test_a_mistake_ends_the_command_with_one_sentence(room, straight):
    done = run(recipe(room, straight, pruning="top_k"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "holds a run with pruning" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("missing", [ImportError("No module named 'wandb'"), RuntimeError("requires tensorboard")])
def test_what_is_not_there_is_one_sentence(room, missing, monkeypatch, tmp_path):
    def fail(*given: Any) -> None:
        raise missing

    path = recipe(room, tmp_path / "out")
    monkeypatch.setattr("hf_tokenprune.training.finetune.make_trainer", fail)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(path)])
    with pytest.raises(SystemExit, match=str(missing)):
        runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize(
    "written, expected",
    [
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}}, {"size": (12, 12)}),
        (
            {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 28}, "do_center_crop": True},
            {"size": (12,), "crop_size": (12, 12)},
        ),
    ],
)
def test_a_processor_is_saved_with_the_size_that_was_asked_for(written, expected, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    load_processor(tmp_path, 12).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    found = {name: tuple(side for side in saved[name].values() if side is not None) for name in expected}
    assert found == expected
    assert load_processor(tmp_path, None).size == written["size"]


def test_images(tmp_path):
    tiny.build(tiny.Case(ViTForImageClassification, tiny.VIT)).save_pretrained(tmp_path / "model")
    size = {"height": 24, "width": 24}
    processor = json.dumps({"image_processor_type": "ViTImageProcessor", "size": size})
    (tmp_path / "model" / "preprocessor_config.json").write_text(processor)
    shades = np.random.default_rng(0).integers(0, 80, (40, 9, 9), dtype=np.uint8)
    shades[::2] += 150  # the class is how bright it is
    features = datasets.Features({"pic": datasets.Image(mode="L"), "label": datasets.Value("string")})
    rows = {"pic": list(shades), "label": ["light", "dark"] * 20}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "pics.parquet")
    given = {
        "image_column": "pic",
        "pruning": json.dumps({"preset": "top_k", "layers": [1], "keep_rate": 0.5}),
        "dataset_name": str(tmp_path / "pics.parquet"),
        "budgets": [0.7],
    }
    report = finetune(*parse(recipe(tmp_path, tmp_path / "out", **given)))
    assert report["test"]["test_accuracy"] == 1.0 and len(report["labels"]) == 8
    assert report["budgets"][0]["test_mac_ratio"] == pytest.approx(0.7, abs=0.02)
    assert report["test"]["test_gmacs"] > 0
    assert json.loads((tmp_path / "out" / "model" / "preprocessor_config.json").read_text())["size"] == size
