"""What the stock `Trainer` takes, ours takes; and what is learned in small steps stays wide in a half checkpoint."""

import copy

import pytest
import tiny
import torch
from test_token_prune_trainer import BUDGET, TEXT, TOP_K, native_model, rows_of, trainer_for
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from hf_tokenprune import TokenPruneTrainer, TokenPruneTrainingArguments, prune


def test_whole_numbers_to_regress_to(tmp_path):
    config = copy.deepcopy(TEXT.config)
    config.num_labels, config.problem_type = 1, "regression"
    rows = [{**row, "labels": torch.tensor(4)} for row in rows_of()]
    model = prune(tiny.build(tiny.Case(TEXT.native, config)), TOP_K)
    trainer = trainer_for(model, tmp_path, rows=rows, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 1


def test_labels_that_are_no_classes(tmp_path):
    rows = [{**row, "token_type_ids": torch.full_like(row["input_ids"], 1)} for row in rows_of()]
    trainer = trainer_for(TOP_K, tmp_path, rows=rows, label_names=["labels", "input_ids"], max_steps=1)
    trainer.train()  # ids are above the number of labels


def test_the_collators_tokenizer_is_saved(tmp_path):
    like = trainer_for(TOP_K, tmp_path, max_steps=1)
    collate = DataCollatorWithPadding(tiny.tokenizer())
    trainer = TokenPruneTrainer(like.model, like.args, data_collator=collate, train_dataset=rows_of())
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "tokenizer.json").exists()


def test_but_for_several_gpus_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(TokenPruneTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"n_gpu \(2\) must be at most 1: `accelerate launch`"):
        trainer_for(TOP_K, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_thresholds_and_tables_stay_wide(dtype, tmp_path):
    model = prune(native_model(), {**BUDGET, "prior_threshold": 0.3})
    model.base_model.set_token_prior(torch.rand(model.config.vocab_size) + 0.5)
    model.save_pretrained(tmp_path)
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    wide = {name: value for name, value in half.state_dict().items() if value.dtype == torch.float32}
    assert len(wide) == 6 and all("token_" in name for name in wide)
    for name, value in wide.items():
        assert torch.equal(value, model.state_dict()[name])
