"""What users get wrong: one clear sentence each; and what looks wrong but is not: an answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    ViTForImageClassification,
    ViTModel,
)

from hf_tokenprune import PruningConfig, TokenPruneBertForSequenceClassification, TokenPruneViTModel, prune


TOP_K = PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.5)
ADAPTIVE = PruningConfig.preset("adaptive", layers=[1, 2], threshold=0.9)
RECEIVED = PruningConfig.preset("adaptive", layers=[1, 2], threshold=0.9, saliency="received_attention")
PRUNINGS = {"top_k": TOP_K, "adaptive": ADAPTIVE, "received": RECEIVED, "none": None}
TEXT, TEXT_BASE, IMAGE, IMAGE_BASE = (
    tiny.Case(native, config)
    for native, config in (
        (BertForSequenceClassification, tiny.BERT),
        (BertModel, tiny.BERT),
        (ViTForImageClassification, tiny.VIT),
        (ViTModel, tiny.VIT),
    )
)


def model(case: tiny.Case, pruning: Any = TOP_K) -> PreTrainedModel:
    return prune(tiny.build(case), pruning)


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.ones(batch, length, dtype=torch.long)


def stage(**changes: Any) -> dict[str, Any]:
    """A pruning's dict with a changed stage."""
    pruning = TOP_K.to_dict()
    pruning["stages"][0].update(changes)
    return pruning


def protected() -> PreTrainedModel:
    return model(TEXT, PruningConfig.preset("top_k", layers=[1], keep_rate=0.5, protected_token_ids=[3, 4]))


# What is wrong, the call, the exception, what its message says.
PACKED = {"preset": "top_k", "execution": "packed"}
CALLS = [
    ("too long", lambda: model(TEXT)(ids(1, 65)), ValueError, ["65", "64", "max_position_embeddings", "truncate"]),
    (
        "too long embeddings",
        lambda: model(TEXT_BASE)(inputs_embeds=torch.zeros(1, 70, 32)),
        ValueError,
        ["70", "64", "max_position_embeddings"],
    ),
    ("no tokens", lambda: model(TEXT)(ids(2, 0)), ValueError, ["[2, 0]", "at least one"]),
    ("no samples", lambda: model(TEXT)(ids(0, 5)), ValueError, ["[0, 5]", "at least one"]),
    ("no images", lambda: model(IMAGE)(torch.zeros(0, 3, 24, 24)), ValueError, ["[0, 37]", "at least one"]),
    ("nothing given", lambda: model(TEXT)(), ValueError, ["input_ids", "inputs_embeds"]),
    ("no pixels given", lambda: model(IMAGE)(), ValueError, ["pixel_values"]),
    (
        "both given",
        lambda: model(TEXT)(ids(1, 5), inputs_embeds=torch.zeros(1, 5, 32)),
        ValueError,
        ["input_ids", "inputs_embeds", "one of"],
    ),
    ("image of another size", lambda: model(IMAGE)(torch.zeros(1, 3, 20, 24)), ValueError, ["20", "24", "size"]),
    ("grey image", lambda: model(IMAGE)(torch.zeros(1, 1, 24, 24)), ValueError, ["channel", "1"]),
    (
        "4-D mask",
        lambda: model(TEXT)(ids(2, 5), attention_mask=torch.ones(2, 1, 5, 5)),
        ValueError,
        ["attention_mask", "[2, 1, 5, 5]", "[batch, length]", "[2, 5]"],
    ),
    (
        "3-D mask",
        lambda: model(TEXT)(ids(2, 5), attention_mask=torch.ones(2, 5, 5)),
        ValueError,
        ["attention_mask", "[2, 5, 5]", "[2, 5]"],
    ),
    (
        "mask too short",
        lambda: model(TEXT)(ids(2, 5), attention_mask=torch.ones(2, 4)),
        ValueError,
        ["attention_mask", "[2, 4]", "[2, 5]"],
    ),
    (
        "mask of another batch",
        lambda: model(TEXT)(ids(2, 5), attention_mask=torch.ones(1, 5)),
        ValueError,
        ["attention_mask", "[1, 5]", "[2, 5]"],
    ),
    (
        "mask without the class token",
        lambda: model(IMAGE)(**tiny.image_inputs(2), attention_mask=torch.ones(2, 36)),
        ValueError,
        ["attention_mask", "[2, 36]", "[2, 37]"],
    ),
    (
        "cross-attention",
        lambda: model(TEXT_BASE)(ids(1, 5), encoder_hidden_states=torch.zeros(1, 5, 32)),
        ValueError,
        ["encoder_hidden_states", "encoder"],
    ),
    (
        "a cache",
        lambda: model(TEXT_BASE)(ids(1, 5), past_key_values=((torch.zeros(1),),)),
        ValueError,
        ["past_key_values", "encoder"],
    ),
    (
        "protected ids without ids",
        lambda: protected()(inputs_embeds=torch.zeros(1, 5, 32)),
        ValueError,
        ["protected_token_ids", "[3, 4]", "input_ids"],
    ),
    (
        "protected ids of images",
        lambda: prune(tiny.build(IMAGE), {"preset": "top_k", "protected_token_ids": [3]}),
        ValueError,
        ["protected_token_ids ([3])", "no token ids"],
    ),
    (
        "kept tokens of a head",
        lambda: model(TEXT)(ids(1, 5), restore=False),
        ValueError,
        ["restore (False)", "head"],
    ),
    (
        "packed under compile",
        lambda: torch.compile(prune(tiny.build(TEXT), PACKED), backend="eager")(ids(1, 5)),
        ValueError,
        ["execution ('packed')", "compile"],
    ),
    ("another family", lambda: prune(roberta(), TOP_K), TypeError, ["RobertaModel", "BertModel", "ViTModel"]),
]

# What is wrong, the pruning, what the message of the ValueError says.
PRUNINGS_REFUSED = [
    ("unknown preset", "lottery", ["'lottery'", "top_k", "adaptive"]),
    ("unknown preset in a dict", {"preset": "lottery"}, ["'lottery'", "top_k"]),
    ("no preset", {"keep_rate": 0.5}, ["preset", "top_k"]),
    ("unknown hyper-parameter", {"preset": "top_k", "rate": 0.5}, ["'rate'", "layers", "keep_rate"]),
    ("wrong type", 0.5, ["0.5", "PruningConfig"]),
    ("a list", [0.5], ["[0.5]", "PruningConfig"]),
    ("rate above one", {"preset": "top_k", "keep_rate": 1.3}, ["keep_rate (1.3)", "(0, 1]"]),
    ("rate of nothing", {"preset": "top_k", "keep_rate": 0}, ["keep_rate (0)", "(0, 1]"]),
    ("rate not a number", {"preset": "top_k", "keep_rate": float("nan")}, ["keep_rate (nan)", "finite"]),
    ("rate as a word", {"preset": "top_k", "keep_rate": "0.5"}, ["keep_rate ('0.5')", "number"]),
    ("rate true", {"preset": "top_k", "keep_rate": True}, ["keep_rate (True)", "number"]),
    ("threshold below zero", {"preset": "adaptive", "threshold": -0.1}, ["threshold (-0.1)", ">= 0"]),
    (
        "thresholds that do not fit",
        {"preset": "adaptive", "layers": [1, 2], "threshold": [0.1]},
        ["threshold ([0.1])", "one per layer", "2"],
    ),
    ("rising schedule", stage(values=[0.5, 0.6]), ["keep_rate ([0.5, 0.6])", "must not rise"]),
    ("layers out of order", stage(layers=[2, 1]), ["layers ([2, 1])", "rise"]),
    ("a layer twice", stage(layers=[1, 1]), ["layers ([1, 1])", "once"]),
    ("no layers", stage(layers=[], values=[]), ["layers ([])", "at least one"]),
    ("layer out of range", stage(layers=[1, 4]), ["layer (4)", "[0, 3]", "4 layers"]),
    ("layer below zero", stage(layers=[-1, 2]), ["layer (-1)", ">= 0"]),
    ("layer not whole", stage(layers=[1, 2.5]), ["layer (2.5)", "integer"]),
    ("unknown saliency", stage(saliency="stars"), ["'stars'", "cls_attention"]),
    ("unknown rule", stage(rule="dice"), ["'dice'", "keep_rate"]),
    ("unknown reduction", stage(reduction="burn"), ["'burn'", "drop"]),
    ("unknown place", stage(place="outside"), ["'outside'", "between"]),
    ("unknown execution", {"preset": "top_k", "execution": "fast"}, ["'fast'", "packed", "padded", "masked"]),
    ("minimum of nothing", {"preset": "top_k", "min_tokens": 0}, ["min_tokens (0)", ">= 1"]),
    ("protected ids below zero", {"preset": "top_k", "protected_token_ids": [-100]}, ["(-100)", ">= 0"]),
]
ids_of = [entry[0] for entry in PRUNINGS_REFUSED]


def roberta() -> RobertaModel:
    return RobertaModel(RobertaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))


def at_prune(pruning: Any, folder: Path) -> None:
    prune(tiny.build(IMAGE), pruning)


def at_set_pruning(pruning: Any, folder: Path) -> None:
    """Refused, and the old pruning stays."""
    head = model(IMAGE)
    for target in (head, head.base_model):
        try:
            target.set_pruning(pruning)
        finally:
            assert head.config.pruning is TOP_K


def at_assignment(pruning: Any, folder: Path) -> None:
    config = model(IMAGE).config
    try:
        config.pruning = pruning
    finally:
        assert config.pruning is TOP_K


def at_from_pretrained(pruning: Any, folder: Path) -> None:
    tiny.build(IMAGE).save_pretrained(folder)
    TokenPruneViTModel.from_pretrained(folder, pruning=pruning)


def at_load(pruning: Any, folder: Path) -> None:
    model(TEXT).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pruning": pruning}))
    TokenPruneBertForSequenceClassification.from_pretrained(folder)


def assert_says(error: pytest.ExceptionInfo, words: list[str]) -> None:
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("call, exception, words", [pytest.param(*entry[1:], id=entry[0]) for entry in CALLS])
def test_a_wrong_call_is_refused(call: Callable, exception: type, words: list[str]):
    with pytest.raises(exception) as error:
        call()
    assert type(error.value) is exception
    assert_says(error, words)


@pytest.mark.parametrize("way", [at_prune, at_set_pruning, at_assignment, at_from_pretrained, at_load])
@pytest.mark.parametrize("what, pruning, words", PRUNINGS_REFUSED, ids=ids_of)
def test_a_wrong_pruning_is_refused(what, pruning, words, way, tmp_path):
    with pytest.raises(ValueError) as error:
        way(pruning, tmp_path)
    assert_says(error, words)


@pytest.mark.parametrize("flag", ["is_decoder", "add_cross_attention"])
@pytest.mark.parametrize("asked", [False, True], ids=["saved", "asked for"])
def test_a_decoder_is_refused_at_loading(flag, asked, tmp_path):
    decoder = BertConfig(**{**tiny.BERT.to_dict(), "is_decoder": True, flag: True})
    BertForSequenceClassification(tiny.BERT if asked else decoder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(is_decoder|add_cross_attention) \(True\) must be False"):
        TokenPruneBertForSequenceClassification.from_pretrained(tmp_path, **({flag: True} if asked else {}))


def variants(*cases: tiny.Case) -> Any:
    executions = [
        (case, name, execution)
        for case in cases
        for name in PRUNINGS
        for execution in (tiny.EXECUTIONS if name != "none" else ("auto",))
    ]
    return pytest.mark.parametrize("case, pruning, execution", executions)


def build(case: tiny.Case, pruning: str, execution: str) -> PreTrainedModel:
    config = PRUNINGS[pruning]
    return model(case, config and PruningConfig(stages=config.stages, execution=execution))


@variants(TEXT, TEXT_BASE)
def test_a_sample_of_padding_alone_disturbs_nobody(case, pruning, execution):
    pruned = build(case, pruning, execution)
    inputs = tiny.text_inputs([9, 4, 13], padding=1)
    with torch.no_grad():
        expected = tiny.main_output(pruned(**inputs))
        empty = {name: torch.cat([value[:1], torch.zeros_like(value[:1]), value[1:]]) for name, value in inputs.items()}
        out = pruned(**empty, output_token_trace=True)
    found = tiny.main_output(out)
    assert found.isfinite().all()
    torch.testing.assert_close(found[[0, 2, 3]], expected, rtol=0, atol=1e-5)
    assert (out.token_trace.counts[:, 1] == 1).all()


@variants(TEXT, TEXT_BASE)
def test_only_padding(case, pruning, execution):
    with torch.no_grad():
        out = build(case, pruning, execution)(ids(2, 4), attention_mask=torch.zeros(2, 4))
    assert tiny.main_output(out).isfinite().all()


@variants(TEXT, TEXT_BASE)
def test_a_single_token(case, pruning, execution):
    """Nothing can be taken from it: the native answer, alone and beside longer ones."""
    pruned = build(case, pruning, execution)
    inputs = tiny.text_inputs([1])
    longer = tiny.text_inputs([1, 20], padding=2)
    longer["input_ids"][0, 0] = inputs["input_ids"][0, 0]
    with torch.no_grad():
        expected = tiny.main_output(tiny.build(case)(**inputs))
        alone, beside = (tiny.main_output(pruned(**given))[:1] for given in (inputs, longer))
    torch.testing.assert_close(alone, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(beside if case is TEXT else beside[:, :1], expected, rtol=0, atol=2e-5)


@variants(IMAGE, IMAGE_BASE)
def test_nan_pixels_stay_in_their_sample(case, pruning, execution):
    pruned = build(case, pruning, execution)
    inputs = tiny.image_inputs(3)
    with torch.no_grad():
        expected = tiny.main_output(pruned(**inputs))
        inputs["pixel_values"][1, :, 0, 0] = torch.nan
        found = tiny.main_output(pruned(**inputs))
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-5)
    assert found[1].isnan().any()
    assert case is IMAGE_BASE or found[1].isnan().all()


@variants(TEXT, TEXT_BASE)
def test_nan_embeddings_stay_in_their_sample(case, pruning, execution):
    """Samples of different lengths, whose rows lie beside each other."""
    pruned = build(case, pruning, execution)
    inputs = tiny.text_inputs([9, 4, 13, 2], padding=1)
    embeddings = pruned.get_input_embeddings()(inputs.pop("input_ids")).detach()
    broken = embeddings.clone()
    broken[1, 2] = torch.nan
    with torch.no_grad():
        expected, found = (tiny.main_output(pruned(**inputs, inputs_embeds=x)) for x in (embeddings, broken))
    torch.testing.assert_close(found[[0, 2, 3]], expected[[0, 2, 3]], rtol=0, atol=1e-5)
    assert found[1].isnan().any()


@variants(TEXT, TEXT_BASE, IMAGE, IMAGE_BASE)
def test_nan_weights_give_nan_and_no_crash(case, pruning, execution):
    pruned = build(case, pruning, execution)
    biases = [bias for name, bias in pruned.named_parameters() if name.endswith(("key.bias", "k_proj.bias"))]
    assert len(biases) == tiny.LAYERS
    with torch.no_grad():
        biases[0][0] = torch.nan
        out = pruned(**tiny.inputs_for(case), output_token_trace=True)
    assert tiny.main_output(out)[0, ..., 0].isnan().any()
    trace = out.token_trace
    assert (trace.counts >= 1).all()
    assert (trace.source[:, :, 0] == 0).all()  # the class token stays
    assert pruning == "none" or (trace.counts[0] < 37).all()


@variants(IMAGE)
def test_infinite_pixels_do_not_crash(case, pruning, execution):
    inputs = tiny.image_inputs(2)
    inputs["pixel_values"][0] = torch.inf
    with torch.no_grad():
        pruned = build(case, pruning, execution)
        found, alone = pruned(**inputs).logits, pruned(inputs["pixel_values"][1:]).logits
    torch.testing.assert_close(found[1:], alone, rtol=0, atol=1e-5)
