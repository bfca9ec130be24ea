"""Checkpoints: stock ones load directly, ours come back as they were and go back to the stock classes."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Dinov2Config, Dinov2ForImageClassification, PreTrainedModel

import hf_tokenprune
from hf_tokenprune import PruningConfig, prune
from hf_tokenprune.families import FAMILIES, native_to_pruned


TOP_K = PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.5, min_tokens=2, execution="padded")
# New key -> the key that checkpoints of before transformers 5 have on disk.
_OLD_ATTENTION = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
_OLD_VIT = {
    "layers.": "encoder.layer.",
    **_OLD_ATTENTION,
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
OLD_KEYS = {
    "vit": _OLD_VIT,
    "deit": _OLD_VIT,
    "dinov2": _OLD_ATTENTION,
    "dinov2_with_registers": _OLD_ATTENTION,
    "bert": {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"},
}
FITTING = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForImageClassificationWithTeacher": "AutoModelForImageClassification",
    "Model": "AutoModel",
}


def build(case: tiny.Case) -> PreTrainedModel:
    """With a config of its own, since saving writes to it."""
    return tiny.build(tiny.Case(case.native, copy.deepcopy(case.config)))


def family(case: tiny.Case) -> Any:
    return next(family for family in FAMILIES.values() if case.native.__name__ in family.models)


def ours(case: tiny.Case) -> type[PreTrainedModel]:
    return native_to_pruned()[case.native]


def our_base(case: tiny.Case) -> type[PreTrainedModel]:
    return getattr(hf_tokenprune, family(case).config.replace("Config", "Model"))


def auto_classes(case: tiny.Case) -> dict[Any, type[PreTrainedModel]]:
    """The Auto classes that a checkpoint of this class loads with, and what they give."""
    found = {"AutoModel": our_base(case)}
    if case.text:
        found["AutoModelForTextEncoding"] = our_base(case)
    found |= {auto: ours(case) for suffix, auto in FITTING.items() if str(case).endswith(suffix)}
    return {getattr(transformers, name): cls for name, cls in found.items()}


@torch.no_grad()
def output(model: PreTrainedModel, case: tiny.Case) -> torch.Tensor:
    return tiny.main_output(model(**tiny.inputs_for(case)))


def classifiers(model: PreTrainedModel) -> set[str]:
    """The modules of a head that are not the base model's."""
    return {name for name, _ in model.named_children()} - {model.base_model_prefix, "dropout"}


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def assert_equal(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def assert_loaded(model: PreTrainedModel, info: dict[str, Any], native: PreTrainedModel) -> None:
    """Every weight arrived where it belongs."""
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    expected, found = native.state_dict(), model.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def write_old(native: PreTrainedModel, folder: Path) -> Path:
    """A stock checkpoint as older releases wrote it."""
    native.save_pretrained(folder)
    state = {}
    for name, tensor in native.state_dict().items():
        for new, old in OLD_KEYS[native.config.model_type].items():
            name = name.replace(new, old)
        state[name] = tensor.contiguous()
    assert set(state) != set(native.state_dict())
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def saved(case, tmp_path) -> Path:
    prune(build(case), TOP_K).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "pruning", [TOP_K, {"preset": "top_k", "keep_rate": 0.5}, "adaptive"], ids=["config", "dict", "name"]
)
@pytest.mark.parametrize("case", tiny.ALL)
def test_an_old_stock_checkpoint_loads_whole(case, pruning, tmp_path):
    native = build(case)
    folder = write_old(native, tmp_path / "old")
    model, info = ours(case).from_pretrained(folder, pruning=pruning, output_loading_info=True)

    assert_loaded(model, info, native)
    assert model.config.pruning == PruningConfig.coerce(pruning, tiny.LAYERS)
    assert_equal(output(model, case), output(prune(native, pruning), case))


@pytest.mark.parametrize("case", tiny.ALL)
def test_an_old_stock_checkpoint_goes_back_to_the_stock_class(case, tmp_path):
    native = build(case)
    folder = write_old(native, tmp_path / "old")
    ours(case).from_pretrained(folder, pruning=TOP_K).save_pretrained(tmp_path / "new")

    stock, info = case.native.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert_loaded(stock, info, native)
    assert_equal(output(stock, case), output(native, case))
    model, info = ours(case).from_pretrained(tmp_path / "new", output_loading_info=True)
    assert_loaded(model, info, native)
    assert model.config.pruning == TOP_K


@pytest.mark.skipif(not FAMILIES["DINOv2"].available, reason="needs a later transformers")
def test_old_swiglu_weights_are_taken_apart(tmp_path):
    config = Dinov2Config(**{**tiny.DINOV2.to_dict(), "use_swiglu_ffn": True})
    native = tiny.build(tiny.Case(Dinov2ForImageClassification, config))
    folder = write_old(native, tmp_path)
    state = load_file(folder / "model.safetensors")
    for layer in range(tiny.LAYERS):
        for kind in ("weight", "bias"):
            name = f"dinov2.encoder.layer.{layer}.mlp."
            parts = [state.pop(f"{name}{part}.{kind}") for part in ("gate_proj", "up_proj")]
            state[f"{name}weights_in.{kind}"] = torch.cat(parts)
            state[f"{name}weights_out.{kind}"] = state.pop(f"{name}down_proj.{kind}")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    model, info = hf_tokenprune.TokenPruneDinov2ForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert_loaded(model, info, native)


@pytest.mark.parametrize("case", tiny.HEADS)
def test_a_head_checkpoint_loads_into_the_base_model_and_back(case, tmp_path):
    head = build(case)
    base, info = our_base(case).from_pretrained(write_old(head, tmp_path / "head"), output_loading_info=True)
    assert {name.partition(".")[0] for name in info["missing_keys"]} <= {"pooler"}
    assert {name.partition(".")[0] for name in info["unexpected_keys"]} <= classifiers(head)
    inner = head.base_model.state_dict()
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in inner.items())

    base.save_pretrained(tmp_path / "base")
    model, info = ours(case).from_pretrained(tmp_path / "base", output_loading_info=True)
    assert {name.partition(".")[0] for name in info["missing_keys"]} == classifiers(head)
    assert {name.partition(".")[0] for name in info["unexpected_keys"]} <= {"pooler"}
    assert all(torch.equal(model.base_model.state_dict()[name], tensor) for name, tensor in inner.items())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(name.endswith("classifier") for name in classifiers(head))
    assert all(0 < model.get_submodule(name).weight.std() < 0.1 for name in classifiers(head))


@pytest.mark.parametrize("case", tiny.ALL)
def test_what_is_saved_comes_back(case, saved):
    pruned = prune(build(case), TOP_K)
    config = AutoConfig.from_pretrained(saved)
    assert type(config) is ours(case).config_class
    assert config.pruning == TOP_K
    for loader, expected in {ours(case): ours(case), **auto_classes(case)}.items():
        model, info = loader.from_pretrained(saved, output_loading_info=True)
        assert type(model) is expected
        assert model.config.pruning == TOP_K
        if type(model) is type(pruned):
            assert_loaded(model, info, pruned)
            assert_equal(output(model, case), output(pruned, case))
        else:
            inputs = tiny.inputs_for(case)
            assert_equal(model(**inputs).last_hidden_state, pruned.base_model(**inputs).last_hidden_state)


@pytest.mark.parametrize("case", tiny.ALL)
def test_stock_checkpoints_still_give_stock_models(case, tmp_path):
    build(case).save_pretrained(tmp_path)
    for loader, expected in auto_classes(case).items():
        stock = next(native for native, pruned in native_to_pruned().items() if pruned is expected)
        assert type(loader.from_pretrained(tmp_path)) is stock


@pytest.mark.parametrize("case", tiny.HEADS)
def test_fewer_layers_with_a_pruning_that_fits(case, saved):
    shallow = PruningConfig.preset("top_k", layers=[1])
    for asked in ({"num_hidden_layers": 2, "pruning": shallow}, {"pruning": shallow, "num_hidden_layers": 2}):
        model = ours(case).from_pretrained(saved, **asked)
        assert model.config.num_hidden_layers == 2
        assert model.config.pruning == shallow
    with pytest.raises(ValueError, match=r"layer \(2\) must be in \[0, 1\]"):
        ours(case).from_pretrained(saved, num_hidden_layers=2)


@pytest.mark.parametrize("case", tiny.ALL)
def test_the_files_of_a_checkpoint(case, saved):
    files = sorted(path.name for path in saved.rglob("*"))
    source = Path(hf_tokenprune.__file__).parent / "modeling"
    shared = [path.stem for path in source.glob("*.py") if not re.match("__init__|modeling_tokenprune_", path.name)]
    code = (source / f"{family(case).module}.py").read_text()
    others = [path.stem for path in source.glob("modeling_tokenprune_*.py") if f"from .{path.stem} import" in code]
    modules = [*shared, *others, family(case).module]
    assert files == sorted([*(f"{name}.py" for name in modules), "config.json", "model.safetensors"])
    for name in modules:
        assert (saved / f"{name}.py").read_bytes() == (source / f"{name}.py").read_bytes()


@pytest.mark.parametrize("case", tiny.ALL)
def test_the_config_of_a_checkpoint(case, saved):
    config = read_config(saved)
    module = family(case).module
    classes = {"AutoConfig": family(case).config, "AutoModel": our_base(case).__name__}
    if case.text:
        classes["AutoModelForTextEncoding"] = classes["AutoModel"]
    # Of several classes for an Auto class it is the one that was saved, and otherwise the first.
    for name in (*reversed(family(case).models.values()), ours(case).__name__):
        classes |= {auto: name for suffix, auto in FITTING.items() if name.endswith(suffix)}
    assert config["auto_map"] == {auto: f"{module}.{name}" for auto, name in classes.items()}
    assert config["architectures"] == [ours(case).__name__]
    assert config["pruning"] == TOP_K.to_dict() == json.loads(json.dumps(TOP_K.to_dict()))
    assert config["pruning"]["format_version"] == 1


@pytest.mark.parametrize("case", tiny.HEADS)
def test_no_pruning_is_saved_as_none(case, tmp_path):
    prune(build(case), None).save_pretrained(tmp_path)
    assert read_config(tmp_path)["pruning"] is None
    assert ours(case).from_pretrained(tmp_path).config.pruning is None
    assert ours(case).from_pretrained(tmp_path, pruning="top_k").config.pruning.preset_name == "top_k"


@pytest.mark.parametrize("case", tiny.HEADS)
def test_what_is_asked_for_beats_what_is_saved(case, saved):
    adaptive = PruningConfig.preset("adaptive", layers=[0])
    for loader in (ours(case), *auto_classes(case)):
        assert loader.from_pretrained(saved, pruning=adaptive).config.pruning == adaptive
        assert loader.from_pretrained(saved, pruning=adaptive.to_dict()).config.pruning == adaptive
        assert loader.from_pretrained(saved, pruning=None).config.pruning is None


@pytest.mark.parametrize("case", tiny.HEADS)
def test_a_second_save_is_the_same_as_the_first(case, saved, tmp_path):
    ours(case).from_pretrained(saved).save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again") == read_config(saved)
    for path in saved.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", tiny.ALL)
def test_half_precision_checkpoints(case, dtype, tmp_path):
    native = build(case).to(dtype)
    write_old(native, tmp_path)
    model, info = ours(case).from_pretrained(tmp_path, pruning=TOP_K, output_loading_info=True)
    assert_loaded(model, info, native)
    assert model.dtype == dtype

    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.inputs_for(case).items()}
    exact = build(case)
    model.set_pruning(None)
    there = inputs["attention_mask"].bool() if case.text and "Sequence" not in str(case) else ...
    with torch.no_grad():
        rounded, expected = tiny.main_output(model(**inputs)), output(exact, case)
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded.float()[there], expected[there], rtol=0, atol=0.1)
    assert ours(case).from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("case", tiny.HEADS)
def test_sharded_checkpoints(case, tmp_path):
    pruned = prune(build(case), TOP_K)
    pruned.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not list(tmp_path.glob("*.bin")) and not (tmp_path / "model.safetensors").exists()
    model, info = ours(case).from_pretrained(tmp_path, output_loading_info=True)
    assert_loaded(model, info, pruned)


BROKEN = {
    "unknown rule": (lambda p: p["stages"][0].update(rule="lottery"), "unknown rule 'lottery'"),
    "unknown saliency": (lambda p: p["stages"][0].update(saliency="stars"), "unknown saliency 'stars'"),
    "unknown field": (lambda p: p.update(colour="red"), "unknown field 'colour'"),
    "unknown execution": (lambda p: p.update(execution="fast"), "unknown execution 'fast'"),
    "stages of a wrong type": (lambda p: p.update(stages=3), r"stages \(3\)"),
    "stage of a wrong type": (lambda p: p.update(stages=["top_k"]), r"a stage \('top_k'\)"),
    "layers of a wrong type": (lambda p: p["stages"][0].update(layers="12"), r"layers \('12'\)"),
    "a value of a wrong type": (lambda p: p["stages"][0].update(values=["0.5", 0.2]), r"keep_rate \('0.5'\)"),
    "too few values": (lambda p: p["stages"][0].update(values=[0.5]), "one per layer"),
    "rising values": (lambda p: p["stages"][0].update(values=[0.5, 0.6]), "must not rise"),
    "layer out of range": (lambda p: p["stages"][0].update(layers=[1, 4]), r"layer \(4\) must be in \[0, 3\]"),
    "missing layers": (lambda p: p["stages"][0].pop("layers"), "must have 'layers'"),
    "missing format_version": (lambda p: p.pop("format_version"), r"format_version \(None\)"),
    "later format_version": (lambda p: p.update(format_version=2), r"format_version \(2\) .* must be 1"),
    "null ids": (lambda p: p.update(protected_token_ids=None), r"protected_token_ids \(None\)"),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("case", [tiny.HEADS[0], tiny.HEADS[2]])
def test_a_broken_pruning_on_disk_is_refused(case, saved, broken):
    change, words = BROKEN[broken]
    config = read_config(saved)
    change(config["pruning"])
    (saved / "config.json").write_text(json.dumps(config))
    for loader in (ours(case), ours(case).config_class, AutoConfig, *auto_classes(case)):
        with pytest.raises(ValueError, match=words):
            loader.from_pretrained(saved)


@pytest.mark.parametrize("value", [3, [1], True, "lottery", {}, {"preset": "lottery"}, {"preset": "top_k", "rate": 1}])
def test_a_pruning_of_a_wrong_type_on_disk_is_refused(value, tmp_path):
    case = tiny.HEADS[0].values[0]
    prune(build(case), TOP_K).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**read_config(tmp_path), "pruning": value}))
    with pytest.raises(ValueError, match=r"pruning \(|unknown preset|no hyper-parameter"):
        ours(case).from_pretrained(tmp_path)
