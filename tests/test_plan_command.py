"""`run_plan.py` as a user runs it; what it writes is what `run_profile.py` takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from hf_tokenprune import PruningConfig
from hf_tokenprune.command_line import written_pruning


SCRIPT = Path(__file__).parents[1] / "scripts" / "run_plan.py"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("planned")
    tiny.save_text_model(folder / "model")
    rows = [json.dumps({"text": "w20 w9 " * (3 + i % 9), "label": "abc"[i % 3]}) + "\n" for i in range(60)]
    (folder / "data.jsonl").write_text("".join(rows))
    arguments = {"model_name_or_path": folder / "model", "dataset_name": folder / "data.jsonl", "device": "cpu"}
    return [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


def run(given: list[str], output: Path, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *given, "--output_dir", str(output), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("how", ["calibrate", "search"])
def test_a_target_becomes_a_pruning(given, tmp_path, how):
    done = run(given, tmp_path, "--how", how, "--target_macs", "0.6", "--max_inputs", "12", "--batch_size", "6")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "plan.json").read_text())
    assert done.stdout.startswith(report["verdict"]) and "0.6" in report["verdict"]
    pruning = PruningConfig.from_dict(written_pruning(str(tmp_path / "pruning.json"), None))
    assert pruning.to_dict() == report["pruning"] and pruning.protected_token_ids == (3,)
    assert (tmp_path / "front.png").exists() == (how == "search")


def test_a_mistake_is_one_sentence(given, tmp_path):
    done = run(given, tmp_path, "--how", "search")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "ValueError: target_macs (None) must be given to search"
