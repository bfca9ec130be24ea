"""Objectives: masks and penalties against naive versions, values and gradients; the soft and the hard model agree."""

import copy
from dataclasses import asdict, replace
from typing import Any

import pytest
import tiny
import torch
from methods import pruned
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_tokenprune import PruningConfig, prune
from hf_tokenprune.modeling import modeling_tokenprune
from hf_tokenprune.modeling.pruner_modules import PREDICTORS, VALUES
from hf_tokenprune.modeling.pruning_objective import Objective
from hf_tokenprune.modeling.soft_pruning import BudgetMultipliers, expected_ratio
from hf_tokenprune.modeling.token_outputs import EncoderCall


TEXT = next(param.values[0] for param in tiny.HEADS if param.id == "BertForSequenceClassification")
PRUNINGS = {
    "ltp": {"preset": "ltp", "thresholds": [0.0, 0.03, 0.04, 0.0], "objective": {"name": "ltp", "temperature": 0.01}},
    "budget": {
        "preset": "adaptive",
        "layers": [1, 2],
        "threshold": [0.6, 0.8],
        "objective": {"name": "budget", "target_macs": 0.5},
    },
    "budget_values": {
        "preset": "adaptive",
        "layers": [1, 2],
        "threshold": [0.7, 0.9],
        "saliency": "cls_value_norm",
        "objective": {"name": "budget", "target_macs": 0.5},
    },
    "budget_learned": {
        "preset": "adaptive",
        "layers": [1, 2],
        "threshold": [0.9, 0.95],
        "saliency": "learned",
        "place": "before",
        "objective": {"name": "budget", "target_macs": 0.5},
    },
    "budget_prior": {
        "preset": "adaptive",
        "layers": [1],
        "threshold": 0.8,
        "prior_threshold": 0.9,
        "objective": {"name": "budget", "target_macs": 0.5},
    },
    "budget_ltp": {
        "preset": "ltp",
        "thresholds": [0.0, 0.03, 0.04, 0.0],
        "objective": {"name": "budget", "target_macs": 0.5},
    },
    "power_bert": {"preset": "power_bert", "retention": [20, 15, 10, 5], "objective": "power_bert"},
    "dynamicvit": {"preset": "dynamicvit", "layers": [1, 2], "base_rate": 0.6},
}
every = pytest.mark.parametrize("name", PRUNINGS)


def soft_model(case: tiny.Case, pruning: Any, seed: int = 0) -> PreTrainedModel:
    """Without dropout, in training mode, and in float64, so that gradients can be compared."""
    config = copy.deepcopy(case.config)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return pruned(tiny.build(tiny.Case(case.native, config), seed=seed), pruning).double().train()


def naive_logits(model: PreTrainedModel, ids: torch.Tensor, drawn: Any = None) -> tuple[torch.Tensor, list]:
    """One unpadded sample through a BERT classifier in its soft phase, from the equations; and the weights of its
    tokens after each site."""
    bert, pruning = model.bert, model.config.pruning
    objective = pruning.objective
    x = bert.embeddings(input_ids=ids[None])[0]
    weight, seen = torch.ones(len(ids), dtype=x.dtype), []
    for index, layer in enumerate(bert.encoder.layer):
        site = pruning.sites.get(index)
        site = None if site is None or site.idle or index == len(bert.encoder.layer) - 1 else site
        if site is not None and site.saliency == "token_prior":
            worth = layer.token_prior.worth[ids].to(x.dtype)
            mask = _budget_mask(worth / worth.mean(), layer, objective)
            weight = torch.cat([torch.ones(1, dtype=x.dtype), mask[1:]])
            seen.append((site, weight))
        elif site is not None and site.place == "before":
            stays = layer.token_predictor.in_conv(x)
            own, shared = stays.chunk(2, dim=1)
            counted = weight.clone()
            counted[0] = 0.0
            mean = (shared * counted[:, None]).sum(dim=0) / counted.sum().clamp(min=1)
            choice = layer.token_predictor.out_conv(torch.cat([own, mean.expand_as(shared)], dim=1))
            stays = choice[:, 0].exp()
            score = weight.sum() * stays / (stays * counted).sum()
            learned = objective.name == "budget"
            mask = _budget_mask(score, layer, objective) if learned else drawn(choice)
            weight = weight * torch.cat([torch.ones(1, dtype=x.dtype), mask[1:]])
            seen.append((site, weight))
        q, k, v = (f(x).view(len(ids), 4, -1).transpose(0, 1) for f in (layer.query, layer.key, layer.value))
        logits = q @ k.mT / q.shape[-1] ** 0.5
        if not objective.method.on_hidden:
            logits = logits + (weight + 1e-8).log()
        maps = logits.softmax(dim=-1)
        x = layer.attention.output((maps @ v).transpose(0, 1).flatten(1), x)
        if site is not None and site.place == "between":
            mean = maps.mean(dim=0)
            module = layer.token_mask
            if site.rule == "keep_count":
                score = mean.sum(dim=0) - mean.diagonal()
                order = [0, *(1 + score[1:].argsort(descending=True)).tolist()]
                mask = torch.zeros_like(score)
                ranked = order[: len(module.share)]  # what comes behind the last rank is gone
                mask[ranked] = module.share[: len(ranked)].to(x.dtype)
            else:
                received = (mean * weight[:, None]).sum(dim=0) / weight.sum()
                fetched = (maps[:, 0] * v.norm(dim=-1)).sum(dim=0)
                row = fetched / fetched.sum() if site.saliency == "cls_value_norm" else mean[0]
                score = received if site.rule == "threshold" else row * weight.sum()
                if objective.name == "ltp":
                    mask = torch.sigmoid((score - module.log_threshold.exp()) / objective.temperature)
                else:
                    mask = _budget_mask(score, layer, objective)
            mask = torch.cat([torch.ones(1, dtype=x.dtype), mask[1:]])
            weight = weight * mask
            x = x * mask[:, None] if objective.method.on_hidden else x
            seen.append((site, weight))
        x = layer.feed_forward_block(x[None])[0]
    return model.classifier(bert.pooler(x[None])), seen


def _budget_mask(score: torch.Tensor, layer: torch.nn.Module, objective: Objective) -> torch.Tensor:
    return torch.sigmoid((score.log() - layer.token_mask.log_threshold) / objective.temperature)


def naive_penalty(model: PreTrainedModel, seen: list[list]) -> torch.Tensor:
    objective, layers = model.config.pruning.objective, model.bert.encoder.layer
    if objective.name == "power_bert":
        return objective.penalty * sum((s.layer + 1) * layers[s.layer].token_mask.share.sum() for s, _ in seen[0])
    if objective.name == "ltp":
        return objective.penalty * torch.stack([w.mean() for sample in seen for _, w in sample]).mean()
    if objective.name == "dynamicvit":
        misses = [(w[1:].mean() - 0.6 ** (i + 1)) ** 2 for sample in seen for i, (_, w) in enumerate(sample)]
        return objective.penalty * torch.stack(misses).mean()
    cost = whole = 0.0
    sites = {index: site for index, site in model.config.pruning.sites.items() if not site.idle}
    saliencies = {site.saliency for site in sites.values()}
    for sample in seen:
        tokens = torch.tensor(float(len(sample[0][1])), dtype=torch.double)
        one, first, second = torch.tensor(1.0), *(weights.sum() for _, weights in sample)
        if "learned" in saliencies:
            layers_cost, predictors = _cost_of_learned(tokens, first, second)
            cost = cost + layers_cost + predictors
            whole = whole + 4 * (4 * tokens * 32 * 32 + 2 * tokens**2 * 32 + tokens * 2 * 32 * 64)
            continue
        through = [(tokens, tokens), (tokens, first), (first, second), (second, one)]
        if "token_prior" in saliencies:
            through = [(first, first), (first, second), (second, second), (second, one)]
        for index, (keys, rest) in enumerate(through):
            site = index in sites and sites[index].place == "between"
            # The class token's query and row of logits, with norms of the values or without, or every query and a map.
            row = {"cls_attention": 32, "cls_value_norm": 2 * 32 + 4}
            row = row.get(sites[index].saliency) if site else None
            queries = rest + 1 if row else keys if site else rest
            cost = cost + (keys * row if row else keys**2 * 32 if site else 0)
            cost = cost + 2 * keys * 32 * 32 + (queries + rest) * 32 * 32
            cost = cost + 2 * rest * keys * 32 + rest * 2 * 32 * 64
            whole = whole + 4 * tokens * 32 * 32 + 2 * tokens**2 * 32 + tokens * 2 * 32 * 64
    excess = cost / whole - objective.target_macs
    linear, quadratic = model.bert.token_budget.linear, model.bert.token_budget.quadratic
    return linear * excess + (quadratic + objective.penalty) * excess**2


def _cost_of_learned(tokens: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> tuple:
    """Layers, of which the last computes one query, and two predictors, of 32 to 32, 16, 8, and 2."""
    one = torch.ones_like(first)
    layers = sum(
        2 * keys * 32 * 32 + 2 * rest * 32 * 32 + 2 * rest * keys * 32 + rest * 2 * 32 * 64
        for keys, rest in ((tokens, tokens), (first, first), (second, second), (second, one))
    )
    return layers, ((tokens - 1) + (first - 1)) * (32 * 32 + 32 * 16 + 16 * 8 + 8 * 2)


@pytest.mark.parametrize("execution", tiny.EXECUTIONS)
@every
def test_loss_and_gradients_are_the_naive_ones(name, execution, monkeypatch):
    pruning = PruningConfig.coerce({**PRUNINGS[name], "execution": execution}, tiny.LAYERS)
    model = soft_model(TEXT, pruning)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "token_budget" in parameter_name:
                parameter.fill_(0.7)
            if parameter_name.endswith("share"):
                parameter.copy_(torch.linspace(0.95, 0.05, len(parameter)))
    # A sharp draw that is the same in any layout.
    monkeypatch.setattr(F, "gumbel_softmax", lambda x, tau, hard, dim: _straight_through(x / tau))
    inputs, labels = tiny.text_inputs([17, 9, 23], padding=2), torch.tensor([0, 2, 1])
    whole = model(**inputs, labels=labels)
    loss, parameters = whole.loss, dict(model.named_parameters())
    found = torch.autograd.grad(loss, parameters.values(), allow_unused=True)

    samples = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    outputs = [naive_logits(model, ids, lambda x: _straight_through(x)[..., 0]) for ids in samples]
    task = F.cross_entropy(torch.cat([logits for logits, _ in outputs]), labels)
    penalty = naive_penalty(model, [seen for _, seen in outputs])
    expected_loss = task + penalty
    expected = torch.autograd.grad(expected_loss, parameters.values(), allow_unused=True)

    assert abs(loss.item() - expected_loss.item()) < 1e-6
    assert abs(whole.pruning_loss.item() - penalty.item()) < 1e-6
    moved = 0
    for parameter_name, ours, theirs in zip(parameters, found, expected):
        if theirs is None:
            assert ours is None or not ours.any()
            continue
        theirs = -theirs if "token_budget" in parameter_name else theirs  # ascent
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=parameter_name)
        moved += any(part in (*PREDICTORS, *VALUES) for part in parameter_name.split(".")) and bool(theirs.any())
    # Two masks and two multipliers, but for these.
    assert moved == {"ltp": 2, "power_bert": 3, "dynamicvit": 20, "budget_learned": 24}.get(name, 4)


def _straight_through(x: torch.Tensor) -> torch.Tensor:
    soft = x.softmax(dim=-1)
    hard = F.one_hot(x.argmax(dim=-1), 2).to(x.dtype)
    return hard + soft - soft.detach()


@pytest.mark.parametrize("case", tiny.HEADS)
@pytest.mark.parametrize("name", ["ltp", "budget", "budget_ltp", "budget_values", "budget_learned", "budget_prior"])
def test_the_sharpest_masks_are_removal(case, name):
    spec = copy.deepcopy(PRUNINGS[name])
    spec["objective"] = {**spec["objective"], "temperature": 1e-10}
    model = soft_model(case, PruningConfig.coerce(spec, tiny.LAYERS))
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny.inputs_for(case).items()}
    for execution in tiny.EXECUTIONS:
        model.set_pruning(replace(model.config.pruning, execution=execution))
        works = [EncoderCall(work=True) for _ in range(2)]
        with torch.no_grad():
            soft = model.train()(**inputs, output_hidden_states=True)
            model(**inputs, encoder_call=works[0])
            hard = model.eval()(**inputs, output_hidden_states=True)
            model(**inputs, encoder_call=works[1])
        for a, b in zip((soft.logits, *soft.hidden_states), (hard.logits, *hard.hidden_states)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        ratios = [expected_ratio(call, model.config) for call in works]
        assert works[0].softened and ratios[1] < 0.99
        torch.testing.assert_close(*(ratio.double() for ratio in ratios), rtol=0, atol=1e-5)


@every
def test_a_soft_checkpoint_goes_on_where_it_was_and_settles(name, tmp_path):
    model = soft_model(TEXT, PruningConfig.coerce(PRUNINGS[name], tiny.LAYERS)).float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("log_threshold"):
                parameter.add_(0.25)
            if parameter_name.endswith("share"):
                parameter.copy_(torch.linspace(0.9, -0.1, len(parameter)))
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.pruning == model.config.pruning
    inputs = tiny.inputs_for(TEXT)
    with torch.no_grad():
        learned = model.eval()(**inputs).logits
        torch.testing.assert_close(again.eval()(**inputs).logits, learned)
    again.settle_pruning()
    assert again.config.pruning.objective is None
    assert not any("token_mask" in key or "token_budget" in key for key in again.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, learned)
    if name != "dynamicvit":
        assert again.config.pruning.values != model.config.pruning.values


def test_a_stock_checkpoint_gets_masks_at_their_start(tmp_path):
    tiny.build(TEXT).save_pretrained(tmp_path)
    pruning = PruningConfig.coerce(PRUNINGS["budget"], tiny.LAYERS)
    loaded = type(prune(tiny.build(TEXT), None)).from_pretrained(tmp_path, pruning=pruning)
    assert loaded.base_model.learned_pruning().values == pytest.approx(pruning.values)
    assert loaded.bert.token_budget.linear.item() == 0.0


def test_multipliers_ascend_under_descent():
    multipliers = BudgetMultipliers()
    cost = torch.tensor(0.8, requires_grad=True)
    optimizer = torch.optim.SGD([*multipliers.parameters()], lr=1.0)
    loss = multipliers(cost - 0.5)
    assert loss.item() == 0.0
    loss.backward()
    optimizer.step()
    assert multipliers.linear.item() == pytest.approx(0.3)
    assert multipliers.quadratic.item() == pytest.approx(0.09)
    cost.grad = None
    optimizer.zero_grad()
    multipliers(cost - 0.5).backward()
    assert cost.grad.item() == pytest.approx(0.3 + 2 * 0.09 * 0.3)


def test_a_cost_below_its_target_owes_nothing():
    multipliers = BudgetMultipliers()
    cost = torch.tensor(0.3, requires_grad=True)
    multipliers(cost - 0.5).backward()
    assert multipliers.linear.grad.item() == 0.0 and cost.grad.item() == 0.0
    with torch.no_grad():
        multipliers.linear.fill_(-0.1)  # as momentum leaves it
    multipliers.zero_grad()
    assert multipliers(torch.tensor(0.2)).item() == 0.0
    multipliers(torch.tensor(0.2)).backward()
    assert multipliers.linear.grad.item() == pytest.approx(-0.2)


@pytest.mark.parametrize(
    "rule, values", [("relative_threshold", [0.7, 0.8, 0.9]), ("median_threshold", [0.97, 0.99, 1.02])]
)
def test_votes_of_tokens_that_are_going_do_not_count(rule, values):
    """`received_from_others`, the third score that a threshold can be learned for."""
    stage = {"layers": [0, 1, 2], "saliency": "received_from_others", "rule": rule, "values": values}
    objective = {"name": "budget", "target_macs": 0.5, "temperature": 1e-10}
    model = soft_model(TEXT, {"stages": [stage], "objective": objective, "format_version": 1})
    inputs = tiny.inputs_for(TEXT)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(**inputs).logits, model.eval()(**inputs).logits, rtol=0, atol=1e-5)


def test_budgets_of_a_preset_that_awaits_the_depth():
    given = PruningConfig.preset("length_adaptive", keep_rate=0.5, budgets=[[0.4, [0.8, 0.5, 0.3, 0.2]]])
    assert PruningConfig.from_dict(given.to_dict()) == given
    assert given.resolve(4).at_budget(0.4, 64).values == (0.8, 0.5, 0.3, 0.2)
    with pytest.raises(ValueError, match="there are 5"):
        given.resolve(5)


def test_reentrant_checkpointing_is_refused_in_the_soft_phase():
    model = soft_model(TEXT, PruningConfig.coerce(PRUNINGS["budget"], tiny.LAYERS)).float()
    inputs = {**tiny.inputs_for(TEXT), "labels": torch.tensor([0, 1, 2, 0])}
    plain = model(**inputs).loss
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = model(**inputs).loss
    torch.testing.assert_close(again, plain)
    again.backward()
    assert model.bert.encoder.layer[1].token_mask.log_threshold.grad is not None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match=r"use_reentrant \(True\) must be False"):
        model(**inputs)


def test_a_loss_that_leaves_the_objective_out_is_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr(modeling_tokenprune.logger, "warning_once", said.append)
    model = soft_model(TEXT, PruningConfig.coerce(PRUNINGS["budget"], tiny.LAYERS)).float()
    inputs = tiny.inputs_for(TEXT)
    model(**inputs, labels=torch.tensor([0, 1, 2, 0]))
    model(**inputs, encoder_call=EncoderCall())  # who collects the work adds it
    assert not said
    model(**inputs)
    assert len(said) == 1 and "TokenPruneTrainer" in said[0]
    assert model.eval()(**inputs).pruning_loss is None
    assert len(said) == 1


BAD = [
    ({"name": "lagrange"}, "unknown objective 'lagrange'"),
    ({"name": "budget"}, r"target_macs \(None\) must be given"),
    ({"name": "ltp", "target_macs": 0.5}, r"target_macs \(0.5\) must be given with objective 'budget'"),
    ({"name": "budget", "target_macs": 1.5}, r"target_macs \(1.5\) must be in \(0, 1\]"),
    ({"name": "ltp", "temperature": 0}, r"temperature \(0.0\) must be > 0"),
    ({"name": "budget", "target_macs": 0.5, "penalty": -1.0}, r"penalty \(-1.0\) must be >= 0"),
    ({"name": "power_bert", "temperature": 1.0}, r"temperature \(1.0\) must not be given"),
    ({"name": "ltp", "penalty": -1}, r"penalty \(-1.0\) must be >= 0"),
    ({"name": "ltp", "phase": "warm"}, "unknown phase 'warm'"),
    ({"name": "ltp", "weight": 1}, "unknown field 'weight'"),
    ({"name": "dynamicvit"}, "objective 'dynamicvit' trains stages with rule 'keep_rate'"),
    (3, r"objective \(3\) must be an Objective"),
]


@pytest.mark.parametrize("objective, message", BAD)
def test_bad_objectives_are_refused(objective, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig.preset("adaptive", layers=[1], threshold=0.5, objective=objective)


def test_a_score_that_comes_after_the_masks_is_refused():
    stage = {"layers": [1], "saliency": "residual_shift", "rule": "keep_count", "values": [5]}
    with pytest.raises(ValueError, match=r"objective 'power_bert' needs saliency .*, not 'residual_shift'"):
        PruningConfig(stages=[stage], objective="power_bert")


def test_an_objective_survives_json():
    pruning = PruningConfig.coerce(PRUNINGS["budget"], tiny.LAYERS)
    assert PruningConfig.from_dict(pruning.to_dict()) == pruning
    assert Objective.coerce(asdict(pruning.objective)) == pruning.objective


BUDGETS = [[0.3, [0.4, 0.16]], [0.6, [0.7, 0.5]], [0.9, [1.0, 1.0]]]


def test_one_checkpoint_many_budgets(tmp_path):
    pruning = PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.4, budgets=BUDGETS)
    model = prune(tiny.build(TEXT), pruning)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for macs, values in [(0.3, (0.4, 0.16)), (0.45, (0.55, 0.33)), (0.9, (1.0, 1.0)), (1.0, (1.0, 1.0))]:
        again.set_budget(macs)
        assert again.config.pruning.values == pytest.approx(values)
    for wrong in (0.29, 1.01, "half"):
        with pytest.raises(ValueError, match="budget"):
            again.set_budget(wrong)
    assert again.config.pruning.values == (1.0, 1.0)
    again.set_pruning(replace(pruning, budgets=BUDGETS[:2]))
    for macs, values in [(0.6, (0.7, 0.5)), (0.8, (0.85, 0.75)), (1.0, (1.0, 1.0))]:  # at 1 nothing is pruned
        again.set_budget(macs)
        assert again.config.pruning.values == pytest.approx(values)
    again.set_pruning(None)
    with pytest.raises(ValueError, match=r"budget \(0.5\) needs a pruning with budgets"):
        again.set_budget(0.5)


@pytest.mark.parametrize(
    "budgets, message",
    [
        ([[0.6, [0.5, 0.2]], [0.3, [0.4, 0.1]]], "must rise"),
        ([[0.6, [0.5]]], "must be one per site"),
        ([[0.6]], "must be pairs"),
        ([[0.6, [1.5, 0.2]]], r"keep_rate \(1.5\) must be in"),
        ([[0.6, [0.5, 0.8]]], "a budget's keep_rate .* must not rise"),
        ([[1.6, [0.5, 0.2]]], r"MAC ratio \(1.6\) must be in \(0, 1\]"),
    ],
)
def test_bad_budgets_are_refused(budgets, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.4, budgets=budgets)


def test_a_base_model_returns_what_an_objective_adds(monkeypatch):
    """Whoever trains a base model has a loss of their own; they are told so."""
    said = []
    monkeypatch.setattr(modeling_tokenprune.logger, "warning_once", said.append)
    native, inputs = tiny.build(TEXT), tiny.text_inputs([17, 5, 30, 1])
    head, base = pruned(native, PRUNINGS["budget"]), pruned(native.bert, PRUNINGS["budget"])
    assert base(**inputs).pruning_loss is None and not said
    loss = base.train()(**inputs).pruning_loss
    assert len(said) == 1 and "`pruning_loss`" in said[0]
    loss.backward()
    assert base.encoder.layer[1].token_mask.log_threshold.grad.abs() > 0
    head.train()(**inputs, labels=torch.tensor([0, 1, 2, 0]))
    assert len(said) == 1  # a head's loss has it
