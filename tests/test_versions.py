"""The code that travels with a checkpoint: what it may touch, and which versions of transformers it goes with."""

import ast
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from fresh import run_fresh
from packaging import version

import hf_tokenprune
from hf_tokenprune import prune
from hf_tokenprune.modeling.transformers_version import MINIMUM


FLOOR = sorted((Path(hf_tokenprune.__file__).parent / "modeling").glob("*.py"))
FREE = {
    *("collections.abc", "contextlib", "dataclasses", "decimal", "fractions", "functools", "itertools", "math"),
    *("numbers", "re", "types", "typing"),
}
# Of modules that reach further, what is used of them. A torch function of tensors needs no entry.
USED = {
    "collections": {"Counter"},
    "inspect": {"signature"},
    "operator": {"index"},
    "os": {"PathLike"},
    "os.path": {"exists"},
    "packaging": {"version"},
    "reprlib": {"Repr"},
    "sys": {"float_info", "_getframe"},  # whose weights are being collected
    "torch": {
        *(
            "BoolTensor",
            "Size",
            "Tensor",
            "random.fork_rng",
            "autocast",
            "autograd._profiler_enabled",
            "backends.cuda.matmul.fp32_precision",
        ),
        *("compiler.assume_constant_result", "compiler.is_compiling", "cuda.get_device_capability"),
        *("compiler.is_exporting", "device", "finfo", "func.functional_call", "inf", "is_autocast_enabled"),
        *("is_grad_enabled", "jit.is_tracing", "linalg.vector_norm", "nan", "nn", "no_grad"),
        *("ops.aten._flash_attention_forward", "set_grad_enabled", "sym_max", "sym_min", "version.cuda"),
    },
    "torch.nn.attention.varlen": {"varlen_attn"},
    "torch.profiler": {"record_function"},
    "torch.utils._python_dispatch": {"is_in_torch_dispatch_mode"},
    "transformers": {"__version__", "initialization"},
    "transformers.conversion_mapping": {
        "get_checkpoint_conversion_mapping",
        "register_checkpoint_conversion_mapping",
    },
    "transformers.masking_utils": {"ALL_MASK_ATTENTION_FUNCTIONS", "create_bidirectional_mask"},
    # load_state_dict: of safetensors, as from_pretrained does next
    "transformers.modeling_utils": {"ALL_ATTENTION_FUNCTIONS", "load_state_dict"},
    "transformers.processing_utils": {"Unpack"},
    "transformers.utils": {"ModelOutput", "TransformersKwargs", "logging"},
    "transformers.utils.generic": {"can_return_tuple"},
    "transformers.utils.output_capturing": {"selected_hidden_states"},  # from 5.20; asked for within a try
    "warnings": {"warn"},
    "transformers.utils.hub": {"ModelCard"},  # where a model publishes itself, and there alone
}
REACH_OUT = {
    *("__builtins__", "__import__", "__loader__", "breakpoint", "compile", "eval", "exec", "globals", "help"),
    *("locals", "open"),
}
OTHER = os.environ.get("HF_TOKENPRUNE_OTHER_PYTHON")
PRUNING = {"preset": "top_k", "layers": [0, 1], "keep_rate": 0.6}


def is_allowed(module: str, name: str) -> bool:
    """Whether the floor may use this name of this module."""
    if module in FREE or name in USED.get(module, ()):
        return True
    if module == "torch":
        plain = hasattr(torch._C._VariableFunctions, name) or isinstance(getattr(torch, name, None), torch.dtype)
        return plain and name != "from_file"
    if module == "transformers":
        thing = getattr(transformers, name, None)
        return isinstance(thing, type) and issubclass(thing, torch.nn.Module | transformers.PreTrainedConfig)
    return module == "transformers.modeling_outputs" or re.fullmatch(r"transformers\.models\.\w+\.modeling_\w+", module)


def dotted(node: ast.AST) -> str:
    """`a.b.c` as it stands there, and nothing for what is no such name."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def forbidden(code: str) -> list[str]:
    """What a file of the floor uses that it may not: names, imported or reached through a module, and builtins."""
    nodes = list(ast.walk(ast.parse(code)))
    roots = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found = [f"import {name}" for name in roots if name not in FREE and name not in USED]
    inner = {node.value for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names if not is_allowed(node.module, alias.name)]
        if isinstance(node, ast.Name) and (node.id in REACH_OUT or (node.id in roots and node not in inner)):
            found.append(node.id)  # a module as a value could be asked for anything
        module, _, name = dotted(node).partition(".")
        if name and module in roots:
            ways = {".".join(name.split(".")[: i + 1]) for i in range(name.count(".") + 1)}
            on_the_way = any(used.startswith(f"{name}.") for used in USED.get(module, ()))
            if not on_the_way and not any(is_allowed(module, way) for way in ways):
                found.append(f"{module}.{name}")
    return found


@pytest.mark.parametrize("path", FLOOR, ids=lambda path: path.stem)
def test_the_floor_uses_nothing_that_opens_anything(path):
    assert not forbidden(path.read_text())


@pytest.mark.parametrize(
    "code",
    [
        "from pathlib import Path",
        "import os\nos.system('a')",
        "import subprocess",
        "import urllib.request",
        "from os import system",
        "import torch\ntorch.hub.load('a', 'b')",
        "import torch\ntorch.load('a')",
        "import torch\ntorch.from_file('a')",
        "import torch\ntorch.jit.load('a')",
        "import torch\ngetattr(torch, 'load')('a')",
        "import sys\nsys.modules['os'].system('a')",
        "import inspect\ninspect.getsource(f)",
        "import transformers\ntransformers.AutoModel",
        "from transformers import AutoModel",
        "from transformers.utils.hub import cached_file",
        "open('a')",
        "f = open",
    ],
)
def test_what_opens_something_is_found(code):
    assert forbidden(code)


FORWARD = """
import transformers

events = []
watching = False

def watch(event, arguments):
    if watching and event.startswith(("open", "socket.", "subprocess.", "os.", "shutil.", "urllib.", "ctypes.dlopen")):
        events.append(f"{event} {arguments}")

sys.addaudithook(watch)
for place in ARGUMENTS["places"]:
    model = transformers.AutoModel.from_pretrained(place, trust_remote_code=True).eval()
    inputs = torch.load(f"{place}/inputs.pt")
    for pruning in ARGUMENTS["prunings"]:
        watching = True
        model.set_pruning(pruning)
        with torch.no_grad():
            model(**inputs, output_token_trace=True, output_hidden_states=True)
        watching = False
watching = True
open(f"{ARGUMENTS['places'][0]}/config.json").close()
watching = False
RESULT["events"] = events
"""


def test_a_forward_opens_nothing(tmp_path):
    places = []
    for case in [case for case in tiny.cases(tiny.BASES) if str(case) in ("BertModel", "ViTModel")]:
        prune(tiny.build(case), PRUNING).save_pretrained(tmp_path / str(case))
        torch.save(tiny.inputs_for(case), tmp_path / str(case) / "inputs.pt")
        places.append(str(tmp_path / str(case)))
    prunings = [PRUNING, {"preset": "tome", "r": 2}, {"preset": "evit", "layers": [1], "keep_rate": 0.6}, None]
    events = run_fresh(FORWARD, tmp_path / "stranger", places=places, prunings=prunings).result["events"]
    assert len(events) == 1 and "config.json" in events[0], events  # the one that shows that the hook listens


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


LATER = """
from transformers import AutoConfig, AutoModel
for auto in (AutoConfig, AutoModel):
    try:
        auto.from_pretrained(ARGUMENTS["place"], trust_remote_code=True)
    except ImportError as error:
        RESULT[auto.__name__] = str(error)
"""


@pytest.mark.skipif(version.parse(transformers.__version__) >= version.parse("5.18"), reason="has DINOv2's layout")
@pytest.mark.parametrize(
    "name, kind, title",
    [("Dinov2", "dinov2", "DINOv2"), ("Dinov2WithRegisters", "dinov2_with_registers", "DINOv2 with registers")],
    ids=["plain", "registers"],
)
def test_a_family_that_needs_a_later_transformers_says_so(name, kind, title, tmp_path):
    """The checkpoint is as a later transformers saves it."""
    for file in FLOOR:
        shutil.copy(file, tmp_path)
    module = f"modeling_tokenprune_{name.lower()}"
    kinds = {"AutoConfig": "Config", "AutoModel": "Model"}
    auto_map = {auto: f"{module}.TokenPrune{name}{end}" for auto, end in kinds.items()}
    config = {"model_type": f"tokenprune_{kind}", "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = run_fresh(LATER, tmp_path / "stranger", place=str(tmp_path)).result
    needed = f"token pruning of {title} needs transformers >= 5.18.0; this is {transformers.__version__}: pip install"
    assert set(said) == set(kinds) and all(needed in words for words in said.values())
    with pytest.raises(ImportError, match=re.escape(needed)):
        getattr(hf_tokenprune, f"TokenPrune{name}Model")


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
