"""The code that travels with a checkpoint: what it may touch, and which versions of transformers it goes with."""

import ast
import os
import sys
from pathlib import Path

import pytest
import tiny
import torch
from fresh import run_fresh

import hf_tokenprune
from hf_tokenprune import prune
from hf_tokenprune.modeling.transformers_version import MINIMUM


FLOOR = sorted((Path(hf_tokenprune.__file__).parent / "modeling").glob("*.py"))
ALLOWED = {"torch", "transformers", "packaging"} | (sys.stdlib_module_names - {"os", "io", "pathlib", "shutil"})
REACHES_OUT = {"subprocess", "socket", "http", "urllib", "ctypes", "pickle", "importlib", "tempfile", "multiprocessing"}
CALLS = {"open", "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.hub", "torch.compile"}
OTHER = os.environ.get("HF_TOKENPRUNE_OTHER_PYTHON")
PRUNING = {"preset": "top_k", "layers": [0, 1], "keep_rate": 0.6}


@pytest.mark.parametrize("path", FLOOR, ids=lambda path: path.stem)
def test_the_floor_opens_nothing(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            local = isinstance(node, ast.ImportFrom) and node.level == 1
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            roots = {name.partition(".")[0] for name in names}
            assert local or roots <= ALLOWED - REACHES_OUT, names
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in CALLS, ast.unparse(node)


TOO_OLD = """
import transformers
transformers.__version__ = "5.3.0"
from transformers import AutoConfig
try:
    AutoConfig.from_pretrained(ARGUMENTS["place"], trust_remote_code=True)
except ImportError as error:
    RESULT["said"] = str(error)
"""


def test_an_older_transformers_is_told_what_is_needed(tmp_path):
    prune(tiny.build(tiny.cases(tiny.HEADS)[0]), PRUNING).save_pretrained(tmp_path / "model")
    said = run_fresh(TOO_OLD, tmp_path / "stranger", place=str(tmp_path / "model")).result["said"]
    assert f"needs transformers >= {MINIMUM}; this is 5.3.0" in said


LOAD = """
import transformers

outputs = {}
for case, auto in ARGUMENTS["cases"]:
    model = getattr(transformers, auto).from_pretrained(f"{ARGUMENTS['place']}/{case}", trust_remote_code=True).eval()
    with torch.no_grad():
        out = model(**torch.load(f"{ARGUMENTS['place']}/{case}.pt"), output_token_trace=True)
    outputs[case] = [out["logits"] if "logits" in out else out.last_hidden_state, out.token_trace.counts]
torch.save(outputs, ARGUMENTS["outputs"])
RESULT["version"] = transformers.__version__
"""
SAVE = """
sys.meta_path.pop(0)  # this one has the package
import tiny
import transformers
from hf_tokenprune import prune

cases = {str(case): case for case in tiny.cases(tiny.ALL)}
outputs = {}
for name in ARGUMENTS["cases"]:
    model, inputs = prune(tiny.build(cases[name]), ARGUMENTS["pruning"]).eval(), tiny.inputs_for(cases[name])
    model.save_pretrained(f"{ARGUMENTS['place']}/{name}")
    torch.save(inputs, f"{ARGUMENTS['place']}/{name}.pt")
    with torch.no_grad():
        out = model(**inputs, output_token_trace=True)
    outputs[name] = [tiny.main_output(out), out.token_trace.counts]
torch.save(outputs, ARGUMENTS["outputs"])
RESULT["version"] = transformers.__version__
for name in [name for name in sys.modules if name.partition(".")[0] == "hf_tokenprune"]:
    del sys.modules[name]
"""


@pytest.mark.skipif(OTHER is None, reason="HF_TOKENPRUNE_OTHER_PYTHON names no other environment")
@pytest.mark.parametrize("way", ["there and here", "here and there"])
def test_a_checkpoint_of_one_version_loads_under_another(way, tmp_path):
    """In the other environment are the package and another transformers; families with a later floor are left out."""
    saver, loader = (OTHER, sys.executable) if way == "there and here" else (sys.executable, OTHER)
    cases = [str(case) for case in tiny.cases(tiny.ALL) if "Dinov2" not in str(case)]
    autos = ["AutoModel" + "".join(case.partition("For")[1:]).removesuffix("WithTeacher") for case in cases]
    own = {"PYTHONPATH": str(Path(tiny.__file__).parent)}
    saved = run_fresh(
        SAVE,
        tmp_path / "saver",
        python=saver,
        variables=own,
        cases=cases,
        pruning=PRUNING,
        place=str(tmp_path),
        outputs=str(tmp_path / "saved.pt"),
    )
    loaded = run_fresh(
        LOAD,
        tmp_path / "loader",
        python=loader,
        cases=list(zip(cases, autos)),
        place=str(tmp_path),
        outputs=str(tmp_path / "loaded.pt"),
    )
    assert saved.result["version"] != loaded.result["version"]
    before, after = (torch.load(tmp_path / f"{name}.pt") for name in ("saved", "loaded"))
    assert before.keys() == after.keys() == set(cases)
    for case in cases:
        torch.testing.assert_close(after[case][0], before[case][0], rtol=0, atol=1e-5)
        assert torch.equal(after[case][1], before[case][1])
