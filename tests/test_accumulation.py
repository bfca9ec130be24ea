"""What the pruning adds to the loss, accumulated over several batches: loss and gradients of the large batch."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_training import losses, pruned_model, rows_for
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_tokenprune import TokenPruneTrainer, TokenPruneTrainingArguments


CASES = [
    param
    for param in tiny.LEARNING_HEADS
    if param.id in ("BertForSequenceClassification", "ViTForImageClassification", "Dinov2ForImageClassification")
]
TOP_K = {"preset": "top_k", "layers": [1, 2], "keep_rate": 0.5}
POWER = {"preset": "power_bert", "retention": [11, 9, 7, 5], "objective": "power_bert"}
LTP = {"preset": "ltp", "final_token_threshold": 0.05, "objective": {"name": "ltp", "temperature": 0.01}}
TERMS = {
    "power_bert": (POWER, {}),
    "ltp": (LTP, {}),
    "distillation": (TOP_K, {"distillation_weight": 2.0, "token_distillation_weight": 3.0}),
    "in_place": (TOP_K, {"in_place_distillation": True}),
    "sandwich": ({**TOP_K, "budgets": [[0.5, [0.3, 0.09]], [0.9, [0.9, 0.8]]]}, {"sandwich_samples": 1}),
}
SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
COMMON = {
    "per_device_train_batch_size": 8,
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
}


def mean_over_all(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss as `Trainer` wants one of `compute_loss_func`: divided by the labels of all accumulated batches."""
    return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(
    case: tiny.Case, name: str, folder: Path, trainer: type[Trainer], own_loss: bool, **changes: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step."""
    pruning, own = TERMS[name]
    model = pruned_model(case, "none")
    model.set_pruning(pruning)
    seen, options = Gradients(), {"compute_loss_func": mean_over_all} if own_loss else {}
    if trainer is Trainer:
        args = TrainingArguments(str(folder), **COMMON | changes)
    else:
        args = TokenPruneTrainingArguments(str(folder), **COMMON | own | changes)
        options["teacher"] = tiny.build(case, seed=3) if "distillation_weight" in own else None
    run = trainer(model, args, train_dataset=rows_for(case), callbacks=[seen], **options)
    run.train()
    return losses(run)[0], seen.found


def check(*given: Any) -> None:
    (whole, expected), (parts, found) = (trained(*given, **split) for split in ({}, SPLIT))
    assert parts == pytest.approx(whole, rel=1e-4)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-4 * scale, msg=key)


@pytest.mark.parametrize("own_loss", [False, True], ids=["", "own_loss"])
@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("case", CASES)
def test_the_trainers_terms(case, name, own_loss, tmp_path):
    check(case, name, tmp_path, TokenPruneTrainer, own_loss)


@pytest.mark.parametrize("name", ["power_bert", "ltp"])
@pytest.mark.parametrize("case", CASES)
def test_the_models_terms_under_the_stock_trainer(case, name, tmp_path):
    check(case, name, tmp_path, Trainer, False)
