"""`count_macs` of layers with adapters and other parts in them, against what torch counts in a real call."""

import warnings

import pytest
import tiny
import torch
from test_macs import METHODS, _counted_macs
from torch import nn
from transformers import BertForSequenceClassification, BertModel

from hf_tokenprune import PruningConfig, TokenPruneTrainer, TokenPruneTrainingArguments, calibrate, count_macs, prune


peft = pytest.importorskip("peft")

BERT = tiny.Case(BertForSequenceClassification, tiny.BERT)
EVERY_LINEAR = {
    "bert": ["query", "key", "value", "dense"],
    "vit": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
    "deit": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
    "dinov2": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
    "dinov2_with_registers": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
}
RANK, WIDTH, INNER = 3, 32, 64
# Of one token in one layer, by the closed formula: rank x (in + out) for each adapted linear.
OF_A_TOKEN = RANK * (4 * 2 * WIDTH + 2 * (WIDTH + INNER))


def lora(case: tiny.Case = BERT, **settings: object) -> peft.LoraConfig:
    targets = EVERY_LINEAR[case.config.model_type]
    return peft.LoraConfig(**{"r": RANK, "target_modules": targets, "init_lora_weights": False, **settings})


def one_sample(case: tiny.Case) -> dict[str, torch.Tensor]:
    return tiny.text_inputs([17]) if case.text else tiny.image_inputs(1)


def adapted(case: tiny.Case = BERT, **settings: object) -> nn.Module:
    return peft.get_peft_model(tiny.build(case, attention="eager"), lora(case, **settings)).eval()


@pytest.mark.parametrize("method", ["nothing", "top_k", "adaptive"])
@pytest.mark.parametrize("case", tiny.TYPICAL)
def test_adapters_are_counted_as_torch_counts_them(case, method):
    model = prune(adapted(case).get_base_model(), METHODS[method])
    plain = prune(tiny.build(case, attention="eager"), METHODS[method])
    inputs = one_sample(case)
    macs, without = count_macs(model, inputs), count_macs(plain, inputs)
    assert macs.per_layer == _counted_macs(model, inputs)
    tokens = 17 if case.text else case.tokens
    assert macs.unpruned - without.unpruned == tiny.LAYERS * tokens * OF_A_TOKEN
    assert macs.lossless > without.lossless
    around = peft.get_peft_model(plain, lora(case)).eval()
    assert count_macs(around, inputs).per_layer == _counted_macs(around, inputs)


@pytest.mark.parametrize("case", tiny.TYPICAL)
def test_a_native_model_with_adapters(case):
    model, inputs = adapted(case), one_sample(case)
    macs = count_macs(model, inputs)
    counted = _counted_macs(model, inputs)
    assert macs.per_layer == counted
    assert macs.total == macs.unpruned == sum(counted)
    tokens = 17 if case.text else case.tokens
    plain = count_macs(tiny.build(case), inputs)
    assert macs.total - plain.total == tiny.LAYERS * tokens * OF_A_TOKEN


def test_only_what_is_active_and_not_merged_costs():
    plain, inputs = count_macs(tiny.build(BERT), tiny.inputs_for(BERT)), tiny.inputs_for(BERT)
    model = adapted(target_modules=["query"])
    tokens = int(inputs["attention_mask"].sum()) * tiny.LAYERS
    one = tokens * RANK * 2 * WIDTH

    assert count_macs(model, inputs).total - plain.total == one
    model.add_adapter("second", lora(target_modules=["query", "value"], r=5))
    assert count_macs(model, inputs).total - plain.total == one
    model.base_model.set_adapter(["default", "second"])
    assert count_macs(model, inputs).total - plain.total == one + tokens * 5 * 4 * WIDTH
    with model.disable_adapter():
        assert count_macs(model, inputs) == plain
    model.merge_adapter()
    assert count_macs(model, inputs) == plain
    model.unmerge_adapter()
    assert count_macs(model, inputs).total > plain.total
    assert count_macs(model.merge_and_unload(), inputs) == plain


def test_what_takes_the_place_of_a_linear_is_counted():
    """Low rank in its place, a bottleneck behind it: nothing asks what kind of module it is."""
    model, inputs = tiny.build(BERT, attention="eager"), one_sample(BERT)
    layer = model.bert.encoder.layer[1]
    layer.attention.self.query = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 32))
    layer.output.dense = nn.Sequential(layer.output.dense, Bottleneck())
    for each in (model, prune(model, METHODS["top_k"])):
        assert count_macs(each, inputs).per_layer == _counted_macs(each, inputs)


class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(32, 2)), nn.Parameter(torch.randn(2, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(x @ self.down) @ self.up


@pytest.mark.parametrize("kind", ["ia3", "vera"])
def test_other_adapters(kind):
    config = {
        "ia3": lambda: peft.IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
        "vera": lambda: peft.VeraConfig(r=4, target_modules=["query", "value"]),
    }[kind]()
    model, inputs = tiny.build(BERT, attention="eager"), one_sample(BERT)
    plain = count_macs(model, inputs)
    model = peft.get_peft_model(model, config).eval()
    macs = count_macs(model, inputs)
    assert macs.per_layer == _counted_macs(model, inputs)
    assert (macs.total > plain.total) == (kind == "vera")


@pytest.mark.parametrize("kind", ["dora", "loha"])
def test_adapters_that_make_weights_are_refused(kind):
    config = lora(use_dora=True) if kind == "dora" else peft.LoHaConfig(r=2, target_modules=["query"])
    model = peft.get_peft_model(tiny.build(BERT), config)
    with pytest.raises(
        ValueError, match=r"layer \(0\) multiplies its weights, too, for its .* merge the adapter first"
    ):
        count_macs(model, one_sample(BERT))
    assert count_macs(model.merge_and_unload(), one_sample(BERT)).total > 0


def test_adapters_of_further_tokens_are_refused():
    settings = {"task_type": "SEQ_CLS", "num_virtual_tokens": 3}
    model = peft.get_peft_model(tiny.build(BERT), peft.PromptTuningConfig(**settings))
    with pytest.raises(TypeError, match="PromptTuningConfig adds tokens of its own to each input"):
        count_macs(model, one_sample(BERT))


def test_adapters_around_what_nobody_can_look_into():
    """The kernel of a quantised layer is in no counter: it computes what the stock one does."""
    inputs = one_sample(BERT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(tiny.build(BERT), {nn.Linear}, dtype=torch.qint8)
    plain = count_macs(tiny.build(BERT), inputs)
    assert count_macs(model, inputs) == plain
    query = model.bert.encoder.layer[0].attention.self
    query.query = Beside(query.query)
    assert count_macs(model, inputs).total == plain.total + 17 * 2 * 2 * WIDTH


class Beside(nn.Module):
    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(32, 2), nn.Linear(2, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def test_counting_leaves_the_model_alone():
    model = prune(adapted(lora_dropout=0.5).get_base_model(), METHODS["top_k"]).train()
    state = torch.get_rng_state()
    with torch.inference_mode():
        macs = count_macs(model, one_sample(BERT))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert macs == count_macs(model, one_sample(BERT))


def test_searches_and_trainings_count_them(tmp_path):
    case = tiny.Case(BertModel, tiny.BERT)
    model = peft.get_peft_model(tiny.build(case), lora(r=64)).get_base_model()
    found = calibrate(model, [tiny.text_inputs([40, 30, 50])] * 2, target_macs=0.7, layers=[1])
    macs = count_macs(prune(model, found.pruning), tiny.text_inputs([40, 30, 50]))
    assert abs(macs.ratio - found.macs) < 1e-6

    pruned = prune(tiny.build(BERT), PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.5))
    around = peft.get_peft_model(pruned, lora(r=64, target_modules=["query"]))
    arguments = TokenPruneTrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    inputs = tiny.text_inputs([20])
    row = {name: value[0] for name, value in inputs.items()} | {"labels": torch.tensor(1)}
    trainer = TokenPruneTrainer(around, arguments, train_dataset=[row] * 8, eval_dataset=[row])
    measured = trainer.evaluate()["eval_mac_ratio"]
    assert measured == pytest.approx(count_macs(around, inputs).ratio, abs=1e-6)
    assert measured != pytest.approx(count_macs(prune(tiny.build(BERT), pruned.config.pruning), inputs).ratio, abs=1e-3)
    trainer.train()
