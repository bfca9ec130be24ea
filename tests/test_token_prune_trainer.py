"""`TokenPruneTrainer`: what it adds to the stock Trainer, and that an interrupted run ends as one that was not."""

import copy
import json
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback

from hf_tokenprune import PruningConfig, TokenPruneTrainer, TokenPruneTrainingArguments, count_macs, prune
from hf_tokenprune.modeling.token_outputs import EncoderCall
from hf_tokenprune.training import trainer as trainer_module
from hf_tokenprune.training.budget import check_reach, thresholds_for_budget
from hf_tokenprune.training.distillation import difference_to_teacher, kept_token_mse
from hf_tokenprune.training.schedule import KeepRateWarmup


TEXT = next(param.values[0] for param in tiny.HEADS if param.id == "BertForSequenceClassification")
TOKENS = next(param.values[0] for param in tiny.HEADS if param.id == "BertForTokenClassification")
BUDGET = {
    "preset": "adaptive",
    "layers": [1, 2],
    "threshold": 0.5,
    "objective": {"name": "budget", "target_macs": 0.6, "temperature": 0.3},
}
TOP_K = {"preset": "top_k", "layers": [1, 2], "keep_rate": 0.5}
SANDWICH = {**TOP_K, "budgets": [[0.5, [0.3, 0.09]], [0.9, [1.0, 1.0]]]}


def native_model(case: tiny.Case = TEXT) -> PreTrainedModel:
    config = copy.deepcopy(case.config)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return tiny.build(tiny.Case(case.native, config))


def rows_of(case: tiny.Case = TEXT, count: int = 24) -> list[dict[str, torch.Tensor]]:
    inputs = tiny.text_inputs([8 + (7 * i) % 20 for i in range(count)])
    rows = [{name: value[i] for name, value in inputs.items()} for i in range(count)]
    for index, row in enumerate(rows):
        row["labels"] = row["input_ids"] % 3 if case is TOKENS else torch.tensor(index % 3)
    return rows


def trainer_for(
    pruning: Any, folder: Path, *, case: tiny.Case = TEXT, rows: list | None = None, **arguments: Any
) -> TokenPruneTrainer:
    options = {name: arguments.pop(name) for name in ("teacher", "callbacks") if name in arguments}
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    rows = rows_of(case) if rows is None else rows
    args = TokenPruneTrainingArguments(str(folder), **{**defaults, **arguments})
    model = pruning if isinstance(pruning, torch.nn.Module) else prune(native_model(case), pruning)
    return TokenPruneTrainer(model, args, train_dataset=rows, eval_dataset=rows, **options)


def test_a_budget_is_met_and_logged(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            objective = model.config.pruning.objective
            seen.append((objective.phase, objective.target_macs, objective.temperature))

    arguments = {"max_steps": 20, "pruner_learning_rate": 0.1, "final_temperature": 0.03, "callbacks": [Watch()]}
    trainer = trainer_for(BUDGET, tmp_path, **arguments)
    trainer.train()

    assert [phase for phase, _, _ in seen] == ["soft"] * 10 + ["hard"] * 10
    hard = [entry["mac_ratio"] for entry in trainer.state.log_history if "loss" in entry][10]
    assert hard == pytest.approx(0.6, abs=0.03)  # met at the switch, and not at the end alone
    batch = {name: torch.stack([row[name] for row in rows_of()]) for name in ("input_ids", "attention_mask")}
    start = count_macs(prune(native_model(), None), batch).ratio
    falling = [start - (start - 0.6) * share for share in (0, 0.25, 0.5, 0.75, 1, 1)]
    assert [target for _, target, _ in seen[:6]] == pytest.approx(falling, abs=1e-5)
    assert [temperature for _, _, temperature in seen[:10]] == pytest.approx([0.3 * 0.1 ** (i / 10) for i in range(10)])
    pruning = trainer.model.config.pruning
    assert pruning.objective is None and not any("token_mask" in name for name in trainer.model.state_dict())
    assert trainer.evaluate()["eval_mac_ratio"] == pytest.approx(0.6, abs=0.02)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"mac_ratio", "alive_tokens_layer_1", "alive_tokens_layer_2"} <= set(logged[0])
    assert all(entry["alive_tokens_layer_2"] <= entry["alive_tokens_layer_1"] for entry in logged)


def test_training_goes_on_from_thresholds_that_were_learned(tmp_path):
    trainer = trainer_for(BUDGET, tmp_path, max_steps=1, learning_rate=1e-9)
    mask = trainer.model.bert.encoder.layer[1].token_mask
    with torch.no_grad():
        mask.log_threshold.fill_(1.5)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append(model.bert.encoder.layer[1].token_mask.log_threshold.item())

    trainer.add_callback(Watch())
    trainer.train()
    assert seen == pytest.approx([1.5], abs=1e-5)


def test_evaluation_reports_what_count_macs_counts(tmp_path):
    trainer = trainer_for(TOP_K, tmp_path)
    batch = {name: torch.stack([row[name] for row in rows_of()]) for name in ("input_ids", "attention_mask")}
    expected = count_macs(trainer.model, batch).ratio
    assert trainer.evaluate()["eval_mac_ratio"] == pytest.approx(expected)
    assert trainer.predict(rows_of()).metrics["test_mac_ratio"] == pytest.approx(expected)
    unlabelled = [{name: value for name, value in row.items() if name != "labels"} for row in rows_of()]
    assert trainer.predict(unlabelled).metrics["test_mac_ratio"] == pytest.approx(expected)


def test_a_warm_up_ends_at_the_target_and_is_evaluated_there(tmp_path):
    values = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            values.append(model.config.pruning.values)

    arguments = {"keep_rate_warmup_start": 0.25, "keep_rate_warmup_end": 0.75, "callbacks": [Watch()]}
    trainer = trainer_for(TOP_K, tmp_path, eval_strategy="steps", eval_steps=1, **arguments)
    trainer.train()
    shares = [KeepRateWarmup(0.25, 0.75).progress(step / 8) for step in range(8)]
    assert shares[2] == 0.0 and shares[4] == pytest.approx(0.5) and shares[6] == 1.0
    for found, share in zip(values, shares):
        assert found == pytest.approx((1 - 0.5 * share, 1 - 0.75 * share))
    ratios = [entry["eval_mac_ratio"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(ratios) == 8 and max(ratios) - min(ratios) < 1e-9
    assert trainer.model.config.pruning == PruningConfig.coerce(TOP_K, tiny.LAYERS)


@pytest.mark.parametrize("case", [TEXT, TOKENS])
def test_the_distilled_loss_is_the_naive_one(case, tmp_path):
    teacher = tiny.build(case, seed=3)
    weights = {"distillation_weight": 0.7, "distillation_temperature": 3.0, "token_distillation_weight": 0.4}
    trainer = trainer_for(TOP_K, tmp_path, case=case, teacher=teacher, **weights)
    inputs = {name: torch.stack([row[name] for row in rows_of(case)[:5]]) for name in rows_of(case)[0]}
    loss = trainer.compute_loss(trainer.model.train(), inputs)

    plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    output = trainer.model(**inputs, output_hidden_states=True, output_token_trace=True)
    taught = teacher(**plain, output_hidden_states=True)
    wanted, given = (x.logits.div(3).softmax(-1) for x in (taught, output))
    divergence = (wanted * (wanted / given).log()).sum(-1)
    real = inputs["attention_mask"].bool()
    divergence = 9 * (divergence.mean() if case is TEXT else divergence[real].mean())
    kept = output.token_trace.source[-1] >= 0
    assert kept.sum() < real.sum()
    error = (output.hidden_states[-1] - taught.hidden_states[-1])[kept].square().mean()
    torch.testing.assert_close(loss, output.loss + 0.7 * divergence + 0.4 * error, rtol=1e-4, atol=1e-5)


def test_a_teacher_that_shares_its_weights_stays_as_it_was(tmp_path):
    base = native_model()
    args = TokenPruneTrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, distillation_weight=1.0,
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trainer = TokenPruneTrainer(prune(base, TOP_K), args, train_dataset=rows_of(), teacher=base)
    trainer.train()
    assert all(torch.equal(trainer.teacher.state_dict()[name], tensor) for name, tensor in before.items())
    assert any(not torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_sandwich_is_the_full_model_the_smallest_and_a_random_one(tmp_path):
    trainer = trainer_for(SANDWICH, tmp_path, sandwich_samples=1, distillation_temperature=1.0)
    inputs = {name: torch.stack([row[name] for row in rows_of()[:5]]) for name in rows_of()[0]}
    loss = trainer.compute_loss(trainer.model.train(), inputs)
    model = trainer.model
    start = model.config.pruning
    model.set_pruning(None)
    whole = model(**inputs)
    expected, differences = whole.loss, []
    for macs in (0.5, random.Random(f"{trainer.args.seed}/0").uniform(0.5, 0.9)):
        model.set_pruning(start.at_budget(macs, 64))
        differences.append(difference_to_teacher(model(**inputs).logits, whole.logits, 1.0))
    assert min(differences) > 0
    torch.testing.assert_close(loss, expected + sum(differences))
    model.set_pruning(start)
    loss.backward()
    trainer.train()
    assert model.config.pruning == start


@pytest.mark.parametrize("name", ["top_k", "dynamicvit"])
def test_in_place_labels_teach_the_unpruned_model_and_that_the_pruned_one(name, tmp_path):
    pruning = TOP_K if name == "top_k" else {"preset": "dynamicvit", "layers": [1, 2], "base_rate": 0.6}
    trainer = trainer_for(pruning, tmp_path, in_place_distillation=True, distillation_temperature=3.0)
    inputs = {name: torch.stack([row[name] for row in rows_of()[:5]]) for name in rows_of()[0]}
    torch.manual_seed(0)
    loss = trainer.compute_loss(trainer.model.train(), inputs)
    model = trainer.model
    start = model.config.pruning
    model.set_pruning(None)
    torch.manual_seed(0)
    whole = model(**inputs)
    model.set_pruning(start)
    call = EncoderCall(work=True)
    logits = model(**inputs, encoder_call=call).logits
    difference = difference_to_teacher(logits, whole.logits, 3.0)
    more = model.base_model.pruning_loss(call)
    assert difference > 1e-7 and (more is None) == (name == "top_k")
    torch.testing.assert_close(loss, whole.loss + difference + (0.0 if more is None else more))
    assert trainer.work.take()["mac_ratio"] < 0.9 or more is not None  # masks of an untrained predictor remove little
    trainer.train()
    assert model.config.pruning.values == start.values


def test_predictions_are_in_the_order_of_the_data(tmp_path):
    trainer = trainer_for(TOP_K, tmp_path, train_sampling_strategy="group_by_length")
    expected = torch.stack([row["labels"] for row in rows_of()]).tolist()
    assert trainer.predict(rows_of()).label_ids.tolist() == expected


@pytest.mark.parametrize("pruning", [TOP_K, {"preset": "adaptive", "layers": [1, 2], "threshold": 2.0}])
def test_budgets_are_found(pruning, tmp_path):
    trainer = trainer_for(pruning, tmp_path, budgets=[0.8, 0.65, 1.0], max_steps=1, learning_rate=0.0)
    trainer.train()
    budgets = trainer.pruned.config.pruning.budgets
    assert [ratio for ratio, _ in budgets] == [0.65, 0.8, 1.0]
    for ratio, _ in budgets[:2]:
        trainer.pruned.set_budget(ratio)
        assert trainer.evaluate(trainer.train_dataset)["eval_mac_ratio"] == pytest.approx(ratio, abs=0.02)
    assert budgets[2][1] == trainer.pruned.config.pruning.eased(0.0, 32).values  # 1: nothing is pruned
    with pytest.raises(ValueError, match=r"a budget \(0.1\) must be at least 0\.\d"):
        trainer_for(pruning, tmp_path, budgets=[0.1], max_steps=1).train()


@pytest.mark.parametrize("relative_to", ["median", "total"])
def test_thresholds_meet_a_target_without_an_objective(relative_to, tmp_path):
    start = {"preset": "adaptive", "layers": [1, 2], "threshold": [0.1, 0.2], "relative_to": relative_to}
    start = {**start, "prior_threshold": 0.05}
    trainer = trainer_for(start, tmp_path, target_macs=0.6, keep_rate_warmup_end=0.5, prior_samples=16)
    trainer.train()
    pruning = trainer.pruned.config.pruning
    ratios = [value / first for value, first in zip(pruning.values, PruningConfig.coerce(start, 4).values)]
    assert ratios == pytest.approx([ratios[0]] * 3) and ratios[0] != 1.0  # one factor
    assert trainer.evaluate(trainer.train_dataset)["eval_mac_ratio"] == pytest.approx(0.6, abs=0.02)
    with pytest.raises(ValueError, match=r"target_macs \(0.01\) must be at least 0\.\d"):
        trainer_for(start, tmp_path, target_macs=0.01, prior_samples=16).train()
    with pytest.raises(ValueError, match=r"target_macs \(0.6\) needs thresholds to move, .* not \['keep_rate'\]"):
        trainer_for(TOP_K, tmp_path, target_macs=0.6)
    for other in (None, BUDGET):
        with pytest.raises(ValueError, match=r"target_macs \(0.6\) needs a pruning without an objective"):
            trainer_for(other, tmp_path, target_macs=0.6)


@pytest.mark.parametrize("given, rate", [({"pruner_learning_rate": 0.5}, 0.5), ({}, 1e-9)])
def test_the_pruner_has_a_learning_rate_of_its_own_and_no_decay(given, rate, tmp_path):
    trainer = trainer_for(BUDGET, tmp_path, learning_rate=1e-9, weight_decay=0.1, **given)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    own = [names[id(p)] for p in groups[-1]["params"]]
    assert groups[-1]["lr"] == rate and groups[-1]["weight_decay"] == 0.0
    assert len(own) == 4 and all("token_mask" in name or "token_budget" in name for name in own)
    assert sum(len(group["params"]) for group in groups) == len(names)


@pytest.mark.parametrize(
    "pruning, saved",
    [
        (BUDGET, ["token_mask", "token_budget"]),
        ({"preset": "dynamicvit", "layers": [1, 2], "base_rate": 0.6}, ["token_predictor"]),
    ],
    ids=["budget", "dynamicvit"],
)
def test_adapters_and_a_pruner_that_is_saved_whole(pruning, saved, tmp_path):
    peft = pytest.importorskip("peft")
    model = prune(native_model(), pruning)
    start = {name: tensor.clone() for name, tensor in model.named_parameters()}
    lora = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=[*saved, "classifier"], task_type="SEQ_CLS")
    arguments = {"pruner_learning_rate": 0.1, "save_strategy": "steps", "save_steps": 2, "report_to": ["tensorboard"]}
    trainer = trainer_for(peft.get_peft_model(model, lora), tmp_path, **arguments)
    trainer.train()
    weights = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    moved = {name for name in weights if any(part in saved for part in name.split("."))}
    for name in moved:  # two steps of the soft phase
        before = start[name.removeprefix("base_model.model.")]
        assert (weights[name] - before).abs().max() > 0, name
    assert len(moved) == (4 if pruning is BUDGET else 20)
    values = trainer.pruned.config.pruning.values
    assert pruning is not BUDGET or values[0] != values[1]  # each has learned its own
    assert list((tmp_path / "runs").rglob("events.out.*"))


RESUMED = {
    "budget": (BUDGET, {"pruner_learning_rate": 0.1}),
    "budget_prior": (
        {**BUDGET, "layers": [1], "threshold": 0.8, "prior_threshold": 0.9},
        {"pruner_learning_rate": 0.1, "prior_samples": 16},
    ),
    "dynamicvit": ({"preset": "dynamicvit", "layers": [1, 2], "base_rate": 0.6}, {"pruner_learning_rate": 0.01}),
    "warmup": (TOP_K, {"keep_rate_warmup_end": 0.8}),
    "sandwich": (TOP_K, {"sandwich_samples": 1, "budgets": [0.7, 0.8]}),
    "in_place": (TOP_K, {"in_place_distillation": True, "keep_rate_warmup_end": 0.5}),
}


@pytest.mark.parametrize("stop", [2, 4, 6])  # in the soft phase, at the switch, in the hard phase
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_same_weights(name, stop, tmp_path):
    pruning, arguments = RESUMED[name]
    arguments = {**arguments, "save_strategy": "steps", "save_steps": 2}
    torch.manual_seed(0)
    straight = trainer_for(pruning, tmp_path, **arguments)
    straight.train()
    torch.manual_seed(0)
    again = trainer_for(pruning, tmp_path, **arguments)
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.zero_()
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert again.model.config.pruning.values == pytest.approx(straight.model.config.pruning.values, abs=1e-6)
    for key, tensor in straight.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[key], tensor, rtol=0, atol=1e-6, msg=key)


def test_true_goes_on_from_the_last_whole_checkpoint(tmp_path):
    steps = []

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    arguments = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(ValueError, match=r"output_dir \(.*\) must hold a checkpoint that was written to its end"):
        trainer_for(TOP_K, tmp_path, **arguments).train(resume_from_checkpoint=True)
    trainer_for(TOP_K, tmp_path, **arguments).train()
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text("")
    trainer_for(TOP_K, tmp_path, callbacks=[Steps()], **arguments).train(resume_from_checkpoint=True)
    assert steps == [6, 7]


def test_beside_a_model_is_no_pickle_but_what_resuming_reads(tmp_path):
    trainer = trainer_for(TOP_K, tmp_path, max_steps=1, save_strategy="steps", save_steps=1, hub_token="hf_secret")
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    for folder in (tmp_path / "model", tmp_path / "checkpoint-1"):
        pickles = {path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")}
        resuming = {"optimizer.pt", "scheduler.pt", "rng_state.pth"} if "checkpoint" in folder.name else set()
        assert pickles == resuming
        arguments = json.loads((folder / "training_args.json").read_text())
        assert arguments["learning_rate"] == 1e-3 and arguments["hub_token"] != "hf_secret"


def test_bad_input_is_one_sentence_and_checkpoints_stay(tmp_path):
    rows = rows_of()
    rows[20]["labels"] = torch.tensor(7)
    trainer = trainer_for(TOP_K, tmp_path, rows=rows, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=r"label \(7\) must be in \[0, 2\]"):
        trainer.train()

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.classifier.bias.fill_(torch.nan)

    trainer = trainer_for(TOP_K, tmp_path / "nan", save_strategy="steps", save_steps=1, callbacks=[Poison()])
    with pytest.raises(ValueError, match=r"loss \(nan\) at step 2 must be finite"):
        trainer.train()
    last = type(trainer.model).from_pretrained(tmp_path / "nan" / "checkpoint-2")
    assert all(tensor.isfinite().all() for tensor in last.state_dict().values())

    other = copy.deepcopy(TEXT.config)
    other.num_labels = 5
    with pytest.raises(ValueError, match=r"the teacher's num_labels \(5\) must be the student's \(3\)"):
        trainer_for(TOP_K, tmp_path, teacher=tiny.build(tiny.Case(TEXT.native, other)))
    other = copy.deepcopy(TEXT.config)
    other.vocab_size = 60
    with pytest.raises(ValueError, match=r"the teacher's vocab_size \(60\) must be the student's \(50\)"):
        trainer_for(TOP_K, tmp_path, teacher=tiny.build(tiny.Case(TEXT.native, other)))
    other = copy.deepcopy(TEXT.config)
    other.hidden_size = 16
    narrow = tiny.build(tiny.Case(TEXT.native, other))
    trainer_for(TOP_K, tmp_path, teacher=narrow, distillation_weight=1.0)  # logits have no width
    with pytest.raises(ValueError, match=r"the teacher's hidden_size \(16\) must be the student's \(32\)"):
        trainer_for(TOP_K, tmp_path, teacher=narrow, token_distillation_weight=1.0)
    with pytest.raises(ValueError, match="without a teacher"):
        trainer_for(TOP_K, tmp_path, distillation_weight=0.5)
    with pytest.raises(ValueError, match=r"sandwich_samples \(1\) needs budgets"):
        trainer_for(TOP_K, tmp_path, sandwich_samples=1)
    with pytest.raises(ValueError, match=r"in_place_distillation \(True\) needs a pruning"):
        trainer_for(None, tmp_path, in_place_distillation=True)
    with pytest.raises(ValueError, match=r"keep_rate_warmup_end \(0.5\) must be 0 with sandwich_samples \(1\)"):
        trainer_for(SANDWICH, tmp_path, sandwich_samples=1, keep_rate_warmup_end=0.5)
    for name, value in (("sandwich_samples", 1), ("keep_rate_warmup_end", 0.5), ("in_place_distillation", True)):
        with pytest.raises(ValueError, match=rf"{name} \({value}\) must not be set with objective 'budget'"):
            trainer_for({**BUDGET, "budgets": [[0.5, [9.0, 9.0]]]}, tmp_path, **{name: value})
    with pytest.raises(ValueError, match=r"soft_share \(1.5\) must be in \[0, 1\]"):
        trainer_for(TOP_K, tmp_path, soft_share=1.5)
    with pytest.raises(TypeError, match="is not a token pruning model"):
        TokenPruneTrainer(native_model(), TokenPruneTrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))


def test_thresholds_move_together_to_the_budget():
    pruning = PruningConfig.preset("adaptive", layers=[1, 2], threshold=[0.2, 0.4])

    def ratio_at(tried: PruningConfig) -> float:
        return 1 / (1 + tried.values[0])

    found = thresholds_for_budget(pruning, 0.5, ratio_at)
    assert found.values[0] == pytest.approx(1.0, abs=0.02)
    assert found.values[1] == pytest.approx(2 * found.values[0])
    with pytest.raises(ValueError, match=r"target_macs \(1e-09\) must be at least 0.000"):
        check_reach(pruning, 1e-9, ratio_at)
    tiny = thresholds_for_budget(pruning.with_values([1e-5, 2e-5]), 0.5, ratio_at)
    assert tiny.values[0] == pytest.approx(1.0, abs=0.02)
    with pytest.raises(ValueError, match=r"thresholds \(\[0.0, 0.0\]\) must not all be 0 with target_macs \(0.5\)"):
        check_reach(pruning.with_values([0.0, 0.0]), 0.5, ratio_at)


def test_a_target_that_was_missed_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(trainer_module.logger, "warning", said.append)
    trainer = trainer_for(BUDGET, tmp_path)
    trainer._check_met(0.5, 0.505)
    trainer._check_met(0.5, 0.6)
    assert len(said) == 1 and "target_macs (0.5) is missed: 0.600 is as close as thresholds come" in said[0]


def test_a_budget_out_of_reach_ends_before_training(tmp_path):
    wish = {**BUDGET, "objective": {"name": "budget", "target_macs": 0.1}}
    trainer = trainer_for(wish, tmp_path)
    with pytest.raises(ValueError, match=r"target_macs \(0.1\) must be at least 0\.\d+.*layers \[1, 2\]"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_kept_tokens_alone_are_compared():
    model = prune(native_model(), TOP_K)
    call = EncoderCall(trace=True)
    inputs = tiny.text_inputs([12, 7], padding=1)
    with torch.no_grad():
        model(**inputs, encoder_call=call)
    student = torch.zeros(2, 13, 4)
    teacher = torch.zeros(2, 13, 4)
    gone = call.end.carrier < 0
    teacher[gone] = 9.0
    assert kept_token_mse(student, teacher, call.end) == 0.0
    teacher[0, 0] = 2.0
    assert kept_token_mse(student, teacher, call.end) == pytest.approx(4.0 / int((~gone).sum()))


PROCESS = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from test_token_prune_trainer import BUDGET, trainer_for
torch.manual_seed(0)
trainer = trainer_for(BUDGET, {folder!r}, per_device_train_batch_size=3, max_steps=6, pruner_learning_rate=0.1,
                      per_device_eval_batch_size=5, budget_samples=12, gradient_checkpointing={checkpointing},
                      label_smoothing_factor={smoothing}, eval_use_gather_object={smoothing} > 0)
trainer.train()
scores = trainer.evaluate()
weights = [parameter.detach().double().sum() for parameter in trainer.model.parameters()]
values = torch.tensor([*trainer.model.config.pruning.values, *weights])
everyone = trainer.accelerator.gather(values[None].contiguous())
assert torch.equal(everyone[0], everyone[-1]), everyone
assert trainer.args.world_size == 2
trainer.model.set_pruning("top_k")
again = trainer.predict(trainer.eval_dataset)
if trainer.is_world_process_zero():
    trainer.save_model({folder!r} + "/model")
    print("SCORES", again.metrics["test_mac_ratio"], *again.predictions.flatten(), flush=True)
trainer.accelerator.wait_for_everyone()
os._exit(0)  # threads of gloo sometimes abort an interpreter that is shutting down
"""


@pytest.mark.parametrize("checkpointing, smoothing", [(False, 0.0), (True, 0.0), (False, 0.1)])
def test_two_processes_learn_the_same_and_evaluate_as_one(checkpointing, smoothing, tmp_path):
    """With smoothed labels the Trainer makes a loss of its own, outside of what its processes share."""
    script = tmp_path / "train.py"
    names = {"folder": str(tmp_path), "checkpointing": checkpointing, "smoothing": smoothing}
    script.write_text(textwrap.dedent(PROCESS.format(tests=str(Path(__file__).parent), **names)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if "SCORES" in line)
    ratio, *logits = map(float, line.partition("SCORES")[2].split())
    trainer = trainer_for("top_k", tmp_path)
    trainer.model.load_state_dict(type(trainer.model).from_pretrained(tmp_path / "model").state_dict())
    one = trainer.predict(trainer.eval_dataset)
    assert ratio == pytest.approx(one.metrics["test_mac_ratio"], abs=1e-9)
    assert logits == pytest.approx(one.predictions.flatten().tolist(), abs=1e-5)


def test_label_smoothing_keeps_the_objectives_loss(tmp_path):
    trainer = trainer_for(
        {"preset": "ltp", "final_token_threshold": 0.03, "objective": "ltp"}, tmp_path, label_smoothing_factor=0.1
    )
    inputs = {name: torch.stack([row[name] for row in rows_of()[:5]]) for name in rows_of()[0]}
    loss = trainer.compute_loss(trainer.model.train(), dict(inputs))
    output = trainer.model(**inputs)
    extra = output.loss - F.cross_entropy(output.logits, inputs["labels"])
    smoothed = F.cross_entropy(output.logits, inputs["labels"], label_smoothing=0.1)
    assert extra > 0
    torch.testing.assert_close(loss, smoothed + extra, rtol=1e-4, atol=1e-4)
