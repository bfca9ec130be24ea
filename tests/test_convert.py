"""`prune`: the same weights under our classes, and a native model that never notices."""

import copy
import importlib.util

import pytest
import tiny
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_tokenprune import PruningConfig, prune
from hf_tokenprune.families import native_to_pruned, supported_natives
from hf_tokenprune.modeling.modeling_tokenprune import TokenPruneHead
from hf_tokenprune.modeling.token_layer import TokenPruneLayer


TOP_K = PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.5)
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


@torch.no_grad()
def output(model: PreTrainedModel, case: tiny.Case) -> torch.Tensor:
    """What the model says of the real tokens, or of each sample."""
    inputs = tiny.inputs_for(case)
    out = tiny.main_output(model(**inputs))
    return out[inputs["attention_mask"].bool()] if case.text and out.dim() == 3 else out


def assert_close(ours: torch.Tensor, native: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, native, rtol=0, atol=tolerance * max(1.0, native.abs().max().item()))


class Changed(tiny.Case):
    """A case with a config of its own."""

    @property
    def text(self) -> bool:
        return self.config.model_type == "bert"


def with_config(case: tiny.Case, **changes: object) -> tiny.Case:
    config = copy.deepcopy(case.config)
    for name, value in changes.items():
        setattr(config, name, value)
    return Changed(case.native, config)


def without_dropout(case: tiny.Case) -> tiny.Case:
    return with_config(case, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.mark.parametrize("case", tiny.ALL)
def test_it_is_our_class_with_the_same_names(case):
    native = tiny.build(case)
    pruned = prune(native, TOP_K)

    assert type(pruned) is native_to_pruned()[case.native]
    for store in ("named_parameters", "named_buffers"):
        theirs, ours = dict(getattr(native, store)()), dict(getattr(pruned, store)())
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [name for name, _ in pruned.named_modules()] == [name for name, _ in native.named_modules()]


@pytest.mark.parametrize("case", tiny.ALL)
def test_a_change_of_the_native_weights_changes_the_pruned_output(case):
    native = tiny.build(case)
    pruned = prune(native, TOP_K)
    before = output(pruned, case)
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.mul_(0.9)
    after = output(pruned, case)

    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, output(prune(native, TOP_K), case), rtol=0, atol=0)


@pytest.mark.parametrize("case", tiny.ALL)
def test_the_native_model_stays_as_it_was(case):
    native = tiny.build(case)
    before = output(native, case), native.config.to_dict(), [type(module) for module in native.modules()]
    pruned = prune(native, TOP_K)
    pruned.config.num_labels = 7
    pruned.config.hidden_size = 1
    pruned.set_pruning("adaptive")

    torch.testing.assert_close(output(native, case), before[0], rtol=0, atol=0)
    assert native.config.to_dict() == before[1]
    assert [type(module) for module in native.modules()] == before[2]


@pytest.mark.parametrize("case", tiny.HEADS)
def test_everything_the_config_says_is_kept(case):
    labels = {0: "dull", 1: "bright", 2: "none"}
    case = with_config(case, id2label=labels, label2id={name: i for i, name in labels.items()}, custom="kept")
    native = tiny.build(case)
    native.name_or_path = "someone/something"
    pruned = prune(native, TOP_K)
    config = pruned.config

    assert pruned.name_or_path == "someone/something"
    assert config.id2label == labels
    assert config.label2id == native.config.label2id
    assert config.pruning == TOP_K
    ours, theirs = config.to_dict(), native.config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "pruning"):
        ours.pop(name, None), theirs.pop(name, None)
    assert ours == theirs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", tiny.ALL)
def test_attention_implementation_is_copied_and_switched_apart(case, attention):
    native = tiny.build(case, attention=attention)
    pruned = prune(native, TOP_K)
    assert pruned.config._attn_implementation == attention

    other = {"eager": "sdpa", "sdpa": "eager"}[attention]
    pruned.set_attn_implementation(other)
    assert native.config._attn_implementation == attention
    maps = pruned(**tiny.inputs_for(case), output_attentions=True).attentions
    assert len(maps) == (tiny.LAYERS if other == "eager" else 0)


@pytest.mark.parametrize("case", tiny.ALL)
def test_training_mode_is_copied_module_by_module(case):
    native = tiny.build(case).train()
    native.base_model.embeddings.eval()
    pruned = prune(native, TOP_K)

    modes = {name: module.training for name, module in pruned.named_modules()}
    assert modes == {name: module.training for name, module in native.named_modules()}
    assert set(modes.values()) == {True, False}
    assert not any(module.training for module in prune(native.eval(), TOP_K).modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", tiny.ALL)
def test_dtype_is_copied(case, dtype):
    native = tiny.build(case).to(dtype)
    pruned = prune(native, TOP_K)

    assert pruned.dtype == dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.inputs_for(case).items()}
    out = tiny.main_output(pruned(**inputs))
    assert out.dtype == dtype
    assert out.isfinite().all()


@pytest.mark.parametrize("case", tiny.ALL)
def test_requires_grad_is_copied_parameter_by_parameter(case):
    native = tiny.build(case)
    native.base_model.requires_grad_(False)
    pruned = prune(native, TOP_K)

    flags = {name: parameter.requires_grad for name, parameter in native.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in pruned.named_parameters()} == flags


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", tiny.ALL)
def test_gradient_checkpointing_recomputes_and_keeps_the_gradients(case, when):
    case = without_dropout(case)
    native = tiny.build(case).train()

    def gradients(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], int]:
        calls = []
        layers = [module for module in model.modules() if isinstance(module, TokenPruneLayer)]
        assert len(layers) == tiny.LAYERS
        for layer in layers:
            layer.feed_forward_block = lambda x, layer=layer: (
                calls.append(0) or type(layer).feed_forward_block(layer, x)
            )
        model.zero_grad()
        tiny.main_output(model(**tiny.inputs_for(case))).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, len(calls)

    expected, calls = gradients(prune(native, TOP_K))
    assert calls == tiny.LAYERS
    if when == "before":
        native.gradient_checkpointing_enable()
        pruned = prune(native, TOP_K)
    else:
        pruned = prune(native, TOP_K)
        pruned.gradient_checkpointing_enable()
    assert pruned.is_gradient_checkpointing
    recomputed, calls = gradients(pruned)

    assert calls == 2 * tiny.LAYERS
    assert expected.keys() == recomputed.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", tiny.ALL)
def test_our_own_models_are_taken_too(case):
    first = prune(tiny.build(case), TOP_K)
    before = output(first, case)
    second = prune(first, None)

    assert type(second) is type(first)
    assert second.config.pruning is None
    assert first.config.pruning == TOP_K
    torch.testing.assert_close(output(first, case), before, rtol=0, atol=0)
    assert_close(output(second, case), output(tiny.build(case), case))
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in zip(second.parameters(), first.parameters()))


@pytest.mark.parametrize("case", tiny.ALL)
def test_a_deep_copy_stands_alone(case):
    pruned = prune(tiny.build(case), TOP_K)
    twin = copy.deepcopy(pruned)
    before = output(twin, case)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    pruned.set_pruning(None)

    torch.testing.assert_close(output(twin, case), before, rtol=0, atol=0)


@pytest.mark.parametrize("pruning", ["top_k", {"preset": "top_k", "keep_rate": 0.5}, TOP_K, TOP_K.to_dict(), None])
def test_every_form_of_pruning_is_taken(pruning):
    native = tiny.build(tiny.HEADS[0].values[0])
    assert prune(native, pruning).config.pruning == PruningConfig.coerce(pruning, tiny.LAYERS)


class HomeMade(BertForSequenceClassification):
    """A user's own head: nobody knows what it reads."""


@pytest.mark.parametrize(
    "model",
    [
        DistilBertModel(DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=1, hidden_dim=8)),
        BertForMaskedLM(tiny.BERT),
        HomeMade(tiny.BERT),
        nn.Linear(2, 2),
        BertModel,
        "bert-base-uncased",
        None,
    ],
    ids=lambda model: getattr(model, "__name__", type(model).__name__),
)
def test_an_unsupported_model_is_refused_with_the_supported_ones(model):
    with pytest.raises(TypeError, match="supported: ") as error:
        prune(model, TOP_K)
    assert all(name in str(error.value) for name in supported_natives())
    name = type(model).__name__
    assert name in str(error.value)


@pytest.mark.parametrize("flag", ["is_decoder", "add_cross_attention"])
def test_a_decoder_is_refused(flag):
    config = BertConfig(**{**tiny.BERT.to_dict(), "is_decoder": True, flag: True})
    with pytest.raises(ValueError, match=r"is_decoder \(True\) must be False"):
        prune(BertModel(config), TOP_K)


@pytest.mark.parametrize("native, config", [(BertModel, tiny.BERT), (ViTModel, tiny.VIT)])
def test_a_base_model_without_pooler(native, config):
    model = native(config, add_pooling_layer=False).eval()
    pruned = prune(model, None)
    case = tiny.Case(native, config)
    inputs = tiny.inputs_for(case)
    with torch.no_grad():
        ours, theirs = pruned(**inputs), model(**inputs)

    assert pruned.pooler is None
    assert ours.pooler_output is None
    assert_close(output(pruned, case), output(model, case))
    pruned.set_pruning(TOP_K)
    assert pruned(**inputs).last_hidden_state.shape == theirs.last_hidden_state.shape


def test_a_head_without_labels_gives_the_class_token():
    config = ViTConfig(**{**tiny.VIT.to_dict(), "id2label": None, "label2id": None, "num_labels": 0})
    native = ViTForImageClassification(config).eval()
    pruned = prune(native, None)
    inputs = tiny.image_inputs(2)

    assert isinstance(pruned.classifier, nn.Identity)
    with torch.no_grad():
        assert_close(pruned(**inputs).logits, native(**inputs).logits)
    pruned.set_pruning(TOP_K)
    assert pruned(**inputs).logits.shape == (2, config.hidden_size)


def test_a_model_with_mask_token_takes_masked_positions():
    native = ViTModel(tiny.VIT, use_mask_token=True).eval()
    nn.init.normal_(native.embeddings.mask_token)
    inputs = tiny.image_inputs(2)
    masked = torch.arange(36)[None].expand(2, -1) % 3 == 0
    pruned = prune(native, None)
    with torch.no_grad():
        expected = native(**inputs, bool_masked_pos=masked).last_hidden_state
        assert_close(pruned(**inputs, bool_masked_pos=masked).last_hidden_state, expected)
        assert (expected - native(**inputs).last_hidden_state).abs().max() > 1e-3


LINEARS = {
    "bert": ["query", "value"],
    "vit": ["q_proj", "v_proj"],
    "deit": ["q_proj", "v_proj"],
    "dinov2": ["q_proj", "fc1"],
    "dinov2_with_registers": ["q_proj", "fc1"],
}


def lora(case: tiny.Case, model: PreTrainedModel) -> nn.Module:
    """Adapters that change the output from the start."""
    from peft import LoraConfig, get_peft_model

    targets = LINEARS[case.config.model_type]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()


@needs_peft
@pytest.mark.parametrize("case", tiny.HEADS)
def test_an_adapted_model_is_refused_with_the_way_out(case):
    with pytest.raises(TypeError, match=r"get_base_model\(\).*supported: .*BertModel"):
        prune(lora(case, tiny.build(case)), TOP_K)


@needs_peft
@pytest.mark.parametrize("case", tiny.ALL)
def test_adapters_inside_the_base_model_work_and_learn(case):
    adapted = lora(case, tiny.build(case))
    pruned = prune(adapted.get_base_model(), None)
    expected = output(adapted, case)
    assert (expected - output(tiny.build(case), case)).abs().max() > 1e-3
    assert_close(output(pruned, case), expected)

    pruned.set_pruning(TOP_K)
    tiny.main_output(pruned(**tiny.inputs_for(case))).square().mean().backward()
    for name, parameter in pruned.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


@needs_peft
@pytest.mark.parametrize("case", tiny.LEARNING_HEADS)
def test_a_pruned_model_takes_adapters_and_trains(case):
    case = without_dropout(case)
    adapted = lora(case, prune(tiny.build(case), TOP_K)).train()
    inputs = tiny.inputs_for(case)
    if "Token" in str(case):
        labels = torch.where(inputs["attention_mask"].bool(), 0, -100)
    else:
        labels = torch.zeros(len(next(iter(inputs.values()))), dtype=torch.long)
    frozen = {n: p.detach().clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(8):
        loss = adapted(**inputs, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(parameter, frozen[n]) for n, parameter in adapted.named_parameters() if n in frozen)
    adapted.eval()
    expected = output(adapted, case)
    merged = adapted.merge_and_unload()
    assert isinstance(merged, TokenPruneHead)
    assert_close(output(merged, case), expected)


@pytest.mark.skipif(
    not hasattr(getattr(torch.ao, "quantization", None), "quantize_dynamic"), reason="needs quantize_dynamic"
)
@pytest.mark.parametrize("case", tiny.ALL)
def test_dynamically_quantised_linears_are_called(case):
    native = torch.ao.quantization.quantize_dynamic(tiny.build(case), {nn.Linear}, dtype=torch.qint8)
    assert any("quantized" in type(module).__module__ for module in native.modules())
    # The range of the activations is taken over the whole call, so the call must hold the rows that the native one
    # has: no padding, and hidden states that every layer computes for every token.
    inputs = tiny.text_inputs([30, 30]) if case.text else tiny.image_inputs(2)
    pruned = prune(native, None)
    with torch.no_grad():
        ours, theirs = (tiny.main_output(model(**inputs, output_hidden_states=True)) for model in (pruned, native))

    assert_close(ours, theirs)
    pruned.set_pruning(TOP_K)
    with torch.no_grad():
        out = pruned(**tiny.inputs_for(case), output_token_trace=True)
    assert (out.token_trace.counts[-1] < out.token_trace.counts[0]).any()
    assert tiny.main_output(out).isfinite().all()
