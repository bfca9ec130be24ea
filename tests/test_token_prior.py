"""What ids are worth: fitted against a loop over tokens, filled by the trainer, refused where it cannot be."""

import datasets
import pytest
import torch
from methods import METHODS
from safetensors.torch import load_file
from tiny import BERT, VIT, Case, build, text_inputs
from torch.testing import assert_close
from transformers import BertForSequenceClassification, BertModel, PreTrainedModel, ViTModel

from hf_tokenprune import (
    PruningConfig,
    TokenPruneTrainer,
    TokenPruneTrainingArguments,
    calibrate,
    count_macs,
    fit_token_prior,
    prune,
)


PRIOR = METHODS["adaptive_prior"]
TEXT = Case(BertForSequenceClassification, BERT)


def table_of(model: PreTrainedModel) -> torch.Tensor:
    (table,) = model.base_model.prior_tables()
    return table.worth


def batches() -> list[dict[str, torch.Tensor]]:
    return [text_inputs([30, 7, 19], seed=1), text_inputs([12, 12], seed=2), text_inputs([25], seed=3)]


@torch.no_grad()
def naive(native: BertModel) -> torch.Tensor:
    """A loop over the tokens of unpruned texts: [CLS] attention at layers 1 and 2 over its median, CLS left out."""
    seen: dict[int, list[float]] = {}
    for inputs in batches():
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool()):
            one = ids[mask]
            maps = native(input_ids=one[None], output_attentions=True).attentions
            worth = torch.zeros(len(one) - 1)
            for layer in (1, 2):
                row = maps[layer][0, :, 0].mean(dim=0)[1:]
                middle = row.sort().values[len(row) // 2]  # the upper one
                worth += (row / middle).clamp(max=10)
            for number, value in zip(one[1:].tolist(), worth.tolist()):
                seen.setdefault(number, []).append(value)
    rare = [value for values in seen.values() if len(values) <= 3 for value in values]
    usual = sum(rare) / len(rare)
    table = torch.full((native.config.vocab_size,), usual)
    for number, values in seen.items():
        table[number] = (sum(values) + 3 * usual) / (len(values) + 3)
    return table


@pytest.mark.parametrize("execution", ["packed", "padded", "masked"])
def test_an_id_is_worth_what_its_tokens_score_on_average(execution):
    native = build(Case(BertModel, BERT), attention="eager")
    model = prune(native, PruningConfig(stages=PRIOR.stages, execution=execution))
    table = fit_token_prior(model, batches())
    assert_close(table, naive(native), rtol=0, atol=1e-4)
    assert_close(table_of(model), table)
    assert table.unique().numel() > 20
    assert model.config.pruning == PruningConfig(stages=PRIOR.stages, execution=execution)


def test_dull_ids_go_before_the_first_layer():
    model = prune(build(TEXT), PRIOR)
    inputs = text_inputs([30, 7, 19], seed=1)
    worth = torch.ones(BERT.vocab_size)
    model.base_model.set_token_prior(worth)
    alike = count_macs(model, inputs).per_layer
    dull = inputs["input_ids"][0, 1:].unique()[:10]
    worth[dull] = 1e-3
    model.base_model.set_token_prior(worth)
    with torch.no_grad():
        trace = model(**inputs, output_token_trace=True).token_trace
    gone = (trace.source[0] < 0) & inputs["attention_mask"].bool()
    expected = torch.isin(inputs["input_ids"], dull) & inputs["attention_mask"].bool()
    expected[:, 0] = False  # the class token stays, whatever its id is worth
    assert trace.layers[0] == 0 and torch.equal(gone, expected)
    assert count_macs(model, inputs).per_layer[0] < alike[0]


def test_the_trainer_fills_an_empty_table_and_leaves_a_full_one(tmp_path):
    rows = [
        {"input_ids": ids[mask.bool()].tolist(), "labels": 1}
        for batch in batches()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
    ]
    data = datasets.Dataset.from_list([row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows])

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        pad = {n: [torch.tensor(row[n]) for row in rows] for n in ("input_ids", "attention_mask")}
        padded = {n: torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for n, each in pad.items()}
        return padded | {"labels": torch.tensor([row["labels"] for row in rows])}

    args = TokenPruneTrainingArguments(
        tmp_path, max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=4
    )
    model = prune(build(TEXT), PRIOR)
    expected = fit_token_prior(prune(build(TEXT), PRIOR), batches())
    trainer = TokenPruneTrainer(model, args, train_dataset=data, data_collator=collate)
    trainer.train()
    filled = table_of(model)
    assert_close(filled, expected, rtol=0, atol=1e-4)
    assert not any("token_prior" in name for name, _ in model.named_parameters())  # nothing that is trained
    full = torch.arange(1.0, 1 + BERT.vocab_size)
    model.base_model.set_token_prior(full)
    TokenPruneTrainer(model, args, train_dataset=data, data_collator=collate).train()
    assert torch.equal(table_of(model), full)
    trainer.save_model(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(table_of(again), full)
    model.set_pruning(None)
    TokenPruneTrainer(model, args, train_dataset=data, data_collator=collate).train()  # and asks no table
    model.save_pretrained(tmp_path / "without")
    saved = [load_file(tmp_path / name / "model.safetensors") for name in ("model", "without")]
    assert [sum("token_prior" in name for name in weights) for weights in saved] == [1, 0]


def test_tables_and_predictors_outlive_other_prunings():
    learned = PruningConfig.preset("adaptive", layers=[0, 1], saliency="learned", place="before")
    model = prune(build(TEXT), PRIOR)
    fit_token_prior(model, batches())
    table = table_of(model).clone()
    model.set_pruning(learned)
    weight = model.base_model.token_layers()[0].predictor.out_conv[0].weight.detach().clone()
    with pytest.raises(ValueError, match="must have a site with saliency 'token_prior'"):
        fit_token_prior(model, batches())
    model.set_pruning(PRIOR)
    assert torch.equal(table_of(model), table)
    model.set_pruning(learned)
    assert torch.equal(model.base_model.token_layers()[0].predictor.out_conv[0].weight, weight)


def test_calibration_leaves_the_models_own_table():
    model = prune(build(TEXT), PRIOR)
    model.base_model.set_token_prior(torch.arange(1.0, 1 + BERT.vocab_size))
    found = calibrate(model, batches(), target_macs=0.6, prior_share=0.3, layers=[1, 2])
    assert torch.equal(table_of(model), torch.arange(1.0, 1 + BERT.vocab_size))
    assert not torch.equal(found.prior, table_of(model))


@pytest.mark.parametrize("factor", [4, 8, 16, 64])
def test_attention_so_sharp_that_most_get_none(factor):
    """Tokens that fall away meanwhile are worth nothing at the sites that they do not reach."""
    native = build(TEXT)
    with torch.no_grad():
        for layer in native.bert.encoder.layer:
            layer.attention.self.query.weight.mul_(factor)
            layer.attention.self.key.weight.mul_(factor)
    table = fit_token_prior(prune(native, PRIOR), batches())
    assert table.isfinite().all() and (table > 0).all()


def test_a_table_grows_with_the_ids():
    model = prune(build(TEXT), PRIOR)
    worth = torch.arange(1.0, 1 + BERT.vocab_size)
    model.base_model.set_token_prior(worth)
    model.resize_token_embeddings(BERT.vocab_size + 3)
    assert torch.equal(table_of(model)[:-3], worth) and table_of(model)[-3:].tolist() == [worth.mean().item()] * 3
    model(input_ids=torch.tensor([[2, BERT.vocab_size + 1, 9]]))


def test_a_table_that_an_adapter_saves_whole(tmp_path):
    peft = pytest.importorskip("peft")
    model = prune(build(TEXT), PRIOR)
    lora = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["token_prior"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(model, lora)
    expected = fit_token_prior(model, batches())
    inputs = text_inputs([30, 7, 19], seed=1)
    with torch.no_grad():
        outputs = adapted.eval()(**inputs, output_token_trace=True)
    adapted.save_pretrained(tmp_path)
    (name,) = [name for name in load_file(tmp_path / "adapter_model.safetensors") if "token_prior" in name]
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")[name], expected)
    plain = prune(build(TEXT), PRIOR)
    plain.base_model.set_token_prior(expected)
    with torch.no_grad():
        trace = plain.eval()(**inputs, output_token_trace=True).token_trace
    assert torch.equal(outputs.token_trace.source[0], trace.source[0])


REFUSED = {
    "empty": (lambda: prune(build(TEXT), PRIOR)(**text_inputs([4])), "saliency ('token_prior') has an empty table"),
    "images": (lambda: prune(build(Case(ViTModel, VIT)), PRIOR), "saliency ('token_prior') needs token ids"),
    "embeddings": (
        lambda: prune(build(TEXT), PRIOR)(inputs_embeds=torch.zeros(1, 4, BERT.hidden_size)),
        "saliency ('token_prior') needs input_ids",
    ),
    "no site": (lambda: fit_token_prior(prune(build(TEXT), "top_k"), batches()), "must have a site with saliency"),
    "no inputs": (lambda: fit_token_prior(prune(build(TEXT), PRIOR), []), "batches (0) must hold"),
    "no site to fill": (
        lambda: prune(build(TEXT), None).base_model.set_token_prior(torch.ones(BERT.vocab_size)),
        "must have a site with saliency 'token_prior'",
    ),
    "shape": (
        lambda: prune(build(TEXT), PRIOR).base_model.set_token_prior(torch.ones(3)),
        "worth's shape ([3]) must be [50]",
    ),
    "sign": (
        lambda: prune(build(TEXT), PRIOR).base_model.set_token_prior(torch.zeros(BERT.vocab_size)),
        "worth (0.0) must be positive",
    ),
    "samples": (lambda: TokenPruneTrainingArguments("out", prior_samples=-1), "prior_samples (-1) must be >= 0"),
}


@pytest.mark.parametrize("make, words", REFUSED.values(), ids=REFUSED)
def test_refused_with_the_value_and_the_rule(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)
