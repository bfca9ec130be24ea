"""A checkpoint alone is enough: everything here runs where the package cannot be imported."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from fresh import Finished, run_fresh

from hf_tokenprune import PruningConfig, prune
from hf_tokenprune.families import native_to_pruned


TOP_K = PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.5)
PRUNINGS = {"saved": TOP_K.to_dict(), "none": None, "name": "adaptive", "dict": {"preset": "top_k", "keep_rate": 0.7}}
# Without the families that this transformers is too old for, whose mark says so.
CASES, HEADS = ([case for case in table if not case.marks[0].args[0]] for table in (tiny.ALL, tiny.LEARNING_HEADS))
HUB_NAME = "someone/pruned-bert.v1"
STEPS = 3

# Loads every checkpoint with every Auto class, runs it under every pruning, trains the heads and saves them.
LOAD_AND_TRAIN = """
import transformers
from transformers import AutoConfig, Trainer, TrainingArguments

def outputs_of(model, inputs, prunings):
    outputs = {}
    for name, pruning in prunings.items():
        if name != "saved":
            model.set_pruning(pruning)
        with torch.no_grad():
            out = model(**inputs, output_token_trace=True)
        main = out["logits"] if "logits" in out else out["last_hidden_state"]
        outputs[name] = {"main": main, "counts": out.token_trace.counts, "source": out.token_trace.source}
    return outputs

outputs = {}
for name, folder, autos in ARGUMENTS["checkpoints"]:
    inputs = torch.load(f"{ARGUMENTS['inputs']}/{name.partition('.')[0]}.pt")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    RESULT[name] = {"AutoConfig": [type(config).__module__, type(config).__name__, config.pruning.to_dict()]}
    for auto in autos:
        model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
        RESULT[name][auto] = [type(model).__module__, type(model).__name__, model.config.pruning.to_dict()]
        outputs[f"{name} {auto}"] = outputs_of(model, inputs, ARGUMENTS["prunings"])
    other = getattr(transformers, autos[-1]).from_pretrained(folder, trust_remote_code=True, pruning="adaptive")
    RESULT[name]["asked for"] = other.config.pruning.preset_name
    if name.partition(".")[0] not in ARGUMENTS["learning"]:
        continue
    model = getattr(transformers, autos[-1]).from_pretrained(folder, trust_remote_code=True)
    size = len(next(iter(inputs.values())))
    rows = [{key: value[i] for key, value in inputs.items()} for i in range(size)]
    for i, row in enumerate(rows):
        row["labels"] = row["attention_mask"] if "Token" in name else torch.tensor(i % 3)
    trained = f"{ARGUMENTS['trained']}/{name}"
    arguments = TrainingArguments(trained + "-run", max_steps=ARGUMENTS["steps"], learning_rate=1e-2, use_cpu=True,
                                  save_steps=ARGUMENTS["steps"], report_to=[], disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(trained)
    outputs[f"{name} trained"] = outputs_of(model.eval(), inputs, {"saved": None})
torch.save(outputs, ARGUMENTS["outputs"])
"""

LOAD_AGAIN = """
import transformers

outputs = {}
for name, folder, auto in ARGUMENTS["checkpoints"]:
    inputs = torch.load(f"{ARGUMENTS['inputs']}/{name.partition('.')[0]}.pt")
    for kind in ("", f"-run/checkpoint-{ARGUMENTS['steps']}"):
        model = getattr(transformers, auto).from_pretrained(folder + kind, trust_remote_code=True)
        with torch.no_grad():
            out = model(**inputs, output_token_trace=True)
        outputs[name + kind] = {"main": out.logits, "counts": out.token_trace.counts, "source": out.token_trace.source}
torch.save(outputs, ARGUMENTS["outputs"])
"""


def auto_classes(case: tiny.Case) -> list[str]:
    """The Auto classes that a checkpoint of this class loads with; its own one last."""
    own = "AutoModel" + (str(case).partition("For")[1] + str(case).partition("For")[2]).removesuffix("WithTeacher")
    base = ["AutoModel", "AutoModelForTextEncoding"] if case.text else ["AutoModel"]
    return base if own == "AutoModel" else [*base, own]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module")
def loaded(home) -> Finished:
    """All checkpoints, loaded and trained in a process without the package."""
    (home / "inputs").mkdir()
    checkpoints = []
    for parameter in CASES:
        case = parameter.values[0]
        folder = home / f"{case}-v1.0"
        prune(tiny.build(case), TOP_K).save_pretrained(folder)
        torch.save(tiny.inputs_for(case), home / "inputs" / f"{case}.pt")
        checkpoints.append((str(case), str(folder), auto_classes(case)))
    # What a download leaves in the cache of the hub.
    name, folder, autos = next(entry for entry in checkpoints if entry[0] == str(HEADS[0].values[0]))
    cached = home / "one" / "hf_home" / "hub" / f"models--{HUB_NAME.replace('/', '--')}"
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    checkpoints.append((f"{name}.hub", HUB_NAME, autos))
    (home / "trained").mkdir()
    return run_fresh(
        LOAD_AND_TRAIN,
        home / "one",
        checkpoints=checkpoints,
        prunings=PRUNINGS,
        inputs=str(home / "inputs"),
        learning=[str(parameter.values[0]) for parameter in HEADS],
        trained=str(home / "trained"),
        outputs=str(home / "loaded.pt"),
        steps=STEPS,
    )


@pytest.fixture(scope="module")
def loaded_outputs(home, loaded) -> dict[str, Any]:
    return torch.load(home / "loaded.pt")


@pytest.fixture(scope="module")
def again(home, loaded) -> dict[str, Any]:
    """The outputs of the trained checkpoints, loaded in a second process without the package."""
    names = [str(parameter.values[0]) for parameter in HEADS] + [f"{HEADS[0].values[0]}.hub"]
    autos = [auto_classes(parameter.values[0])[-1] for parameter in [*HEADS, HEADS[0]]]
    checkpoints = [(name, str(home / "trained" / name), auto) for name, auto in zip(names, autos)]
    run_fresh(
        LOAD_AGAIN,
        home / "two",
        checkpoints=checkpoints,
        inputs=str(home / "inputs"),
        outputs=str(home / "again.pt"),
        steps=STEPS,
    )
    return torch.load(home / "again.pt")


def expected_outputs(model: transformers.PreTrainedModel, case: tiny.Case) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        out = model(**tiny.inputs_for(case), output_token_trace=True)
    return {"main": tiny.main_output(out), "counts": out.token_trace.counts, "source": out.token_trace.source}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(found["main"], expected["main"], rtol=0, atol=1e-6)
    assert torch.equal(found["counts"], expected["counts"])
    assert torch.equal(found["source"], expected["source"])


@pytest.mark.parametrize("case", CASES)
def test_every_auto_class_finds_its_class(case, loaded):
    cls = native_to_pruned()[case.native]
    base = cls.__name__.partition("For")[0].removesuffix("Model") + "Model"
    expected = dict.fromkeys(auto_classes(case), base)
    expected[auto_classes(case)[-1]] = cls.__name__
    expected["AutoConfig"] = cls.config_class.__name__
    found = dict(loaded.result[str(case)])
    assert found.pop("asked for") == "adaptive"
    assert {auto: name for auto, (_, name, _) in found.items()} == expected
    assert all(module.startswith("transformers_modules.") for module, _, _ in found.values())
    assert all(pruning == TOP_K.to_dict() for _, _, pruning in found.values())


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_local_model(case, loaded_outputs):
    for auto in auto_classes(case):
        own = auto == auto_classes(case)[-1]
        pruned = prune(tiny.build(case), TOP_K)
        pruned = pruned if own else pruned.base_model
        for name, pruning in PRUNINGS.items():
            pruned.set_pruning(pruning)
            expected = expected_outputs(pruned, case)
            assert_same(loaded_outputs[f"{case} {auto}"][name], expected)
        counts = {name: found["counts"].tolist() for name, found in loaded_outputs[f"{case} {auto}"].items()}
        assert counts["none"] == []
        assert sum(counts["saved"][-1]) < sum(counts["dict"][0])


@pytest.mark.parametrize("name", [*(str(parameter.values[0]) for parameter in HEADS), f"{HEADS[0].values[0]}.hub"])
def test_a_checkpoint_trained_without_the_package(name, home, again, loaded_outputs):
    case = next(parameter.values[0] for parameter in HEADS if str(parameter.values[0]) == name.partition(".")[0])
    before = prune(tiny.build(case), TOP_K)
    trained = loaded_outputs[f"{name} trained"]["saved"]
    assert (trained["main"] - expected_outputs(before, case)["main"]).abs().max() > 1e-3
    for folder in (home / "trained" / name, home / "trained" / f"{name}-run" / f"checkpoint-{STEPS}"):
        assert_same(again[str(folder.relative_to(home / "trained"))], trained)
        assert_same(expected_outputs(type(before).from_pretrained(folder), case), trained)
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == before.config.complete_auto_map
        assert config["pruning"] == TOP_K.to_dict()
        code = {path.name for path in folder.glob("*.py")}
        assert code == {path.name for path in (home / f"{case}-v1.0").glob("*.py")}


def test_nothing_is_missing_but_the_pooler_of_a_head(loaded):
    report = [
        line.partition("|") for line in loaded.printed.splitlines() if "MISSING " in line or "UNEXPECTED " in line
    ]
    classifiers = {"classifier", "cls_classifier", "distillation_classifier"}
    assert {key.rpartition(".")[0].strip() for key, _, _ in report} == {"pooler.dense", *classifiers}
    assert not any(key.startswith("pooler") for key, _, status in report if "UNEXPECTED" in status)
    assert "Traceback" not in loaded.printed
    assert "using a model of type" not in loaded.printed


LOAD_PICKLES = """
import transformers

for name, folder in ARGUMENTS["folders"].items():
    for auto in ("AutoModel", "AutoModelForSequenceClassification"):
        try:
            getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, **ARGUMENTS["wishes"][name])
        except (OSError, ValueError) as error:
            RESULT[f"{name} {auto}"] = str(error)
"""


def test_nothing_but_safetensors_is_read(tmp_path):
    case = HEADS[0].values[0]
    model = prune(tiny.build(case), TOP_K)
    rules = {
        "pickle": "must hold its weights as safetensors: TokenPruneBert",
        "asked for": r"use_safetensors (False) must be True: TokenPruneBert",
        "named": "transformers_weights ('adapter_model.bin') must be safetensors",
    }
    for name in rules:
        model.save_pretrained(tmp_path / name)
        file = "adapter_model.bin" if name == "named" else "pytorch_model.bin"
        torch.save(model.state_dict(), tmp_path / name / file)
        (tmp_path / name / "model.safetensors").unlink()
    config = json.loads((tmp_path / "named" / "config.json").read_text())
    (tmp_path / "named" / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    wishes = {name: {"use_safetensors": False} if name == "asked for" else {} for name in rules}
    folders = {name: str(tmp_path / name) for name in rules}
    said = run_fresh(LOAD_PICKLES, tmp_path / "stranger", folders=folders, wishes=wishes).result
    for name, rule in rules.items():
        for auto in ("AutoModel", "AutoModelForSequenceClassification"):
            assert rule in said[f"{name} {auto}"]
        with pytest.raises((OSError, ValueError), match=re.escape(rule)):
            type(model).from_pretrained(pretrained_model_name_or_path=folders[name], **wishes[name])
    with pytest.raises(ValueError, match=r"pytorch_model.bin' must be safetensors"):
        type(model).from_pretrained(tmp_path / "pickle" / "pytorch_model.bin", config=model.config)
    # What stays possible: the native class reads what it always read.
    native = tiny.build(case)
    torch.save(native.state_dict(), tmp_path / "pytorch_model.bin")
    native.config.save_pretrained(tmp_path)
    again = prune(type(native).from_pretrained(tmp_path), TOP_K)
    assert_same(expected_outputs(again, case), expected_outputs(model, case))
