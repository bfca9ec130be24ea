"""A pruned model inside another: saved and loaded as a whole, or a sentence that says what would be lost."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_model, save_file, save_model
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
)

from hf_tokenprune import PruningConfig, TokenPruneBertConfig, TokenPruneBertModel, prune


TOP_K = PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.5)
OTHER = PruningConfig.preset("top_k", layers=[1], keep_rate=0.5)
INPUTS = tiny.text_inputs([17, 5, 30])


class Pair(nn.Module):
    """Holds a base and what was pruned of it, in either order."""

    def __init__(self, order: str = "base pruned", seed: int = 0):
        super().__init__()
        base = tiny.build(tiny.Case(BertModel, tiny.BERT), seed=seed)
        parts = {"base": base, "pruned": prune(base, TOP_K), "other": prune(base, OTHER)}
        for name in order.split():
            setattr(self, name, parts[name])
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None):
        models = [each for each in self.children() if each is not self.head]
        logits = sum(self.head(each(input_ids, attention_mask).pooler_output) for each in models)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits} if labels is not None else logits


class PretrainedPair(PreTrainedModel):
    config_class = BertConfig
    _supports_sdpa = True

    def __init__(self, config: BertConfig, order: str = "base pruned"):
        super().__init__(config)
        base = BertModel(config)
        parts = {"base": base, "pruned": prune(base, TOP_K)}
        for name in order.split():
            setattr(self, name, parts[name])
        self.head = nn.Linear(32, 3)
        self.post_init()

    forward = Pair.forward


ORDERS = pytest.mark.parametrize("order", ["base pruned", "pruned base", "pruned other", "pruned base other"])


@torch.no_grad()
def says(model: nn.Module) -> torch.Tensor:
    out = model.eval()(**INPUTS)
    return out if isinstance(out, torch.Tensor) else out.logits if "logits" in out else out.pooler_output


@ORDERS
@pytest.mark.parametrize("way", ["save_model", "save_file", "torch"])
def test_a_module_that_holds_both_is_saved_and_loaded(order, way, tmp_path):
    model, fresh = Pair(order), Pair(order, seed=1)
    expected = says(model)
    assert (says(fresh) - expected).abs().max() > 1e-3
    if way == "torch":
        torch.save(model.state_dict(), tmp_path / "weights")
        fresh.load_state_dict(torch.load(tmp_path / "weights"))
    else:
        {"save_model": save_model, "save_file": lambda m, path: save_file(m.state_dict(), path)}[way](
            model, str(tmp_path / "weights")
        )
        load_model(fresh, str(tmp_path / "weights"))
    torch.testing.assert_close(says(fresh), expected, rtol=0, atol=0)
    shared = [dict(getattr(fresh, name).named_parameters()) for name in order.split()]
    assert len({part["encoder.layer.0.output.dense.weight"].data_ptr() for part in shared}) == 1


@pytest.mark.parametrize("order", ["base pruned", "pruned base"])
def test_a_pretrained_model_that_holds_both_is_saved_and_loaded(order, tmp_path):
    model = PretrainedPair(tiny.BERT, order)
    expected = says(model)
    model.save_pretrained(tmp_path)
    loaded, report = PretrainedPair.from_pretrained(tmp_path, order=order, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(says(loaded), expected, rtol=0, atol=0)
    assert loaded.pruned.config.pruning == TOP_K


def training(model: nn.Module, folder: Path) -> Trainer:
    arguments = TrainingArguments(str(folder), max_steps=2, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    rows = [{name: value[0] for name, value in INPUTS.items()} | {"labels": torch.tensor(1)}] * 16
    return Trainer(model, arguments, train_dataset=rows)


@pytest.mark.parametrize("kind", [Pair, lambda: PretrainedPair(tiny.BERT)], ids=["module", "pretrained"])
def test_trainer_saves_a_model_that_holds_both(kind, tmp_path):
    model = kind()
    training(model, tmp_path).train()
    fresh = kind()
    load_model(fresh, str(tmp_path / "checkpoint-2" / "model.safetensors"))
    torch.testing.assert_close(says(fresh), says(model), rtol=0, atol=0)


def test_weights_are_copied_where_a_holder_has_them_twice_alone():
    model = Pair("base pruned")
    weights = model.state_dict()
    ours, theirs = (weights[f"{name}.encoder.layer.0.output.dense.weight"] for name in ("pruned", "base"))
    assert ours.data_ptr() != theirs.data_ptr() and torch.equal(ours, theirs)
    one = Pair("pruned")
    kept = prune(one.pruned, None)  # somebody outside shares them, too
    assert one.state_dict()["pruned.embeddings.word_embeddings.weight"].data_ptr() == (
        kept.embeddings.word_embeddings.weight.data_ptr()
    )
    named = model.state_dict(keep_vars=True)
    assert named["pruned.pooler.dense.weight"] is model.pruned.pooler.dense.weight


class OwnHead(BertForSequenceClassification):
    """A user's subclass, with a head of its own."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.classifier = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, config.num_labels))
        self.post_init()


class Holder(PreTrainedModel):
    """A user's own model around a base model, whichever the subclass builds."""

    config_class = BertConfig
    base_model_prefix = "bert"
    _supports_sdpa = True

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = self.build(config)
        self.head = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def build(self, config: BertConfig) -> PreTrainedModel:
        return BertModel(config)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None):
        logits = self.head(self.bert(input_ids, attention_mask=attention_mask).pooler_output)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits} if labels is not None else logits


class Fixed(Holder):
    def build(self, config: BertConfig) -> PreTrainedModel:
        return prune(BertModel(config), TOP_K)


class Told(Holder):
    def build(self, config: BertConfig) -> PreTrainedModel:
        return prune(BertModel(config), getattr(config, "pruning", None))


class Ours(Holder):
    config_class = TokenPruneBertConfig

    def build(self, config: TokenPruneBertConfig) -> PreTrainedModel:
        return TokenPruneBertModel(config)


class NeedsMore(Holder):
    def __init__(self, config: BertConfig, more: int):
        super().__init__(config)
        self.more = more


def holder(kind: type, **arguments: object) -> PreTrainedModel:
    config = tiny.BERT
    if kind is Ours:
        config = TokenPruneBertConfig.from_native(tiny.BERT, TOP_K)
    return kind(copy.deepcopy(config), **arguments)


def put_pruned(kind: type, **arguments: object) -> PreTrainedModel:
    model = holder(kind, **arguments)
    model.bert = prune(model.bert, TOP_K)
    return model


@pytest.mark.parametrize("kind", [OwnHead, Holder, BertForSequenceClassification, BertForMaskedLM])
def test_what_would_come_back_unpruned_is_not_saved(kind, tmp_path):
    model = put_pruned(kind)
    with pytest.raises(
        ValueError, match=rf"{kind.__name__} would come back without the pruning of its 'bert'"
    ) as error:
        model.save_pretrained(tmp_path)
    assert "has BertModel there" in str(error.value)
    assert ("prune the whole model" in str(error.value)) == (kind is BertForSequenceClassification)
    assert not list(tmp_path.glob("*.safetensors"))
    torch.save(model.state_dict(), tmp_path / "weights.pt")  # nothing is lost
    expected = says(model)
    model.bert.set_pruning(None)
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    again.bert = prune(again.bert, TOP_K)
    torch.testing.assert_close(says(again), expected, rtol=0, atol=1e-6)


def test_trainer_says_so_at_its_first_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"OwnHead would come back without the pruning of its 'bert'"):
        training(put_pruned(OwnHead), tmp_path).train()


@pytest.mark.parametrize("way", ["save_pretrained", "trainer"])
@pytest.mark.parametrize("kind", [Fixed, Ours, Told])
def test_what_comes_back_pruned_is_saved(kind, way, tmp_path):
    model = holder(kind)
    if kind is Told:
        model.bert.set_pruning(TOP_K)
        model.config.pruning = model.bert.config.pruning.to_dict()
    if way == "trainer":
        training(model, tmp_path / "run").train()
        folder = tmp_path / "run" / "checkpoint-2"
    else:
        folder = tmp_path
        model.save_pretrained(folder)
    again = kind.from_pretrained(folder)
    assert again.bert.config.pruning == TOP_K
    torch.testing.assert_close(says(again), says(model), rtol=0, atol=0)
    assert (says(again) - says(unpruned(again))).abs().max() > 1e-4


def unpruned(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    model.bert.set_pruning(None)
    return model


@pytest.mark.parametrize("kind", [Fixed, Told])
def test_another_pruning_than_loading_builds_is_said(kind, tmp_path):
    model = holder(kind)
    model.bert.set_pruning(OTHER)
    with pytest.raises(ValueError, match="TokenPruneBertModel with another pruning there"):
        model.save_pretrained(tmp_path)


def test_a_pruning_that_is_switched_in_a_config_that_both_have_is_kept(tmp_path):
    model = holder(Ours)
    model.bert.set_pruning(OTHER)
    model.save_pretrained(tmp_path)
    assert Ours.from_pretrained(tmp_path).bert.config.pruning == OTHER


def test_what_cannot_be_checked_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"NeedsMore comes back with the pruning of its 'bert' was not checked"):
        put_pruned(NeedsMore, more=1).save_pretrained(tmp_path)
    assert NeedsMore.from_pretrained(tmp_path, more=1).bert.config.model_type == "bert"


def test_saving_draws_nothing(tmp_path):
    model = holder(Fixed)
    state = torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


class Outer(PreTrainedModel):
    """Holds a head of ours, deep inside."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.parts = nn.ModuleList([nn.ModuleDict({"native": BertForSequenceClassification(tiny.BERT)})])
        self.post_init()


def test_a_head_deep_inside_is_found(tmp_path):
    model = Outer(PreTrainedConfig())
    model.parts[0]["native"] = prune(model.parts[0]["native"], TOP_K)
    with pytest.raises(ValueError, match=r"Outer would come back without the pruning of its 'parts.0.native'"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", [OwnHead, BertForMaskedLM])
def test_a_subclass_is_refused_with_what_works(kind):
    model = kind(copy.deepcopy(tiny.BERT)).eval()
    with pytest.raises(TypeError) as error:
        prune(model, TOP_K)
    way = "model.bert = prune(model.bert, ...)"
    assert f"{kind.__name__} cannot be pruned as a whole, but what it holds can: `{way}`" in str(error.value)
    assert ("model.tie_weights()" in str(error.value)) == (kind is BertForMaskedLM)
    expected = says(model)
    exec(way.replace("...", "None"), {"prune": prune}, {"model": model})
    model.tie_weights()
    torch.testing.assert_close(says(model)[-1], expected[-1], rtol=0, atol=1e-5)  # the one without padding
    whole = says(model)
    model.bert.set_pruning(TOP_K)
    assert not torch.equal(says(model), whole)
    if kind is BertForMaskedLM:
        assert model.get_output_embeddings().weight is model.bert.embeddings.word_embeddings.weight


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList([BertModel(tiny.BERT)])
        self.picture = ViTForImageClassification(tiny.VIT)


class OwnBase(BertModel):
    pass


def test_every_part_that_can_be_pruned_is_named():
    with pytest.raises(TypeError) as error:
        prune(Two(), TOP_K)
    for way in ("`model.towers[0] = prune(model.towers[0], ...)`", "`model.picture = prune(model.picture, ...)`"):
        assert way in str(error.value)
    assert "vit" not in str(error.value).split("; supported")[0]
    with pytest.raises(TypeError, match="OwnBase is a subclass of BertModel, whose own forward would be lost: "):
        prune(OwnBase(tiny.BERT), TOP_K)


def test_a_folder_of_a_held_model_loads_in_auto_classes(tmp_path):
    model = holder(Fixed)
    model.bert.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.pruning == TOP_K
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "tokenprune_bert"


def test_weights_that_are_collected_for_saving_are_told_of_too(tmp_path):
    """As `save_pretrained(folder, state_dict=...)` wants them; said once."""
    model = put_pruned(Holder)
    with pytest.warns(UserWarning, match="would come back without the pruning of its 'bert'"):
        model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    model.bert.set_pruning({"preset": "top_k", "layers": [1], "keep_rate": 0.7})
    with pytest.warns(UserWarning, match="would come back without"):
        model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        put_pruned(Fixed).state_dict()
        torch.nn.Sequential(prune(model.bert, TOP_K)).state_dict()
