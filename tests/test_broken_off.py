"""What stays of a training that breaks off, of one that goes on in the same process, and what checkpoints carry."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_token_prune_trainer import BUDGET, TOP_K, native_model, rows_of, trainer_for
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hf_tokenprune import PruningConfig, TokenPruneTrainer, prune


WARM_UP = (TOP_K, {"keep_rate_warmup_end": 1.0})
SOFT = (BUDGET, {"soft_share": 0.9, "budget_warmup": 1.0, "final_temperature": 0.03, "pruner_learning_rate": 0.1})
schedules = pytest.mark.parametrize("pruning, arguments", [WARM_UP, SOFT], ids=["warm_up", "soft"])


class Once(TrainerCallback):
    """Breaks a training off after its second step, once."""

    def __init__(self, error: BaseException):
        self.error: BaseException | None = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and self.error is not None:
            error, self.error = self.error, None
            raise error


def broken_off(pruning: Any, folder: Path, error: BaseException, **arguments: Any) -> TokenPruneTrainer:
    return trainer_for(pruning, folder, callbacks=[Once(error)], **arguments)


@schedules
def test_what_was_asked_for_stays(pruning, arguments, tmp_path):
    trainer = broken_off(pruning, tmp_path, KeyboardInterrupt(), **arguments)
    asked = trainer.pruned.config.pruning
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.pruned.config.pruning == asked
    trainer.pruned.set_pruning(None)
    assert trainer.evaluate()["eval_mac_ratio"] > 0.7  # nothing of the schedule is left behind
    trainer.pruned.set_pruning(asked)
    trainer.train()
    check_target(trainer)


@schedules
def test_after_too_large_a_batch(pruning, arguments, tmp_path):
    error = RuntimeError("CUDA out of memory.")
    trainer = broken_off(pruning, tmp_path, error, auto_find_batch_size=True, **arguments)
    trainer.train()
    check_target(trainer)


def check_target(trainer: TokenPruneTrainer) -> None:
    pruning = trainer.pruned.config.pruning
    if pruning.preset_name == "top_k":
        assert pruning == PruningConfig.coerce(TOP_K, 4)
    else:
        assert trainer.evaluate()["eval_mac_ratio"] == pytest.approx(0.6, abs=0.02)


def test_a_second_training_follows_a_finished_one(tmp_path):
    trainer = trainer_for(BUDGET, tmp_path, pruner_learning_rate=0.1)
    trainer.train()
    learned = trainer.pruned.config.pruning
    trainer.train()
    assert trainer.pruned.config.pruning == learned and learned.objective is None


@pytest.mark.parametrize("end", [0.9, 1.0])
def test_a_checkpoint_of_a_warm_up_is_what_was_evaluated(end, tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    trainer = trainer_for({**TOP_K, "keep_rate": 0.2}, tmp_path, keep_rate_warmup_end=end, **steps)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    for step, entry in zip((4, 8), logged, strict=True):
        stored = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{step}")
        found = trainer_for(stored, tmp_path / "again").evaluate()
        assert found["eval_mac_ratio"] == pytest.approx(entry["eval_mac_ratio"])
        assert found["eval_loss"] == pytest.approx(entry["eval_loss"], abs=1e-5)


@schedules
def test_training_resumes_from_the_model_of_the_checkpoint(pruning, arguments, tmp_path):
    arguments = {**arguments, "save_strategy": "steps", "save_steps": 3}
    whole = trainer_for(pruning, tmp_path / "whole", **arguments)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    stored = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    assert stored.config.pruning == PruningConfig.coerce(pruning, 4)
    trainer = trainer_for(stored, tmp_path / "resumed", **arguments)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.pruned.config.pruning.values == pytest.approx(whole.pruned.config.pruning.values, rel=1e-5)


def test_a_model_made_by_the_trainer(tmp_path):
    def made(pruning: Any, **arguments: Any) -> TokenPruneTrainer:
        like = trainer_for(TOP_K, tmp_path, **arguments)
        rows = {"train_dataset": rows_of(), "eval_dataset": rows_of()}
        return TokenPruneTrainer(args=like.args, model_init=lambda: prune(native_model(), pruning), **rows)

    trainer = made(TOP_K, keep_rate_warmup_end=0.5)
    trainer.train()
    check_target(trainer)
    threshold = {"preset": "adaptive", "layers": [1, 2], "threshold": 0.5}
    for pruning, measured in ((threshold, {"target_macs": 0.7}), ({**threshold, "prior_threshold": 0.3}, {})):
        trainer = made(pruning)
        for name, value in measured.items():
            setattr(trainer.args, name, value)
        with pytest.raises(ValueError, match=r"model_init \(.*\) must not be given where training starts by measuring"):
            trainer.train()


def test_a_stream_that_knows_its_length(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows_of())

        def __len__(self):
            return len(rows_of())

    pruning = {"preset": "adaptive", "layers": [1, 2], "threshold": 0.5}
    listed, streamed = (
        trainer_for(pruning, tmp_path, rows=rows, target_macs=0.6, max_steps=1, learning_rate=0.0, budget_samples=24)
        for rows in (rows_of(), Stream())
    )
    for trainer in (listed, streamed):
        trainer.train()
    assert streamed.pruned.config.pruning.values == pytest.approx(listed.pruned.config.pruning.values)


def test_a_pruner_that_an_adapter_leaves_out_is_refused(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(pruning: Any, *saved: str) -> TokenPruneTrainer:
        config = peft.LoraConfig(
            r=2, target_modules=["query"], modules_to_save=["classifier", *saved], task_type="SEQ_CLS"
        )
        return trainer_for(peft.get_peft_model(prune(native_model(), pruning), config), tmp_path, max_steps=2)

    table = {"preset": "adaptive", "layers": [1, 2], "threshold": 0.5, "prior_threshold": 0.3}
    with pytest.raises(
        ValueError, match=r"trains \['token_budget', 'token_mask'\], which must not be frozen .*modules_to_save"
    ):
        adapted(BUDGET).train()
    with pytest.raises(ValueError, match=r"has a table that the adapter must hold .*modules_to_save"):
        adapted(table).train()
    trainer = adapted(table, "token_prior")
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    pruning = (tmp_path / "adapter" / "pruning.json").read_text()
    again = peft.PeftModel.from_pretrained(prune(native_model(), json.loads(pruning)), tmp_path / "adapter")
    inputs = {name: torch.stack([row[name] for row in rows_of()]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs).logits, trainer.model.eval()(**inputs).logits)
