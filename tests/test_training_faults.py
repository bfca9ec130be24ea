"""What goes wrong while a model trains: what was saved, and what was learned, is not lost."""

import json

import pytest
import torch
from test_token_prune_trainer import BUDGET, TOP_K, native_model, rows_of, trainer_for
from transformers import TrainerCallback

from hf_tokenprune import prune
from hf_tokenprune.training import budget


class BrokenGradient(torch.autograd.Function):
    """A number that is finite and whose gradient is not."""

    @staticmethod
    def forward(context, x, wrong):
        context.wrong = wrong
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * context.wrong, None


class Break(TrainerCallback):
    """From a step on, the classifier's gradients are broken."""

    def __init__(self, step: int, wrong: float):
        self.step, self.wrong = step, wrong

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            model.classifier.register_forward_hook(lambda *call: BrokenGradient.apply(call[-1], self.wrong))


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_broken_gradient_reaches_no_weight(wrong, max_grad_norm, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_grad_norm": max_grad_norm}
    trainer = trainer_for(TOP_K, tmp_path, callbacks=[Break(2, wrong)], **saving)
    with pytest.raises(ValueError, match=r"gradient's norm \((nan|inf)\) at step 2 must be finite"):
        trainer.train()
    (last,) = tmp_path.glob("checkpoint-*")
    for model in (trainer.model, type(trainer.model).from_pretrained(last)):
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_a_scaler_leaves_steps_out_by_itself(tmp_path):
    trainer = trainer_for(TOP_K, tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert trainer._get_grad_norm(trainer.model, torch.tensor(torch.inf)) == torch.inf


def test_a_budget_that_training_put_out_of_reach_is_raised_to_what_is(monkeypatch, tmp_path):
    class Level(TrainerCallback):
        """In one layer every token is attended alike in the end: a threshold below 1 removes none."""

        def on_train_end(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                for parameter in model.bert.encoder.layer[1].attention.self.query.parameters():
                    parameter.zero_()

    said = []
    monkeypatch.setattr(budget.logger, "warning", said.append)
    pruning = {"preset": "adaptive", "layers": [1, 2], "threshold": 0.95}
    trainer = trainer_for(
        pruning, tmp_path, budgets=[0.7, 0.75, 1.0], learning_rate=0.01, max_steps=2, callbacks=[Level()]
    )
    trainer.train()
    (least, values), (most, _) = trainer.pruned.config.pruning.budgets
    assert values == (0.95, 0.95) and 0.75 < least < most == 1.0
    assert len(said) == 1 and f"budgets ([0.7, 0.75]) must be at least {least:.3f}" in said[0]
    trainer.pruned.set_budget(1.0)
    assert trainer.pruned.config.pruning.values == (0.0, 0.0)


def test_budgets_beside_a_target(tmp_path):
    with pytest.raises(ValueError, match=r"a budget \(0.5\) must be at least target_macs \(0.6\)"):
        trainer_for(BUDGET, tmp_path, budgets=[0.5, 0.9])
    # What the thresholds cost at the start (0.5: almost nothing is removed) says nothing of what they will.
    trainer = trainer_for(BUDGET, tmp_path, budgets=[0.6, 0.8], max_steps=2, pruner_learning_rate=0.1)
    trainer.train()
    assert [ratio for ratio, _ in trainer.pruned.config.pruning.budgets] == pytest.approx([0.6, 0.8], abs=0.03)


def test_an_adapter_is_loaded_with_the_pruning_that_it_learned(tmp_path):
    peft = pytest.importorskip("peft")
    whole = ["token_mask", "token_budget", "classifier"]
    lora = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=whole, task_type="SEQ_CLS")
    model = peft.get_peft_model(prune(native_model(), BUDGET), lora)
    trainer = trainer_for(model, tmp_path, max_steps=4, pruner_learning_rate=0.1)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    pruning = json.loads((tmp_path / "adapter" / "pruning.json").read_text())
    again = peft.PeftModel.from_pretrained(prune(native_model(), pruning), str(tmp_path / "adapter")).eval()
    inputs = {name: torch.stack([row[name] for row in rows_of()]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model.eval()(**inputs).logits)
