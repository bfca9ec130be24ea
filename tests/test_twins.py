"""What a pruned model shares with the model that it was made of: the memory of the weights, and nothing else."""

import copy
import threading
import warnings

import pytest
import tiny
import torch
from methods import METHODS
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as masks
from transformers import BertForSequenceClassification, BertModel, PreTrainedModel
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention

from hf_tokenprune import PruningConfig, prune


TOP_K = PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.5)
CASE = pytest.mark.parametrize("case", tiny.ALL)
BERT = tiny.Case(BertForSequenceClassification, tiny.BERT)


@torch.no_grad()
def says(model: PreTrainedModel, case: tiny.Case = BERT) -> torch.Tensor:
    out = tiny.main_output(model(**tiny.inputs_for(case)))
    return out[tiny.inputs_for(case)["attention_mask"].bool()] if case.text and out.dim() == 3 else out


def state(model: nn.Module) -> dict[str, object]:
    """Everything of a model that must not change by what is done to another."""
    return {
        "weights": {name: (p.dtype, p.device, p.requires_grad, p.grad) for name, p in model.named_parameters()},
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "checkpointing": model.is_gradient_checkpointing,
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for name in before:
        if name == "buffers":
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
        else:
            assert after[name] == before[name], name


def quantise(model: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


def backward(model: PreTrainedModel) -> None:
    model(**tiny.inputs_for(BERT), labels=torch.zeros(4, dtype=torch.long)).loss.backward()


DEEDS = {
    "train": lambda model: model.train(),
    "half": lambda model: model.half(),
    "to_meta": lambda model: model.to("meta"),
    "freeze": lambda model: model.requires_grad_(False),
    "quantise": quantise,
    "hook": lambda model: [module.register_forward_hook(lambda *_: None) for module in model.modules()],
    "checkpoint": lambda model: model.gradient_checkpointing_enable(),
    "backward": backward,
    "buffers": lambda model: [buffer.zero_() for buffer in model.buffers()],
    "resize": lambda model: model.resize_token_embeddings(60),
    "dropout": lambda model: [setattr(m, "p", 0.9) for m in model.modules() if isinstance(m, nn.Dropout)],
    "head": lambda model: setattr(model, "classifier", nn.Linear(32, 3)),
}


@pytest.mark.parametrize("direction", ["from_base", "from_pruned"])
@pytest.mark.parametrize("deed", DEEDS)
def test_what_is_done_to_one_is_not_done_to_the_other(deed, direction):
    base = tiny.build(BERT)
    pruned = prune(base, TOP_K)
    done, other = (base, pruned) if direction == "from_base" else (pruned, base)
    before, words = state(other), says(other)
    DEEDS[deed](done)

    assert_same(before, state(other))
    assert {m.p for m in other.modules() if isinstance(m, nn.Dropout)} == {0.1}
    torch.testing.assert_close(says(other), words, rtol=0, atol=0)
    assert_same(before, state(other))


@CASE
def test_every_module_is_another_and_every_weight_the_same_memory(case):
    base = tiny.build(case)
    pruned = prune(base, TOP_K)
    theirs = {id(each) for each in [*base.modules(), *base.parameters(), *base.buffers()]}
    assert not [name for name, each in pruned.named_modules() if id(each) in theirs]
    assert not [name for name, each in [*pruned.named_parameters(), *pruned.named_buffers()] if id(each) in theirs]
    weights = dict(base.named_parameters())
    assert {n: p.data_ptr() for n, p in pruned.named_parameters()} == {n: p.data_ptr() for n, p in weights.items()}
    buffers = dict(base.named_buffers())
    assert all(buffer.data_ptr() != buffers[name].data_ptr() for name, buffer in pruned.named_buffers())


@CASE
def test_nothing_of_a_copy_is_the_same(case):
    base = tiny.build(case)
    expected = says(prune(base, TOP_K), case)
    pruned = prune(base, TOP_K, copy=True)
    memory = {each.data_ptr() for each in [*base.parameters(), *base.buffers()]}
    assert not [n for n, each in [*pruned.named_parameters(), *pruned.named_buffers()] if each.data_ptr() in memory]
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.zero_()
    torch.testing.assert_close(says(pruned, case), expected, rtol=0, atol=0)


def trained(model: PreTrainedModel) -> PreTrainedModel:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    return model


def test_trials_of_a_loop_start_from_equal_weights():
    base = tiny.build(BERT).train()
    before = copy.deepcopy(base.state_dict())
    first, second = (trained(prune(base, TOP_K, copy=True)).state_dict() for _ in range(2))

    torch.testing.assert_close(base.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first["classifier.weight"], before["classifier.weight"])


def test_training_one_trains_the_other_where_memory_is_shared():
    base = tiny.build(BERT).train()
    pruned = trained(prune(base, TOP_K))
    torch.testing.assert_close(dict(base.state_dict()), dict(pruned.state_dict()), rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in base.parameters())
    base.load_state_dict(tiny.build(BERT, seed=3).state_dict())
    torch.testing.assert_close(dict(base.state_dict()), dict(pruned.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("copies", [False, True])
def test_tied_weights_stay_tied(copies):
    base = tiny.build(BERT)
    attention = [layer.attention.self for layer in base.bert.encoder.layer]
    attention[1].query.weight = attention[0].query.weight
    attention[2].key = attention[0].key  # a module that is there twice
    pruned = prune(base, TOP_K, copy=copies)
    ours = [layer.attention.self for layer in pruned.bert.encoder.layer]

    assert ours[1].query.weight is ours[0].query.weight
    assert ours[2].key is ours[0].key
    assert ours[0].query.weight is not attention[0].query.weight
    assert len(list(pruned.parameters())) == len(list(base.parameters()))


def test_a_hook_on_the_base_is_called_for_the_base_alone():
    base, calls = tiny.build(BERT), []
    for module in base.modules():
        module.register_forward_hook(lambda module, *_: calls.append(module))
        module.register_forward_pre_hook(lambda module, *_: calls.append(module))
        module.register_full_backward_hook(lambda module, *_: calls.append(module))
    pruned = prune(base, TOP_K)
    backward(pruned)
    assert not calls
    backward(base)
    assert base.bert.embeddings in calls


@CASE
def test_what_was_called_before_is_pruned_as_what_was_not(case):
    fresh, called = tiny.build(case), tiny.build(case)
    called(**tiny.inputs_for(case), output_hidden_states=True)
    models = [prune(base, TOP_K) for base in (fresh, called)]
    sets = [{name: set(vars(module)) for name, module in model.named_modules()} for model in models]
    assert sets[0] == sets[1]
    assert not any(module._forward_hooks for module in models[1].modules())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        lambda linear: parametrizations.weight_norm(linear),
        lambda linear: parametrizations.spectral_norm(linear),
        lambda linear: parametrizations.orthogonal(linear),
        lambda linear: nn.utils.weight_norm(linear),
        lambda linear: nn.utils.spectral_norm(linear),
        lambda linear: masks.l1_unstructured(linear, "weight", amount=0.5),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old_weight_norm", "old_spectral_norm", "masked"],
)
def test_weights_that_are_made_on_each_call_are_made_in_the_twin(change):
    base = tiny.build(BERT)
    for layer in base.bert.encoder.layer:
        change(layer.attention.self.query)
        change(layer.intermediate.dense)
    base.train()(**tiny.inputs_for(BERT))  # what is kept between calls has a graph now
    base.eval()
    pruned = prune(base, None)
    torch.testing.assert_close(says(pruned), says(base), rtol=0, atol=1e-5)

    with torch.no_grad():  # of the twin alone: from its own parameters, over the same memory
        for parameter in pruned.bert.encoder.parameters():
            parameter.mul_(0.9)
    torch.testing.assert_close(says(pruned), says(base), rtol=0, atol=1e-5)
    theirs = {id(module) for module in base.modules()}
    assert not [name for name, module in pruned.named_modules() if id(module) in theirs]
    pruned.set_pruning(TOP_K)
    trained(pruned.train())


def test_what_was_set_on_modules_comes_along():
    base = tiny.build(BERT)
    base.num_labels, base.note, base.lock = 5, {"by": base}, threading.Lock()
    base.classifier.scale = torch.full((3,), 2.0)
    base.classifier.forward = scaled.__get__(base.classifier)
    base.loss_function = lambda logits, labels, config, **_: logits.sum()
    base.bert.encoder.layer[0].mark = "first"
    pruned = prune(base, TOP_K)

    assert pruned.num_labels == 5
    assert pruned.note["by"] is pruned and base.note["by"] is base
    assert pruned.lock is base.lock  # nobody can copy one
    assert pruned.bert.encoder.layer[0].mark == "first"
    assert pruned.loss_function is base.loss_function
    pruned.classifier.scale = torch.zeros(3)
    assert (says(pruned) == 0).all()
    assert (says(base) != 0).all()


def scaled(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return type(linear).forward(linear, x) * linear.scale


class Marked(nn.Parameter):
    """As quantisers have their own."""


def test_a_kind_of_parameter_keeps_its_kind_and_what_is_set_on_it():
    base = tiny.build(BERT)
    query = base.bert.encoder.layer[0].attention.self.query
    query.weight = Marked(query.weight.detach(), requires_grad=False)
    query.weight.scales, query.weight.owner = torch.ones(3), query
    pruned = prune(base, TOP_K)
    ours = pruned.bert.encoder.layer[0].attention.self.query

    assert type(ours.weight) is Marked and ours.weight is not query.weight
    assert not ours.weight.requires_grad
    assert ours.weight.data_ptr() == query.weight.data_ptr()
    assert ours.weight.scales.data_ptr() == query.weight.scales.data_ptr()
    assert ours.weight.owner is ours and query.weight.owner is query


class Bits(torch.Tensor):
    """A tensor whose memory nobody may look at, but by its parts: as torchao's are."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Bits":
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Bits(args[0].inner.detach())
        opened = [each.inner if isinstance(each, Bits) else each for each in args]
        return function(*opened, **(kwargs or {}))


def test_a_kind_of_tensor_keeps_its_kind():
    base = tiny.build(BERT)
    expected = says(base)
    query = base.bert.encoder.layer[0].attention.self.query
    query.weight = nn.Parameter(Bits(query.weight.detach()), requires_grad=False)
    pruned = prune(base, None)
    ours = pruned.bert.encoder.layer[0].attention.self.query

    assert type(ours.weight) is Bits and ours.weight is not query.weight
    assert ours.weight.inner.data_ptr() == query.weight.inner.data_ptr()
    torch.testing.assert_close(says(pruned), expected, rtol=0, atol=1e-5)


def test_tables_grow_apart():
    """Natively and ours: whoever resizes has a new table, and the other the one that it had."""
    base = tiny.build(BERT)
    pruned = prune(base, TOP_K)
    native_says, ours_says = says(base), says(pruned)
    base.resize_token_embeddings(70)
    pruned.resize_token_embeddings(60)

    assert [len(model.get_input_embeddings().weight) for model in (base, pruned)] == [70, 60]
    assert [model.config.vocab_size for model in (base, pruned)] == [70, 60]
    torch.testing.assert_close(says(base), native_says, rtol=0, atol=0)
    torch.testing.assert_close(says(pruned), ours_says, rtol=0, atol=0)
    late = {"input_ids": torch.tensor([[2, 65, 3]])}
    assert base(**late).logits.isfinite().all()
    with pytest.raises(IndexError):
        pruned(**late)


def test_offloaded_weights_are_read_from_one_place():
    from accelerate import cpu_offload

    base = tiny.build(BERT)
    expected = says(prune(base, TOP_K)), says(base)
    cpu_offload(base, execution_device=torch.device("cpu"))
    pruned = prune(base, TOP_K)

    ours, theirs = (model.bert.embeddings.word_embeddings for model in (pruned, base))
    assert ours.weight.is_meta and ours._hf_hook is not theirs._hf_hook
    assert ours._hf_hook.weights_map is theirs._hf_hook.weights_map
    torch.testing.assert_close(says(pruned), expected[0], rtol=0, atol=0)
    torch.testing.assert_close(says(base), expected[1], rtol=0, atol=0)
    assert theirs.weight.is_meta and ours.weight.is_meta


def test_gradients_reach_adapters_behind_frozen_checkpointed_layers():
    base = tiny.build(BERT).train()
    base.bert.requires_grad_(False)
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    base.bert.encoder.layer[0].output.dense.weight.requires_grad_(True)
    pruned = prune(base, TOP_K)
    backward(pruned)
    assert pruned.bert.encoder.layer[0].output.dense.weight.grad is not None
    embeddings = pruned.get_input_embeddings(), base.get_input_embeddings()
    before = [len(module._forward_hooks) for module in embeddings]
    assert before[0] == before[1] > 0
    pruned.disable_input_require_grads()
    assert [len(module._forward_hooks) for module in embeddings] == [before[0] - 1, before[1]]


@pytest.mark.parametrize(
    "method", [name for name in METHODS if METHODS[name].objective or "learned" in str(METHODS[name])]
)
def test_what_a_pruning_has_learned_is_shared_too(method):
    case = tiny.Case(tiny.BertModel, tiny.BERT)
    first = prune(tiny.build(case), METHODS[method])
    second = prune(first, first.config.pruning)
    theirs = dict(first.named_parameters())
    assert {n: p.data_ptr() for n, p in second.named_parameters()} == {n: p.data_ptr() for n, p in theirs.items()}


def test_a_model_made_where_nothing_is_recorded_learns():
    base = tiny.build(BERT).train()
    with torch.inference_mode():
        pruned = prune(base, TOP_K)
    trained(pruned)


# What was replaced in the original


class OwnLayer(BertLayer):
    def forward(self, *args, **given):
        return super().forward(*args, **given) + 1


class OwnAttention(BertSelfAttention):
    pass


def _replace_layer(model):
    model.encoder.layer[1] = OwnLayer(model.config)


def _replace_attention(model):
    model.encoder.layer[1].attention.self = OwnAttention(model.config)


def _patch(path: str):
    def patch(model):
        module = model.get_submodule(path)
        module.forward = lambda *args, own=module.forward, **given: own(*args, **given)

    return patch


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        (_replace_layer, "a OwnLayer in the model is not the native class"),
        (_replace_attention, "a OwnAttention in the model is not the native class"),
        (_patch("encoder.layer.1"), "a BertLayer in the model has a forward that was replaced"),
        (_patch("encoder.layer.1.attention"), "a BertAttention in the model has a forward that was replaced"),
        (_patch("encoder.layer.1.attention.self"), "a BertSelfAttention in the model has a forward that was replaced"),
        (_patch("encoder"), "a BertEncoder in the model has a forward that was replaced"),
        (_patch(""), "a BertModel in the model has a forward that was replaced"),
        (lambda model: model.encoder.layer.pop(3), r"the model has 3 layers, and num_hidden_layers \(4\)"),
        (lambda model: model.encoder.layer.append(BertLayer(model.config)), "the model has 5 layers"),
    ],
)
def test_parts_that_would_not_be_called_are_refused(deed, said):
    native = tiny.build(tiny.Case(BertModel, tiny.BERT))
    deed(native)
    with pytest.raises(ValueError, match=said):
        prune(native, None)


def test_embeddings_of_ones_own_are_called():
    native, inputs = tiny.build(tiny.Case(BertModel, tiny.BERT)), tiny.text_inputs([9, 9])
    native.embeddings.forward = lambda own=native.embeddings.forward, **given: own(**given) * 2
    wanted = native(**inputs).last_hidden_state
    torch.testing.assert_close(prune(native, None)(**inputs).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)


def test_merging_an_adapter_of_one_leaves_the_other_alone():
    """It writes into the weights under it, which are not shared for that."""
    peft = pytest.importorskip("peft")
    inputs = tiny.text_inputs([17, 5, 30, 1])
    config = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    for merged in ("base", "pruned"):
        wrapped = peft.get_peft_model(tiny.build(tiny.Case(BertModel, tiny.BERT)), config).eval()
        base = wrapped.get_base_model()
        pruned = prune(base, None)
        wanted = base(**inputs).last_hidden_state, pruned(**inputs).last_hidden_state
        if merged == "base":
            wrapped.merge_adapter()
        else:
            for module in pruned.modules():
                if hasattr(module, "base_layer"):
                    module.merge()
        for model, before in zip((base, pruned), wanted):
            torch.testing.assert_close(model(**inputs).last_hidden_state, before, rtol=1e-5, atol=1e-5)
        same = base.encoder.layer[0].attention.self.key.weight.data_ptr()
        assert pruned.encoder.layer[0].attention.self.key.weight.data_ptr() == same
