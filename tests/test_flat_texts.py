"""Flattened input: several texts in one row give what they give side by side in a padded batch."""

from itertools import accumulate

import pytest
import tiny
import torch
from methods import METHODS, pruned
from tiny import EXECUTIONS, build, cases, text_inputs
from torch.testing import assert_close
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_tokenprune import PruningConfig, prune
from hf_tokenprune.profiling import count_macs


LENGTHS = [17, 5, 30, 1]
TEXT = [param for param in tiny.ALL if param.values[0].text]
HOW = ("cu_seq_lens", "position_ids", "seq_idx")


def native(cls: type, attention: str = "sdpa") -> torch.nn.Module:
    return build(next(case for case in cases(TEXT) if case.native is cls), attention=attention)


def flattened(inputs: dict, how: str = "cu_seq_lens") -> dict:
    """What `DataCollatorWithFlattening` makes of the texts of a padded batch."""
    texts = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    batch = {"input_ids": torch.cat(texts)[None]}
    lengths = [len(text) for text in texts]
    if how == "cu_seq_lens":
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        batch |= {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
    if how != "seq_idx":
        batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    if how != "position_ids":
        batch["seq_idx"] = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor(lengths))[None].int()
    return batch


def rows(padded: torch.Tensor, inputs: dict) -> torch.Tensor:
    """The real tokens of a padded output, one after the other, [1, T, ...]."""
    return padded[inputs["attention_mask"].bool()][None]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("cls", [param.values[0].native for param in TEXT])
@torch.no_grad()
def test_texts_of_a_row_are_those_of_a_padded_batch(cls, how):
    """For every method; a head that reads the first token reads each text's first."""
    inputs = text_inputs(LENGTHS)
    for name, pruning in [("none", None), *METHODS.items()]:
        model = pruned(native(cls), pruning)
        side_by_side = model(**inputs, output_token_trace=True)
        flat = model(**flattened(inputs, how), output_token_trace=True)
        if cls is BertForSequenceClassification:
            assert_close(flat.logits, side_by_side.logits, rtol=1e-5, atol=1e-5, msg=name)
        else:
            wanted = rows(tiny.main_output(side_by_side), inputs)
            assert_close(tiny.main_output(flat), wanted, rtol=1e-5, atol=1e-5, msg=name)
        assert_close(flat.token_trace.counts, side_by_side.token_trace.counts)
        assert_close(flat.token_trace.source, side_by_side.token_trace.source)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_every_attention_and_execution(attention, execution):
    inputs = text_inputs(LENGTHS)
    pruning = PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.6, execution=execution)
    model = prune(native(BertModel, attention), pruning)
    wanted, flat = model(**inputs), model(**flattened(inputs))
    assert_close(flat.last_hidden_state, rows(wanted.last_hidden_state, inputs), rtol=1e-5, atol=1e-5)
    assert_close(flat.pooler_output, wanted.pooler_output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("execution", EXECUTIONS)
@torch.no_grad()
def test_what_comes_by_text(execution):
    """Hidden states, attentions and kept tokens, as of the padded batch; the sequence in the layout of the input."""
    inputs = text_inputs(LENGTHS)
    pruning = PruningConfig.preset("evit", layers=[1, 2], keep_rate=0.6, execution=execution)
    model = prune(native(BertModel, "eager"), pruning)
    asked = {"output_hidden_states": True, "output_attentions": True}
    wanted, flat = model(**inputs, **asked), model(**flattened(inputs), **asked)
    assert flat.last_hidden_state.shape == (1, sum(LENGTHS), 32)
    for one, other in zip(flat.hidden_states + flat.attentions, wanted.hidden_states + wanted.attentions):
        assert_close(one, other, rtol=1e-5, atol=1e-5)
    kept, alone = model(**flattened(inputs), restore=False), model(**inputs, restore=False)
    for name in ("last_hidden_state", "attention_mask", "positions"):
        assert_close(kept[name], alone[name], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_more_rows_than_one_and_every_kind_of_input():
    inputs = text_inputs([6, 4, 5, 5])
    inputs["token_type_ids"] = torch.arange(24).view(4, 6) % 2
    model = prune(native(BertModel), PruningConfig.preset("top_k", layers=[1], keep_rate=0.5))
    wanted = rows(model(**inputs).last_hidden_state, inputs).view(2, 10, -1)
    flat = {name: value.view(2, 10) for name, value in flattened(inputs, "position_ids").items()}
    flat["token_type_ids"] = rows(inputs["token_type_ids"], inputs).view(2, 10)
    assert_close(model(**flat).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)
    embedded = model.embeddings.word_embeddings(flat.pop("input_ids"))
    assert_close(model(inputs_embeds=embedded, **flat).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)
    ends = torch.tensor([0, 6, 10, 15, 20])
    one = {name: value.view(1, 20) for name, value in flat.items()} | {"cu_seq_lens_q": ends}
    seen = model(inputs_embeds=embedded.view(1, 20, -1), attention_mask=torch.ones(1, 20), **one).last_hidden_state
    assert_close(seen.view(2, 10, -1), wanted, rtol=1e-5, atol=1e-5)


def test_a_step_of_training_has_the_loss_and_the_gradients_of_the_padded_batch():
    inputs = text_inputs(LENGTHS)
    labels = torch.randint(0, 3, inputs["input_ids"].shape)
    for pruning in (None, METHODS["top_k"], METHODS["tome"], METHODS["adaptive"]):
        results = []
        for layout in ("padded", "flat"):
            model = prune(native(BertForTokenClassification), pruning)
            if layout == "flat":
                batch = flattened(inputs) | {"labels": rows(labels, inputs)}
            else:
                batch = inputs | {"labels": labels.masked_fill(inputs["attention_mask"] == 0, -100)}
            loss = model(**batch).loss
            loss.backward()
            results.append((loss, {name: value.grad for name, value in model.named_parameters()}))
        (loss, gradients), (flat_loss, flat_gradients) = results
        assert_close(flat_loss, loss, rtol=1e-5, atol=1e-6)
        assert_close(flat_gradients, gradients, rtol=1e-4, atol=1e-6)


def without_dropout() -> torch.nn.Module:
    model = prune(native(BertForTokenClassification), METHODS["top_k"])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def test_the_stock_trainer_with_the_stock_collator(tmp_path):
    """A step of it changes the weights as a step on the padded batch does."""
    inputs = text_inputs(LENGTHS[:3])
    labels = (inputs["input_ids"] % 3).masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, 0] = -100  # the collator's separator
    texts = [ids[mask.bool()].tolist() for ids, mask in zip(*inputs.values())]
    data = [{"input_ids": text, "labels": [token % 3 for token in text]} for text in texts]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=3, max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    trainer = Trainer(without_dropout(), arguments, train_dataset=data, data_collator=collator)
    trainer.train()

    by_hand = without_dropout()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    loss = by_hand(**inputs, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), arguments.max_grad_norm)
    optimizer.step()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(loss.item(), abs=1e-5)
    for (name, one), other in zip(trainer.model.named_parameters(), by_hand.parameters()):
        assert_close(one, other, rtol=1e-5, atol=2e-6, msg=name)


@torch.no_grad()
def test_a_simulated_flash_attention(monkeypatch):
    """Whatever calls itself flash attention gets cumulative lengths of the tokens that are left."""

    def simulated(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, cu_seq_lens_k=None, **_):
        context = torch.empty_like(query.transpose(1, 2))
        borders = zip(cu_seq_lens_q[:-1], cu_seq_lens_q[1:], cu_seq_lens_k[:-1], cu_seq_lens_k[1:])
        for start, end, first, last in borders:
            weights = query[:, :, start:end] @ key[:, :, first:last].transpose(2, 3) * scaling
            context[:, start:end] = (weights.softmax(dim=-1) @ value[:, :, first:last]).transpose(1, 2)
        return context, None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", simulated)
    inputs = text_inputs(LENGTHS)
    for pruning in (None, *METHODS.values()):
        model = pruned(native(BertModel), pruning)
        wanted = rows(model(**inputs).last_hidden_state, inputs)
        model.config._attn_implementation = "flash_attention_2"
        assert_close(model(**flattened(inputs)).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)


def test_costs_are_those_of_the_padded_batch():
    inputs = text_inputs(LENGTHS)
    model = prune(native(BertModel), METHODS["top_k"])
    assert count_macs(model, flattened(inputs)) == count_macs(model, inputs)
    assert count_macs(native(BertModel), flattened(inputs)) == count_macs(native(BertModel), inputs)


REFUSED = {
    "cu_seq_lens_q ([0, 3, 9]) must rise from 0 to the input's number of tokens (10)": {
        "cu_seq_lens_q": torch.tensor([0, 3, 9])
    },
    "cu_seq_lens_q ([0, 3, 3, 10]) must rise": {"cu_seq_lens_q": [0, 3, 3, 10]},
    "cu_seq_lens_q ([[0, 10]]) must rise": {"cu_seq_lens_q": torch.tensor([[0, 10]])},
    "cu_seq_lens_k ([0, 4, 10]) must be the same as cu_seq_lens_q": {
        "cu_seq_lens_q": [0, 3, 10],
        "cu_seq_lens_k": [0, 4, 10],
    },
    "cu_seq_lens_k must come with cu_seq_lens_q": {"cu_seq_lens_k": [0, 3, 10]},
    "max_length_q (6) must be the longest text's (7) or more": {"cu_seq_lens_q": [0, 3, 10], "max_length_q": 6},
    "seq_idx ([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]]) must change where": {
        "cu_seq_lens_q": [0, 3, 10],
        "seq_idx": torch.tensor([[0] * 4 + [1] * 6]),
    },
    "seq_idx's shape ([10]) must be the input's, [1, 10]": {"seq_idx": torch.arange(10)},
    "restart within a row although there is an attention_mask": {
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6]]),
        "attention_mask": torch.ones(1, 10),
    },
    "cu_seq_lens_q ([0.0, 10.0]) must rise": {"cu_seq_lens_q": torch.tensor([0.0, 10.0])},
    "cu_seq_lens_q ('0,10') must rise": {"cu_seq_lens_q": "0,10"},
    "max_length_q ('x') must be the longest text's (10) or more": {"cu_seq_lens_q": [0, 10], "max_length_q": "x"},
    "attention_mask's shape ([1, 12]) must be [batch, length], here [1, 10]": {
        "cu_seq_lens_q": [0, 10],
        "attention_mask": torch.ones(1, 12),
    },
    "the input's length (65) must be at most max_position_embeddings (64)": {
        "input_ids": torch.ones(1, 70, dtype=torch.long),
        "cu_seq_lens_q": [0, 5, 70],
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_borders_that_do_not_fit_are_refused(message):
    model = prune(native(BertModel), None)
    with pytest.raises(ValueError) as error:
        model(**{"input_ids": torch.arange(10)[None]} | REFUSED[message])
    assert message in str(error.value)


@torch.no_grad()
def test_positions_that_do_not_restart_are_one_text():
    """As natively: a text may have any positions, and padding may repeat them."""
    stock = native(BertModel)
    model = prune(stock, None)
    ids = torch.arange(1, 11)[None]
    for positions in (
        [9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
        [0, 1, 2, 10, 11, 12, 20, 21, 22, 23],
        [0] * 10,
    ):
        given = {"input_ids": ids, "position_ids": torch.tensor([positions])}
        wanted = stock(**given, attention_mask=torch.ones_like(ids)).last_hidden_state
        assert_close(model(**given).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)
    both = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 5, 1, 2, 3, 0, 1, 2]])}
    with pytest.raises(ValueError, match="restart within a row and jump elsewhere, too"):
        model(**both)
    both["attention_mask"] = torch.ones_like(ids)
    assert_close(model(**both).last_hidden_state, stock(**both).last_hidden_state, rtol=1e-5, atol=1e-5)
    left = {"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])}
    left["position_ids"] = (left["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    wanted = stock(input_ids=ids, **left).last_hidden_state[:, 3:]
    assert_close(model(input_ids=ids, **left).last_hidden_state[:, 3:], wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_are_read_one_by_one():
    """Whether a row holds several texts does not hang on the others."""
    model = prune(native(BertModel), METHODS["top_k"])
    ids = torch.arange(1, 13).view(2, 6)
    for other in ([0, 1, 2, 4, 5, 6], [0, 1, 2, 3, 4, 5], [7, 8, 9, 7, 8, 9], [3, 4, 5, 0, 1, 2]):
        positions = torch.tensor([[0, 1, 2, 0, 1, 2], other])
        together = model(input_ids=ids, position_ids=positions).last_hidden_state
        for row in (0, 1):
            single = model(input_ids=ids[row : row + 1], position_ids=positions[row : row + 1]).last_hidden_state
            assert_close(together[row : row + 1], single, rtol=1e-5, atol=1e-5)
    apart = model(input_ids=ids.view(4, 3)[2:], position_ids=torch.tensor([[3, 4, 5], [0, 1, 2]])).last_hidden_state
    assert_close(together[1], apart.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_borders_of_any_integers():
    model, inputs = prune(native(BertModel), METHODS["top_k"]), text_inputs(LENGTHS)
    flat = flattened(inputs)
    wanted, ends = model(**flat).last_hidden_state, flat["cu_seq_lens_q"]
    for given in (ends.tolist(), tuple(ends.tolist()), ends.numpy(), ends.long(), ends.short()):
        seen = model(input_ids=flat["input_ids"], cu_seq_lens_q=given, max_length_q=torch.tensor(30))
        assert torch.equal(seen.last_hidden_state, wanted)


def test_borders_are_refused_where_sizes_follow_from_shapes():
    model = prune(native(BertModel), METHODS["top_k"])
    flat = flattened(text_inputs(LENGTHS))
    with pytest.raises(Exception, match="must not be given under compile and export"):
        torch.compile(model, backend="eager", fullgraph=True)(**flat)
    torch._dynamo.reset()
    only = {name: flat[name] for name in ("input_ids", "position_ids")}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="must not restart within a row under compile"):
        compiled(**only)
    straight = {"input_ids": only["input_ids"], "position_ids": torch.arange(sum(LENGTHS))[None]}
    assert_close(compiled(**straight).last_hidden_state, model(**straight).last_hidden_state, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
