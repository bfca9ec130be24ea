"""Adapters of a pruned model: saved and loaded by every way, pruned again, or a sentence that says what is loaded."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from fresh import run_fresh
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)

from hf_tokenprune import PruningConfig, prune


peft = pytest.importorskip("peft")

TOP_K = PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.5)
OTHER = PruningConfig.preset("top_k", layers=[1], keep_rate=0.5)
CASE = tiny.Case(BertForSequenceClassification, tiny.BERT)
INPUTS = tiny.inputs_for(CASE)
NAMES_AN_UNPRUNED_BASE = "this adapter names '.*native' as its base, where no such pruning is"


@torch.no_grad()
def says(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(**INPUTS).logits


def lora(**settings: object) -> peft.LoraConfig:
    """Changes the output from the start."""
    given = {
        "r": 2,
        "target_modules": ["query", "dense"],
        "init_lora_weights": False,
        "modules_to_save": ["classifier"],
    }
    return peft.LoraConfig(**{**given, **settings})


@pytest.fixture
def native(tmp_path) -> Path:
    tiny.build(CASE).save_pretrained(tmp_path / "native")
    return tmp_path / "native"


def load_native(folder: Path) -> PreTrainedModel:
    return BertForSequenceClassification.from_pretrained(folder)


@pytest.fixture
def pruned(native, tmp_path) -> Path:
    prune(load_native(native), TOP_K).save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def silently(save: object, *arguments: object) -> None:
    with warnings.catch_warnings():
        for start in ("this adapter names", r"\w+ is saved with adapters inside", "whether"):
            warnings.filterwarnings("error", start)
        save(*arguments)


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_an_adapter_of_a_saved_pruned_model_comes_back_pruned(task, pruned, tmp_path):
    model = peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(pruned), lora(task_type=task))
    expected, folder = says(model), tmp_path / "adapter"
    silently(model.save_pretrained, folder)
    if task:
        again = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder)
    else:
        again = peft.AutoPeftModel.from_pretrained(folder, import_allowlist=["hf_tokenprune"])
    assert again.get_base_model().config.pruning == TOP_K
    torch.testing.assert_close(says(again), expected, rtol=0, atol=1e-6)
    again.get_base_model().set_pruning(None)
    assert not torch.equal(says(again), expected)

    merged = model.merge_and_unload()
    silently(merged.save_pretrained, tmp_path / "merged")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert whole.config.pruning == TOP_K
    torch.testing.assert_close(says(whole), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_an_adapter_of_a_model_pruned_in_memory_says_how_it_is_loaded(task, native, tmp_path):
    model = peft.get_peft_model(prune(load_native(native), TOP_K), lora(task_type=task))
    expected = says(model)
    with pytest.warns(UserWarning, match=NAMES_AN_UNPRUNED_BASE) as said:
        model.save_pretrained(tmp_path / "adapter")
    assert "PeftModel.from_pretrained(prune(base, pruning), folder)" in str(said[0].message)
    kept = json.loads(json.dumps(model.config.pruning.to_dict()))
    again = peft.PeftModel.from_pretrained(prune(load_native(native), kept), tmp_path / "adapter")
    torch.testing.assert_close(says(again), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", ["set_pruning", "at_loading", "moved"])
def test_what_is_named_must_have_the_very_pruning(change, pruned, tmp_path):
    asked = {"pruning": OTHER} if change == "at_loading" else {}
    base = AutoModelForSequenceClassification.from_pretrained(pruned, **asked)
    model = peft.get_peft_model(base, lora(task_type="SEQ_CLS"))
    if change == "set_pruning":
        base.set_pruning(OTHER)
    elif change == "moved":
        shutil.move(pruned, tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="this adapter names '.*pruned' as its base, where no such pruning is"):
        model.save_pretrained(tmp_path / "adapter")
    base.set_pruning(None)  # nothing to lose
    silently(model.save_pretrained, tmp_path / "adapter")


def test_trainer_says_it_too(native, tmp_path):
    from test_held_inside import training

    model = peft.get_peft_model(prune(load_native(native), TOP_K), lora(task_type="SEQ_CLS"))
    with pytest.warns(UserWarning, match=NAMES_AN_UNPRUNED_BASE):
        training(model, tmp_path / "run").train()
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("made", ["before", "after"])
def test_adapters_that_transformers_adds_say_it_too(made, native, tmp_path):
    model = load_native(native)
    model = prune(model, TOP_K) if made == "after" else model
    model.add_adapter(lora(modules_to_save=None))
    model = prune(model, TOP_K) if made == "before" else model
    expected, folder = says(model), tmp_path / "adapter"
    with pytest.warns(UserWarning, match=NAMES_AN_UNPRUNED_BASE):
        model.save_pretrained(folder)
    assert [path.name for path in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
    again = prune(load_native(native), TOP_K)
    again.load_adapter(str(folder))
    torch.testing.assert_close(says(again), expected, rtol=0, atol=1e-6)
    model.disable_adapters()
    torch.testing.assert_close(says(model), says(prune(load_native(native), TOP_K)), rtol=0, atol=1e-6)


def test_adapters_that_transformers_adds_to_a_saved_pruned_model_come_back_pruned(pruned, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(pruned)
    model.add_adapter(lora(modules_to_save=None))
    expected, folder = says(model), tmp_path / "adapter"
    silently(model.save_pretrained, folder)
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    assert again.config.pruning == TOP_K
    torch.testing.assert_close(says(again), expected, rtol=0, atol=1e-6)


def test_a_model_with_adapters_inside_says_that_nothing_builds_them(native, tmp_path):
    inside = peft.get_peft_model(load_native(native), lora()).get_base_model()
    model = prune(inside, TOP_K)
    with pytest.warns(UserWarning, match="saved with adapters inside, which from_pretrained does not build"):
        model.save_pretrained(tmp_path / "model")


def test_adapters_are_each_models_own(native):
    adapted = peft.get_peft_model(load_native(native), lora()).eval()
    model = prune(adapted.get_base_model(), None)
    expected = says(adapted)
    torch.testing.assert_close(says(model), expected, rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        torch.testing.assert_close(says(model), expected, rtol=0, atol=1e-5)
    with torch.no_grad():  # a parameter of both: one memory
        query = adapted.get_base_model().bert.encoder.layer[0].attention.self.query
        query.lora_B["default"].weight.mul_(2)
    torch.testing.assert_close(says(model), says(adapted), rtol=0, atol=1e-5)
    assert not torch.equal(says(model), expected)


def test_an_adapter_of_a_model_around_a_pruned_one_says_it(tmp_path):
    from test_held_inside import Fixed, Holder, holder

    model = holder(Holder)
    model.bert = prune(model.bert, TOP_K)
    with pytest.warns(UserWarning, match=r"this adapter names '.*' as its base, where no such pruning is"):
        peft.get_peft_model(model, lora(modules_to_save=["head"])).save_pretrained(tmp_path / "lost")
    model = holder(Fixed)
    silently(peft.get_peft_model(model, lora(modules_to_save=["head"])).save_pretrained, tmp_path / "kept")


def test_a_stranger_loads_it_pruned(pruned, tmp_path):
    model = peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(pruned), lora(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    torch.save(INPUTS, tmp_path / "inputs.pt")
    script = """
    from peft import AutoPeftModelForSequenceClassification, PeftModel
    from transformers import AutoModelForSequenceClassification

    inputs = torch.load(ARGUMENTS["inputs"])
    model = AutoPeftModelForSequenceClassification.from_pretrained(ARGUMENTS["adapter"], trust_remote_code=True).eval()
    RESULT["pruning"] = model.get_base_model().config.pruning.to_dict()
    with torch.no_grad():
        RESULT["logits"] = model(**inputs).logits.tolist()
    model.save_pretrained("again")
    model.get_base_model().set_pruning({"preset": "top_k", "layers": [1], "keep_rate": 0.5})
    model.save_pretrained("other")
    """
    paths = {"adapter": str(tmp_path / "adapter"), "inputs": str(tmp_path / "inputs.pt")}
    done = run_fresh(script, tmp_path / "fresh", **paths)
    assert PruningConfig.from_dict(done.result["pruning"]) == TOP_K
    torch.testing.assert_close(torch.tensor(done.result["logits"]), says(model), rtol=0, atol=1e-5)
    assert done.printed.count("where no such pruning is") == 1


def test_base_models_too(tmp_path):
    base = tiny.Case(BertModel, tiny.BERT)
    prune(tiny.build(base), TOP_K).save_pretrained(tmp_path / "pruned")
    model = AutoModel.from_pretrained(tmp_path / "pruned")
    model = peft.get_peft_model(model, lora(modules_to_save=None, task_type="FEATURE_EXTRACTION"))
    silently(model.save_pretrained, tmp_path / "adapter")
    again = peft.AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "adapter")
    assert again.get_base_model().config.pruning == TOP_K
