"""Training of thresholds on real texts: the soft model agrees with the hard one that it becomes; a budget is met."""

from functools import partial

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
    set_seed,
)

from hf_tokenprune import TokenPruneTrainer, TokenPruneTrainingArguments, prune
from hf_tokenprune.data import load_classification, tokenize
from hf_tokenprune.labels import CLASSES
from hf_tokenprune.packaged import model_path
from hf_tokenprune.training.finetune import measured


pytestmark = pytest.mark.real

TARGET = 0.45
PRUNINGS = {  # and the last temperature of their masks, in the units of a logarithm, and of a score
    "budget": (
        {"preset": "adaptive", "layers": [0], "threshold": 0.3, "objective": {"name": "budget", "target_macs": TARGET}},
        0.03,
    ),
    "ltp": (
        {"preset": "ltp", "final_token_threshold": 0.01, "objective": {"name": "ltp", "temperature": 2e-3}},
        1e-4,
    ),
}


@pytest.mark.parametrize("name", PRUNINGS)
def test_the_soft_model_is_right_where_the_hard_one_is(name, tmp_path):
    """All of training is soft, so that the two have the same weights but for the last move of the thresholds."""
    set_seed(0)
    pruning, final_temperature = PRUNINGS[name]
    source = model_path("bert-tiny")
    tokenizer = AutoTokenizer.from_pretrained(source)
    splits = tokenize(load_classification("20newsgroups-religion"), tokenizer, 128)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # masks are there in training mode only
    model = prune(AutoModelForSequenceClassification.from_pretrained(source, **quiet), pruning)
    collate, right = DataCollatorWithPadding(tokenizer), []

    class SoftTest(TrainerCallback):
        @torch.no_grad()
        def on_train_end(self, args, state, control, **kwargs):
            model.train()
            columns = ["input_ids", "token_type_ids", "attention_mask", "label"]
            for rows in splits["test"].select_columns(columns).iter(32):
                batch = collate([dict(zip(rows, row)) for row in zip(*rows.values())])
                labels = batch.pop("labels")
                right.extend((model(**batch)["logits"].argmax(dim=-1) == labels).tolist())

    arguments = TokenPruneTrainingArguments(
        str(tmp_path),
        num_train_epochs=3,
        learning_rate=3e-4,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        soft_share=1.0,
        pruner_learning_rate=0.05,
        final_temperature=final_temperature,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = TokenPruneTrainer(
        model,
        arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        data_collator=collate,
        compute_metrics=partial(measured, CLASSES),
        callbacks=[SoftTest()],
    )
    trainer.train()
    hard = trainer.evaluate()
    print(f"soft {sum(right) / len(right):.4f}, hard {hard['eval_accuracy']:.4f}, MACs {hard['eval_mac_ratio']:.4f}")
    assert hard["eval_accuracy"] > 0.85
    assert hard["eval_accuracy"] == pytest.approx(sum(right) / len(right), abs=0.005)
    if name == "budget":
        assert hard["eval_mac_ratio"] == pytest.approx(TARGET, abs=0.02)
    else:
        assert hard["eval_mac_ratio"] < 0.75  # it prunes
