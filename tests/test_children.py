"""What a script starts ends with it, however it ends; and several processes know whether they are together."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import yaml

from hf_tokenprune.training import tied


ROOT = Path(__file__).parents[1]
COMPARISON, FINETUNE = (ROOT / "scripts" / f"run_{name}.py" for name in ("comparison", "finetune"))
PATIENCE = 240.0  # of a machine that does other things
LONG = {"max_steps": 10**6, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
PRUNING = '{"preset": "top_k", "layers": [1], "keep_rate": 0.5}'


def wait_for(what: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds:.0f} s")


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    tiny.save_text_model(tmp_path / "model")
    rows = [json.dumps({"text": f"w{5 + i % 2} w20", "label": "ab"[i % 2]}) + "\n" for i in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(rows))
    return {"dataset_name": str(tmp_path / "data.jsonl"), "model_name_or_path": str(tmp_path / "model")}


SLEEPS = "import pathlib, sys, time\npathlib.Path(sys.argv[1]).with_name('run.json').touch()\ntime.sleep(600)\n"
WITH_SLEEPERS = """
import pathlib, runpy, sys
comparison, sleeper, *sys.argv[1:] = sys.argv[1:]
known = runpy.run_path(comparison)
known["main"].__globals__["FINETUNE"] = pathlib.Path(sleeper)
known["main"]()
"""


def test_a_killed_comparison_takes_its_trainings_along(data, tmp_path):
    """The real training once, and what only sleeps where that does not matter."""
    (tmp_path / "recipe").mkdir()
    (tmp_path / "sleeper.py").write_text(SLEEPS)
    files = {"baseline": LONG | data, "pruned": LONG | data | {"pruning": PRUNING}}
    for name, content in (files | {"controls": {"control": {"pruning": None}}}).items():
        (tmp_path / "recipe" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    sleeping = ["-c", WITH_SLEEPERS, str(COMPARISON), str(tmp_path / "sleeper.py")]
    started = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        command = [sys.executable, *([str(COMPARISON)] if number == signal.SIGKILL else sleeping)]
        command += [
            "--recipe",
            str(tmp_path / "recipe"),
            "--seeds",
            "0",
            "1",
            "--output_dir",
            str(tmp_path / number.name),
        ]
        with open(tmp_path / f"{number.name}.txt", "w") as log:
            own = {"stdout": log, "stderr": log, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
            started[number] = subprocess.Popen(command, **own)
    below = []
    try:
        for number, comparison in started.items():
            wait_for((tmp_path / number.name / "seed-0" / "baseline" / "run.json").exists)
            (training,) = psutil.Process(comparison.pid).children()
            below.append(training)
            comparison.send_signal(number)
        for number, comparison in started.items():
            assert comparison.wait(60) == -number
        assert not psutil.wait_procs(below, timeout=60)[1]
        assert not list(tmp_path.glob("SIG*/seed-1/*/log.txt"))  # nothing else was begun
    finally:
        for process in [*below, *started.values()]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]]).wait()
"""
CHILD = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("tied", sys.argv[1])
tied = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tied)
if sys.argv[2] == "looks":
    tied._told_by_system, tied.EVERY = lambda: False, 0.1
tied.tie(os.getppid() if sys.argv[3] == "there" else 1 << 22)
open(sys.argv[4], "w").write(str(os.getpid()))
time.sleep(600)
"""


@pytest.mark.parametrize(
    "how", ["looks", pytest.param("is told", marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux tells"))]
)
def test_a_child_sees_that_its_parent_was_killed(how, tmp_path):
    written = tmp_path / "child"
    command = [sys.executable, "-c", PARENT, CHILD, tied.__file__, how, "there", str(written)]
    parent = subprocess.Popen(command)
    child = psutil.Process(int(wait_for(lambda: written.exists() and written.read_text())))
    assert child.is_running()
    parent.kill()
    parent.wait()
    child.wait(30)


def test_a_parent_that_was_killed_before_is_seen(tmp_path):
    command = [sys.executable, "-c", CHILD, tied.__file__, "looks", "gone", str(tmp_path / "child")]
    assert subprocess.run(command, timeout=60).returncode == 1 and not (tmp_path / "child").exists()


def test_a_script_that_is_tied_is_as_if_called(tmp_path):
    (tmp_path / "beside.py").write_text("name = 'beside'\n")
    (tmp_path / "data.py").write_text("name = 'own'\n")  # a name that this package has, too
    script = (
        "import sys, json, beside, data\nprint(json.dumps([sys.argv, __name__, beside.name, data.name]))\nsys.exit(7)\n"
    )
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, tied.__file__, str(os.getpid()), str(tmp_path / "script.py"), "a", "--b"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = [[str(tmp_path / "script.py"), "a", "--b"], "__main__", "beside", "own"]
    assert done.returncode == 7 and json.loads(done.stdout) == said


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc_per_node"],
        ["accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_processes_on_a_cpu_that_would_train_apart_are_told_so(launcher, data, tmp_path):
    given = LONG | data | {"max_steps": 1, "output_dir": str(tmp_path / "out"), "use_cpu": False}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    command = [sys.executable, "-m", *launcher, "2", str(FINETUNE), str(tmp_path / "recipe.yaml")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    said = "ValueError: use_cpu (False) must be true for 2 processes without an accelerator: each would train by itself"
    assert done.returncode != 0 and said in done.stderr and not (tmp_path / "out").exists()


def test_a_comparison_is_launched_once(tmp_path):
    command = [sys.executable, str(COMPARISON), "--recipe", str(ROOT / "recipes" / "minilm-reuters-r8")]
    environment = os.environ | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    given = [*command, "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(given, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    said = "ValueError: run_comparison.py was launched in 2 processes and must be one, which starts its own"
    assert done.returncode == 1 and said in done.stderr and not (tmp_path / "out").exists()
