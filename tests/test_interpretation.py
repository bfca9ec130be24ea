"""Gradients with respect to what is returned, hooks, and the tools that live on both."""

import functools

import pytest
import tiny
import torch
from methods import METHODS
from tiny import EXECUTIONS, build, cases, inputs_for, main_output, text_inputs
from torch.nn.utils.prune import l1_unstructured
from torch.testing import assert_close
from transformers import BertForSequenceClassification, BertModel, PreTrainedModel, ViTForImageClassification
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward

from hf_tokenprune import PruningConfig, prune
from hf_tokenprune.modeling import hooks, modeling_tokenprune


CLASSIFIERS = (BertForSequenceClassification, ViTForImageClassification)


def native(cls: type, attention: str = "sdpa") -> PreTrainedModel:
    return build(next(case for case in cases(tiny.ALL) if case.native is cls), attention=attention)


def loss_of(outputs: object) -> torch.Tensor:
    return main_output(outputs).square().sum()


@pytest.mark.parametrize("case", tiny.ALL)
def test_gradients_of_what_is_returned_are_native_with_nothing_pruned(case):
    inputs = inputs_for(case)
    stock = build(case, attention="eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    there = inputs["attention_mask"].bool() if case.text else None
    for pruning in (None, *(PruningConfig.preset("top_k", layers=[1], keep_rate=1.0, execution=e) for e in EXECUTIONS)):
        results = []
        for model in (stock, prune(stock, pruning)):
            outputs = model(**inputs, **asked)
            main = main_output(outputs)  # padding has an output natively
            main = main[there] if there is not None and main.shape[:2] == there.shape else main
            returned = outputs.hidden_states + outputs.attentions
            gradients = torch.autograd.grad(main.square().sum(), returned, allow_unused=True)
            results.append(gradients)
        for index, (theirs, ours) in enumerate(zip(*results)):
            if theirs is None or index == tiny.LAYERS:  # what a head does not read; the last is the sequence itself
                continue
            if there is not None and theirs.ndim == 3:
                theirs, ours = theirs[there], ours[there]
            elif there is not None:  # the row of a token that is there
                theirs, ours = (x.transpose(1, 2)[there].transpose(0, 1) for x in (theirs, ours))
                theirs, ours = (x * there.repeat_interleave(there.sum(1), 0) for x in (theirs, ours))
            assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=f"{pruning} {index}")


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("method", ["top_k", "evit", "tome", "adaptive", "ltp", "power_bert", "value_merge"])
@pytest.mark.parametrize("cls", CLASSIFIERS)
def test_gradients_under_pruning_are_those_of_small_changes(cls, method, execution):
    """A token that is gone has none; one that is there has the slope of the loss along its state."""
    pruning = PruningConfig.from_dict({**METHODS[method].to_dict(), "execution": execution})
    model = prune(native(cls), pruning).double()
    case = next(case for case in cases(tiny.ALL) if case.native is cls)
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs_for(case).items()}
    outputs = model(**inputs, output_hidden_states=True, output_token_trace=True)
    gradients = torch.autograd.grad(loss_of(outputs), outputs.hidden_states, allow_unused=True)
    assert all(gradient is not None for gradient in gradients[:-1])
    for site, source in zip(outputs.token_trace.layers, outputs.token_trace.source):
        gone = source < 0
        assert gradients[site + 1][gone].abs().max() == 0 if gone.any() else True
    seen = {}

    def push(module: torch.nn.Module, args: tuple, step: float) -> tuple:
        state = args[1]
        direction = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(3)).double()
        if state.layout.full or execution == "packed":
            alive = torch.ones_like(direction[..., 0], dtype=torch.bool)
        else:
            alive = state.layout.visible if execution == "masked" else state.alive
        seen["direction"], seen["state"] = direction * alive[..., None], state
        return args[0] + step * seen["direction"], *args[1:]

    layer, losses = 3, []
    for step in (1e-6, -1e-6):
        handle = model.base_model.token_layers()[layer].register_forward_pre_hook(functools.partial(push, step=step))
        with torch.no_grad():
            losses.append(loss_of(model(**inputs, output_hidden_states=True)))
        handle.remove()
    state = seen["state"]
    carried = state.layout.gather(seen["direction"], state.carrier)
    # A merged row stands at many places, and is read at its own.
    own = torch.zeros_like(state.carrier, dtype=torch.bool).scatter(1, state.positions, state.alive)
    slope = (gradients[layer] * carried * own[..., None]).sum()
    assert_close((losses[0] - losses[1]) / 2e-6, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("method", ["top_k", "evit", "tome"])
def test_attention_maps_have_a_gradient_under_pruning(method, execution):
    pruning = PruningConfig.from_dict({**METHODS[method].to_dict(), "execution": execution})
    model = prune(native(BertForSequenceClassification, "eager"), pruning)
    inputs = text_inputs([17, 5, 30, 1])
    outputs = model(**inputs, output_attentions=True)
    gradients = torch.autograd.grad(loss_of(outputs), outputs.attentions)
    plain = prune(native(BertForSequenceClassification, "eager"), pruning)(**inputs)
    assert_close(outputs.logits, plain.logits, rtol=1e-5, atol=1e-5)
    for gradient, weights in zip(gradients, outputs.attentions):
        assert gradient.abs().sum() > 0
        assert weights.shape == (4, 4, 30, 30)


def test_parameters_have_the_same_gradients_whatever_is_returned():
    for execution in EXECUTIONS:
        pruning = PruningConfig.from_dict({**METHODS["evit"].to_dict(), "execution": execution})
        gradients = []
        for asked in ({}, {"output_hidden_states": True, "output_attentions": True}):
            model = prune(native(BertModel, "eager"), pruning)
            loss_of(model(**text_inputs([17, 5, 30, 1]), **asked)).backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert_close(*gradients, rtol=1e-4, atol=1e-5)


# Hooks


@pytest.mark.parametrize("case", tiny.ALL)
def test_with_nothing_pruned_hooks_see_what_natively_goes_through(case):
    """On every module inside the base model that is called natively, inputs and outputs."""
    inputs = inputs_for(case)
    stock = build(case)
    there = inputs["attention_mask"].bool() if case.text else None
    outside = {"encoder", "pooler", "layernorm", ""}  # what holds the layers, and what reads the first token
    seen = []
    for model in (stock, prune(stock, None)):
        shapes, handles, base = {}, [], model.base_model
        for name, module in base.named_modules():
            if (name.split(".")[0] in outside and name.count(".") == 0) or isinstance(module, torch.nn.ModuleList):
                continue

            def look(module, args, output, name=name, shapes=shapes):
                shapes[name] = output[0] if isinstance(output, tuple) else output

            handles.append(module.register_forward_hook(look))
        outputs = model(**inputs)
        for handle in handles:
            handle.remove()
        seen.append((shapes, main_output(outputs)))
    (theirs, their_output), (ours, our_output) = seen
    theirs.pop("pooler.dense", None), theirs.pop("pooler.activation", None)
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        by_token = there is not None and value.ndim == 3 and value.shape[:2] == there.shape
        one, other = (ours[name][there], value[there]) if by_token else (ours[name], value)
        assert_close(one, other, rtol=1e-5, atol=1e-5, msg=name)
    if there is not None and our_output.shape[:2] == there.shape:
        their_output, our_output = their_output[there], our_output[there]
    assert_close(our_output, their_output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_every_kind_of_hook_on_a_layer(kind):
    model = prune(native(BertForSequenceClassification), None)
    shapes = []

    def look(module, *args):
        shapes.append(tuple(args[0][0].shape) if args[0][0] is not None else None)

    getattr(model.bert.encoder.layer[1], f"register_{kind}_hook")(look)
    loss_of(model(**text_inputs([17, 5, 30, 1]))).backward()
    assert shapes == [(4, 30, 32)]


def test_a_hook_changes_what_goes_on():
    """Steering by a hook works as natively."""
    stock = native(BertForSequenceClassification)
    inputs = text_inputs([9, 4])
    logits = []
    for model in (stock, prune(stock, None)):
        handle = model.bert.encoder.layer[1].register_forward_hook(lambda module, args, output: output + 1.5)
        logits.append(model(**inputs).logits)
        handle.remove()
    assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_pruning_with_hooks_keeps_its_layout(execution):
    model = prune(native(BertModel), PruningConfig.preset("top_k", layers=[1], keep_rate=0.5, execution=execution))
    shapes = []
    for layer in model.encoder.layer:
        layer.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[:2])))
    model(**text_inputs([20, 20]))
    # [CLS] and int(0.5 * 19) others
    wanted = {"packed": [(1, 40), (1, 20), (1, 20), (1, 20)], "padded": [(2, 20), (2, 10), (2, 10), (2, 10)]}
    assert shapes == wanted.get(execution, [(2, 20)] * 4)


def test_a_hook_that_is_never_called_is_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr(hooks.logger, "warning_once", said.append)
    model = prune(native(BertModel, "eager"), METHODS["top_k"])
    inputs = text_inputs([9, 4])
    for name in ("encoder.layer.1.attention", "encoder.layer.1.attention.self", "encoder"):
        handle = model.get_submodule(name).register_forward_hook(lambda *_: None)
        model(**inputs)
        handle.remove()
        assert f"hooks on '{name}' are not called" in said.pop()
    plain = prune(native(BertModel, "eager"), None)
    called = []
    plain.encoder.layer[1].attention.register_forward_hook(lambda *_: called.append(1))
    plain(**inputs)
    assert called and not said
    plain(**inputs, output_attentions=True)  # whose maps are made here
    assert "hooks on 'encoder.layer.1.attention' are not called" in said.pop()


def test_compiled_models_call_the_hooks_that_were_there():
    stock, inputs = native(BertModel), text_inputs([9, 9])
    model = prune(stock, None)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = compiled(**inputs).last_hidden_state
    torch._dynamo.reset()
    results = []
    for each in (stock, model):
        attention = each.encoder.layer[1].attention
        handle = attention.register_forward_hook(lambda module, args, output: (output[0] * 2, *output[1:]))
        results.append(torch.compile(each, backend="eager")(**inputs).last_hidden_state)
        handle.remove()
        torch._dynamo.reset()
    assert_close(*results, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results[1], plain, atol=1e-2)


@pytest.mark.parametrize("case", tiny.ALL)
def test_tools_that_hook_every_module_find_their_way(case):
    for pruning in (None, METHODS["top_k"]):
        model, seen = prune(build(case), pruning), []
        for module in model.modules():
            module.register_forward_hook(lambda module, args, output, seen=seen: seen.append(module))
        model(**inputs_for(case))
        assert set(model.base_model.token_layers()) <= set(seen)


def test_a_hook_before_a_layer_may_return_the_hidden_states_alone():
    stock = native(BertForSequenceClassification)
    logits = []
    for model in (stock, prune(stock, None)):
        handle = model.bert.encoder.layer[1].register_forward_pre_hook(lambda module, args: (args[0] + 1.5,))
        logits.append(model(**text_inputs([9, 9])).logits)  # natively such a hook loses the mask
        handle.remove()
    assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_hooks_on_embeddings_see_samples_whatever_is_pruned(execution):
    """Noise on embeddings, as NEFTune's, is scaled by their shape."""
    model = prune(native(BertModel), PruningConfig.preset("top_k", layers=[1], keep_rate=0.5, execution=execution))
    inputs, shapes = text_inputs([20, 9]), []
    wanted = model(**inputs).last_hidden_state
    for module in (model.embeddings, model.embeddings.word_embeddings):
        module.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    assert_close(model(**inputs).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)
    assert shapes == [(2, 20, 32)] * 2


def test_neftune_adds_as_much_noise_as_natively():
    stock, inputs = native(BertModel), text_inputs([20] * 8)
    for pruning in ("native", None, METHODS["top_k"]):
        model, noisy = stock if pruning == "native" else prune(stock, pruning), []
        table = model.embeddings.word_embeddings.train()
        table.neftune_noise_alpha = 5
        added = [
            table.register_forward_hook(neftune_post_forward_hook),
            table.register_forward_hook(lambda module, args, output, noisy=noisy: noisy.append(output)),
        ]
        model(**inputs)
        for handle in added:
            handle.remove()
        noise = (noisy[0] - table.eval()(inputs["input_ids"])).abs().max().item()
        assert noise == pytest.approx(5 / (20 * 32) ** 0.5, rel=0.05)


def test_hooks_that_look_at_no_token_cost_nothing():
    """Of `enable_input_require_grads`, which adapters with gradient checkpointing ask for, and of torch itself."""
    model = prune(native(BertModel), None)
    model.enable_input_require_grads()
    l1_unstructured(model.encoder.layer[0].intermediate.dense, "weight", amount=0.2)
    rows = []
    embed = model.embeddings.forward
    model.embeddings.forward = lambda **given: rows.append(given["input_ids"].shape) or embed(**given)
    model(**text_inputs([9, 4]))
    assert rows == [(1, 13)]


# Tools


def test_captum_layer_integrated_gradients():
    captum = pytest.importorskip("captum.attr")
    inputs = text_inputs([9, 9])
    reference = torch.zeros_like(inputs["input_ids"])

    def attributions(model: PreTrainedModel) -> torch.Tensor:
        def logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return model(input_ids=ids, attention_mask=mask).logits

        method = captum.LayerIntegratedGradients(logits, model.bert.embeddings)
        given, mask = inputs["input_ids"], inputs["attention_mask"]
        return method.attribute(given, reference, target=1, additional_forward_args=(mask,), n_steps=16)

    stock = native(BertForSequenceClassification)
    wanted = attributions(stock)
    assert wanted.shape == (2, 9, 32)
    model = prune(stock, None)
    assert_close(attributions(model), wanted, rtol=1e-4, atol=1e-5)
    results = []
    for execution in ("padded", "masked"):
        model.set_pruning(PruningConfig.preset("top_k", layers=[1], keep_rate=0.5, execution=execution))
        results.append(attributions(model))
        assert results[-1].shape == (2, 9, 32)
    assert_close(*results, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results[0], wanted, atol=1e-3)


@pytest.mark.parametrize("cls", CLASSIFIERS)
def test_captum_grad_cam(cls):
    captum = pytest.importorskip("captum.attr")
    stock = native(cls)
    case = next(case for case in cases(tiny.ALL) if case.native is cls)
    inputs = text_inputs([9, 9]) if case.text else inputs_for(case)

    def attributions(model: PreTrainedModel) -> torch.Tensor:
        name = next(iter(inputs))
        layers = model.bert.encoder.layer if case.text else model.vit.layers
        method = captum.LayerGradCam(lambda x: model(**{name: x}).logits, layers[2])
        return method.attribute(inputs[name], target=0, attr_dim_summation=False)

    wanted = attributions(stock)
    model = prune(stock, None)
    assert_close(attributions(model), wanted, rtol=1e-4, atol=1e-5)
    model.set_pruning(PruningConfig.preset("top_k", layers=[1], keep_rate=0.5, execution="masked"))
    assert attributions(model).shape == wanted.shape
    model.set_pruning(PruningConfig.preset("top_k", layers=[1], keep_rate=0.5, execution="padded"))
    assert attributions(model).shape[2 if wanted.ndim == 3 else 1] > 0


def test_bertviz():
    """It draws the maps of a pruned model: full size, with nothing where a token is gone."""
    bertviz = pytest.importorskip("bertviz")
    model = prune(native(BertModel, "eager"), PruningConfig.preset("top_k", layers=[1], keep_rate=0.5))
    inputs = text_inputs([9])
    outputs = model(**inputs, output_attentions=True)
    tokens = [f"w{token}" for token in inputs["input_ids"][0].tolist()]
    page = bertviz.head_view(outputs.attentions, tokens, html_action="return")
    assert all(token in page.data for token in tokens)
    assert [tuple(x.shape) for x in outputs.attentions] == [(1, 4, 9, 9)] * 4
    gone = outputs.attentions[2][0].sum(dim=(0, 1)) == 0
    assert 0 < gone.sum() < 9


def test_maps_that_a_kernel_does_not_give_are_said(monkeypatch):
    said = []
    monkeypatch.setattr(modeling_tokenprune.logger, "warning_once", said.append)
    model = prune(native(BertModel), None)
    assert model(**text_inputs([9]), output_attentions=True).attentions == ()
    assert len(said) == 1 and "gives no weights for `output_attentions=True`" in said[0]


def test_maps_of_a_kernel_of_ones_own_have_a_gradient(monkeypatch):
    said = []
    monkeypatch.setattr(modeling_tokenprune.logger, "warning_once", said.append)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "own", eager_attention_forward)
    model = prune(native(BertForSequenceClassification), METHODS["top_k"])
    model.config._attn_implementation = "own"
    outputs = model(**text_inputs([17, 5]), output_attentions=True)
    gradients = torch.autograd.grad(loss_of(outputs), outputs.attentions)
    assert all(gradient.abs().sum() > 0 for gradient in gradients) and not said
