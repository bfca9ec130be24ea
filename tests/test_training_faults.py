"""What goes wrong while a model trains: what was saved, and what was learned, is not lost."""

import pytest
import torch
from test_token_prune_trainer import TOP_K, rows_of, trainer_for
from transformers import TrainerCallback


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
