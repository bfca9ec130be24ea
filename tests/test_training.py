"""The stock Trainer trains, evaluates and resumes pruned models like any other."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from methods import METHODS, pruned
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from hf_tokenprune import PruningConfig, prune
from hf_tokenprune.modeling.token_layer import TokenPruneLayer


PRUNINGS = {
    "top_k": PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.6),
    "adaptive": PruningConfig.preset("adaptive", layers=[1], threshold=0.9),
    "none": None,
}
LENGTH = 12
heads = pytest.mark.parametrize("case", tiny.LEARNING_HEADS)
prunings = pytest.mark.parametrize("pruning", PRUNINGS)


def pruned_model(case: tiny.Case, pruning: str = "top_k", **changes: Any) -> PreTrainedModel:
    """Without dropout, so that two ways of training can be compared."""
    config = copy.deepcopy(case.config)
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **changes}
    for name, value in changes.items():
        setattr(config, name, value)
    return prune(tiny.build(tiny.Case(case.native, config)), PRUNINGS[pruning])


def rows_for(case: tiny.Case, count: int = 8) -> list[dict[str, Any]]:
    """Samples of one class each, three classes, and for texts as many labels as tokens where those are labelled."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(count):
        if case.text:
            ids = torch.randint(1, tiny.VOCABULARY, (LENGTH,), generator=generator)
            row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:
            row = {"pixel_values": torch.randn(3, 24, 24, generator=generator)}
        row["labels"] = row["input_ids"] % 3 if "Token" in str(case) else torch.tensor(index % 3)
        rows.append(row)
    return rows


def trainer_for(
    model: PreTrainedModel, rows: list, folder: Path, *, compute_metrics: Callable | None = None, **arguments: Any
) -> Trainer:
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(folder), **{**defaults, **arguments})
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=compute_metrics)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(case: tiny.Case, folder: Path, pruning: str = "top_k", **arguments: Any) -> tuple[dict[str, Any], Trainer]:
    """The parameters after training. One step of plain descent at rate 1 moves them by their gradients."""
    arguments = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, **arguments}
    model = pruned_model(case, pruning)
    trainer = trainer_for(model, rows_for(case), folder, **arguments)
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}, trainer


def moves(case: tiny.Case, after: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    before = dict(pruned_model(case).named_parameters())
    return {name: (tensor - before[name]).detach() for name, tensor in after.items()}


def assert_same_moves(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert sum(move.abs().max() > 1e-4 for move in expected.values()) > len(expected) / 2
    scale = max(move.abs().max().item() for move in expected.values())
    for name, move in expected.items():
        torch.testing.assert_close(found[name], move, rtol=0, atol=tolerance * scale, msg=name)


@prunings
@heads
def test_the_loss_falls(case, pruning, tmp_path):
    trainer = trainer_for(pruned_model(case, pruning), rows_for(case), tmp_path, max_steps=25)
    trainer.train()
    assert len(losses(trainer)) == 25
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_two_steps(name, tmp_path):
    case = tiny.cases(tiny.LEARNING_HEADS)[0]
    model = pruned(pruned_model(case, "none"), METHODS[name])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trainer_for(model, rows_for(case), tmp_path, max_steps=2)
    trainer.train()
    assert len(losses(trainer)) == 2 and np.isfinite(losses(trainer)).all()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    moved = [not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters()]
    assert sum(moved) > 0.8 * len(moved)  # all but predictors whose ranks have no gradient


@pytest.mark.parametrize("case", tiny.HEADS)
def test_dropout_is_on_in_training_alone(case):
    model = pruned_model(case, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.3)
    inputs = tiny.inputs_for(case)
    first, second = (model.train()(**inputs).logits for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (model.eval()(**inputs).logits for _ in range(2))
    assert torch.equal(first, second)


@prunings
@heads
def test_accumulated_gradients_are_those_of_the_large_batch(case, pruning, tmp_path):
    whole, whole_trainer = trained(case, tmp_path, pruning)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts, parts_trainer = trained(case, tmp_path, pruning, **split)

    assert losses(parts_trainer) == pytest.approx(losses(whole_trainer), abs=1e-4)
    assert_same_moves(moves(case, parts), moves(case, whole), 1e-4)


@pytest.mark.parametrize(
    "pruning, reentrant", [("top_k", False), ("top_k", True), ("adaptive", False), ("none", False)]
)
@heads
def test_gradient_checkpointing_changes_nothing(case, pruning, reentrant, tmp_path):
    again = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    plain, _ = trained(case, tmp_path, pruning)
    checkpointed, trainer = trained(case, tmp_path, pruning, **again)
    layers = [module for module in trainer.model.modules() if isinstance(module, TokenPruneLayer)]
    assert all(layer.gradient_checkpointing for layer in layers)
    assert_same_moves(moves(case, checkpointed), moves(case, plain), 1e-5)


@heads
def test_bf16_autocast(case, tmp_path):
    trainer = trainer_for(pruned_model(case), rows_for(case), tmp_path, max_steps=25, bf16=True)
    seen = []
    trainer.model.base_model.register_forward_hook(lambda *call: seen.append(torch.is_autocast_enabled("cpu")))
    trainer.train()
    assert all(seen) and seen
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]


def shapes_of_a_run(model: PreTrainedModel, rows: list, folder: Path) -> dict[bool, set[tuple[int, int]]]:
    """How the tokens lie in training and in evaluation."""
    shapes = {True: set(), False: set()}
    layer = next(module for module in model.modules() if isinstance(module, TokenPruneLayer))
    layer.register_forward_pre_hook(lambda layer, inputs: shapes[layer.training].add(tuple(inputs[0].shape[:2])))
    trainer = trainer_for(model, rows, folder)
    trainer.train()
    trainer.evaluate()
    return shapes


@pytest.mark.parametrize("execution", ["auto", *tiny.EXECUTIONS])
@heads
def test_training_runs_in_the_execution_that_was_asked_for(case, execution, tmp_path):
    model = pruned_model(case)
    model.set_pruning(PruningConfig(stages=PRUNINGS["top_k"].stages, execution=execution))
    length = LENGTH if case.text else case.tokens
    expected = (1, 8 * length) if execution in ("auto", "packed") else (8, length)
    assert shapes_of_a_run(model, rows_for(case), tmp_path) == {True: {expected}, False: {expected}}


@pytest.mark.parametrize("case", [param for param in tiny.HEADS if param.id == "Dinov2ForImageClassification"])
def test_stochastic_depth_trains_padded(case, tmp_path):
    shapes = shapes_of_a_run(pruned_model(case, drop_path_rate=0.2), rows_for(case), tmp_path)
    assert shapes == {True: {(8, 37)}, False: {(1, 8 * 37)}}
    asked = pruned_model(case, drop_path_rate=0.2)
    asked.set_pruning(PruningConfig(stages=PRUNINGS["top_k"].stages, execution="packed"))
    with pytest.raises(ValueError, match=r"execution \('packed'\) .* drop_path_rate \(0.2\)"):
        asked.train()(**tiny.image_inputs(2))


@pytest.mark.parametrize("trace", [False, True])
@prunings
@heads
def test_metrics_see_logits_alone(case, pruning, trace, tmp_path):
    rows = rows_for(case)
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    model = pruned_model(case, pruning)
    trainer = trainer_for(model, rows, tmp_path, compute_metrics=metrics, per_device_eval_batch_size=3)
    if trace:
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: {**collate(rows), "output_token_trace": True}
    scores = trainer.evaluate()
    output = trainer.predict(rows)

    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        expected = model(**stacked)
    for prediction in (*seen, output):
        assert isinstance(prediction.predictions, np.ndarray)
        np.testing.assert_allclose(prediction.predictions, expected.logits, atol=1e-5)
        np.testing.assert_array_equal(prediction.label_ids, stacked["labels"])
    assert len(seen) == 2
    assert scores["eval_loss"] == pytest.approx(expected.loss.item(), abs=1e-4)
    assert output.metrics["test_accuracy"] == scores["eval_accuracy"]


@heads
def test_labels_are_found_and_unknown_columns_left_out(case, tmp_path):
    rows = [{**row, "note": "not for the model"} for row in rows_for(case)]
    trainer = trainer_for(pruned_model(case), rows, tmp_path)
    assert find_labels(type(trainer.model)) == ["labels"]
    assert trainer.label_names == ["labels"]
    trainer.train()
    assert "eval_loss" in trainer.evaluate()


@pytest.mark.parametrize("case", [tiny.LEARNING_HEADS[0], *tiny.LEARNING_HEADS[2:]])
def test_training_resumes_where_it_stopped(case, tmp_path):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 3}
    arguments |= {"optim": "adamw_torch", "learning_rate": 3e-3}
    straight, _ = trained(case, tmp_path, **arguments)
    model = pruned_model(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    trainer = trainer_for(model, rows_for(case), tmp_path / "again", **arguments, max_grad_norm=0.0)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    assert trainer.state.global_step == 4
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, straight[name], rtol=0, atol=1e-6, msg=name)
    assert type(model).from_pretrained(tmp_path / "again" / "checkpoint-4").config.pruning == PRUNINGS["top_k"]


@pytest.mark.parametrize("case", tiny.LEARNING_HEADS[1:])
def test_the_best_model_is_loaded_at_the_end(case, tmp_path):
    scores = iter([0.1, 0.9, 0.5])
    trainer = trainer_for(
        pruned_model(case),
        rows_for(case),
        tmp_path,
        compute_metrics=lambda prediction: {"score": next(scores)},
        max_steps=3,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    best, last = (type(trainer.model).from_pretrained(tmp_path / f"checkpoint-{step}").state_dict() for step in (2, 3))
    found = trainer.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in best.items())
    assert any(not torch.equal(found[name], tensor) for name, tensor in last.items())


LABELS = {
    "single_label_classification": lambda shape: torch.arange(shape.numel()).view(shape) % 3,
    "multi_label_classification": lambda shape: (torch.arange(shape.numel() * 3).view(*shape, 3) % 2).float(),
    "regression": lambda shape: torch.linspace(-1, 1, shape.numel() * 3).view(*shape, 3),
}


@heads
def test_the_loss_is_the_native_one(case):
    inputs = tiny.text_inputs([9, 9]) if case.text else tiny.image_inputs(2)
    tokens = "Token" in str(case)
    for problem in list(LABELS)[:1] if tokens else LABELS:
        config = copy.deepcopy(case.config)
        config.problem_type = problem
        native = tiny.build(tiny.Case(case.native, config))
        labels = LABELS[problem](torch.Size([2, 9] if tokens else [2]))
        expected = native(**inputs, labels=labels).loss
        assert expected > 0.01
        torch.testing.assert_close(prune(native, None)(**inputs, labels=labels).loss, expected, rtol=0, atol=1e-5)
