"""What the CPU computes is computed on CUDA, too, and in half precision by torch's variable-length kernel; and what a
GPU alone has: waits, its memory, its clock, graphs. Skipped where torch finds no CUDA device."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from methods import METHODS, pruned
from safetensors.torch import load_file
from test_attention import SHAPES, WIDTH, kernel, packed
from test_goldens import CASES, _model, _read
from test_objectives import PRUNINGS as OBJECTIVES
from test_objectives import TEXT, soft_model
from test_predict import naive, result, room, wish
from test_profile import PRUNING, model, profile
from test_token_prune_trainer import BUDGET, TOP_K, native_model, rows_of, trainer_for
from torch.nn import functional as F
from torch.profiler import ProfilerActivity
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from hf_tokenprune import prune
from hf_tokenprune.modeling import token_attention
from hf_tokenprune.modeling.saliency import first_token_scores
from hf_tokenprune.modeling.token_layout import PackedRows
from hf_tokenprune.prediction import predict_dataset
from hf_tokenprune.profiling import peak_memory, time_interleaved
from hf_tokenprune.profiling.operators import count_flops


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
FIXED = {"preset": "top_k", "layers": [0, 1, 2], "keep_rate": 0.7}
ADAPTIVE = {"preset": "adaptive", "layers": [0, 1, 2], "threshold": 0.7}
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
EXECUTION = pytest.mark.parametrize("execution", tiny.EXECUTIONS)
__all__ = ["model", "room"]  # fixtures of other test files: a saved tiny classifier; one with texts


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """Convolutions round to TF32 by default, and what patches become is compared to 1e-4."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def accelerate_starts_anew():
    """accelerate keeps the first device that a process asked for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def on_cuda(inputs: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: x.cuda().to(dtype) if x.is_floating_point() else x.cuda() for name, x in inputs.items()}


def moved(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return copy.deepcopy(model).to("cuda", dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found.cpu().to(expected.dtype), expected, rtol=0, atol=tolerance * scale)


@EXECUTION
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", tiny.TYPICAL)
def test_outputs_and_kept_tokens_are_the_cpus(case, method, execution):
    model = pruned(tiny.build(case), replace(METHODS[method], execution=execution))
    inputs = tiny.inputs_for(case)
    with torch.no_grad():
        expected = model(**inputs, output_token_trace=True)
        found = moved(model)(**on_cuda(inputs), output_token_trace=True)
    assert torch.equal(found.token_trace.source.cpu(), expected.token_trace.source)
    assert_close(tiny.main_output(found), tiny.main_output(expected), 1e-4)


@pytest.mark.parametrize("name", CASES)
@EXECUTION
def test_the_goldens(name, execution):
    _, inputs, expected = _read(name)
    model, dtype = _model(name, execution), torch.float32
    if (
        "dynamicvit" in name
    ):  # some of its ranks hang on how float32 is rounded: the CPU's float64 has them otherwise, too
        model, dtype = copy.deepcopy(model).double(), torch.float64
        inputs = {key: x.double() for key, x in inputs.items()}
        with torch.no_grad():
            expected = {"logits": model(**inputs).logits}
    with torch.no_grad():
        logits = moved(model, dtype)(**on_cuda(inputs, dtype)).logits
    torch.testing.assert_close(logits.cpu(), expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_cpus(method):
    """Without dropout, in training mode; in float64, where the CPU attends in runs and CUDA padded."""
    model = soft_model(TEXT, replace(METHODS[method], objective=None))
    inputs, labels = tiny.text_inputs([17, 9, 23], padding=2), torch.tensor([0, 2, 1])
    if method == "dynamicvit":  # draws its masks
        model.eval()
    assert_same_gradients(model, inputs, labels)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_the_cpus(name, monkeypatch):
    def straight_through(x: torch.Tensor, tau: float, hard: bool, dim: int) -> torch.Tensor:
        soft = (x / tau).softmax(dim=-1)
        return F.one_hot(x.argmax(dim=-1), 2).to(x.dtype) + soft - soft.detach()

    monkeypatch.setattr(F, "gumbel_softmax", straight_through)
    inputs, labels = tiny.text_inputs([17, 9, 23], padding=2), torch.tensor([0, 2, 1])
    assert_same_gradients(soft_model(TEXT, OBJECTIVES[name]), inputs, labels)


def assert_same_gradients(model: PreTrainedModel, inputs: dict, labels: torch.Tensor) -> None:
    losses, gradients = [], []
    for each, batch, target in ((model, inputs, labels), (moved(model, torch.double), on_cuda(inputs), labels.cuda())):
        loss = each(**batch, labels=target).loss
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(each.parameters()), allow_unused=True))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients[0]) > 20
    for ours, theirs in zip(*gradients):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-5, atol=1e-6)


@HALVES
@SHAPES
@pytest.mark.parametrize("scaling", [WIDTH**-0.5, 0.1])
@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "none"])
def test_the_varlen_kernel(query_lengths, key_lengths, scaling, dtype, gradient):
    query, key, value, queries, keys = packed(query_lengths, key_lengths)
    expected = token_attention.attend(kernel(scaling), query, key, value, queries, keys)[0]
    for rows in (queries, keys):
        rows.device = torch.device("cuda")
    halves = (x.to("cuda", dtype) for x in (query, key, value))
    with torch.set_grad_enabled(gradient):
        found = token_attention._varlen(kernel(scaling), *halves, queries, keys)
    assert_close(found, expected, 8e-3 if dtype is torch.float16 else 4e-2)


@HALVES
@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "none"])
def test_scores_of_halves_are_summed_wide(dtype, gradient):
    query, key, lengths = torch.randn(3, 64).to(dtype), torch.randn(1, 51, 64).to(dtype), (20, 20, 11)
    expected = first_token_scores(query.float(), key.float(), PackedRows(lengths, torch.device("cpu")), 0.2, 2)
    with torch.set_grad_enabled(gradient):
        found = first_token_scores(query.cuda(), key.cuda(), PackedRows(lengths, torch.device("cuda")), 0.2, 2)
    assert_close(found, expected, 1e-6)


@HALVES
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_has_one_meaning_in_three_executions(method, dtype):
    """Packed by variable lengths, padded and masked: to the rounding, where the same tokens are kept."""
    native, inputs = tiny.build(TEXT), on_cuda(tiny.text_inputs([17, 5, 30, 1], padding=2))
    model, agreeing = pruned(native, METHODS[method]), []
    runs = []
    for execution in tiny.EXECUTIONS:
        model.set_pruning(replace(METHODS[method], execution=execution).to_dict())
        with torch.no_grad():
            runs.append(moved(model, dtype)(**inputs, output_token_trace=True))
    for other in runs[1:]:
        agreeing.append((other.token_trace.source == runs[0].token_trace.source).float().mean().item())
        if agreeing[-1] == 1.0:
            assert_close(other.logits, runs[0].logits.cpu(), 1e-2 if dtype is torch.float16 else 8e-2)
    assert min(agreeing) > 0.9


@HALVES
def test_ragged_half_precision_attends_by_variable_lengths(dtype):
    model, inputs = moved(prune(tiny.build(TEXT), FIXED), dtype), on_cuda(tiny.text_inputs([20, 20, 9]))
    with torch.no_grad(), torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(**inputs)
    assert "tokenprune: attention by torch's variable lengths" in {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("method", ["top_k", "adaptive", "evit", "tome", "ltp"])
def test_a_text_does_not_see_its_batch(method):
    model = moved(pruned(tiny.build(TEXT), METHODS[method]))
    inputs = on_cuda(tiny.text_inputs([17, 5, 30, 11], padding=3))
    with torch.no_grad():
        together = model(**inputs, output_token_trace=True)
        for row, length in enumerate([17, 5, 30, 11]):
            alone = model(**{name: x[row : row + 1, :length] for name, x in inputs.items()}, output_token_trace=True)
            assert torch.equal(alone.token_trace.source[:, 0], together.token_trace.source[:, row, :length])
            assert_close(alone.logits[0], together.logits[row].cpu(), 1e-4)


@pytest.mark.parametrize(
    "case, pruning, waits",
    [
        ("ViTForImageClassification", FIXED, 0),
        ("BertForSequenceClassification", None, 1),
        ("BertForSequenceClassification", FIXED, 1),
        ("BertForSequenceClassification", ADAPTIVE, 4),
    ],
    ids=["images", "nothing", "fixed", "adaptive"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_host_waits_once_for_the_lengths_and_once_at_each_adaptive_site(case, pruning, waits, dtype):
    (case,) = (param.values[0] for param in tiny.HEADS if param.id == case)
    model, inputs = moved(prune(tiny.build(case), pruning), dtype), on_cuda(tiny.inputs_for(case), dtype)
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(**inputs)
        said.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in said if "called a synchronizing" in str(warning.message)]) == waits, said


@pytest.mark.parametrize("pruning", [None, FIXED, ADAPTIVE], ids=["nothing", "fixed", "adaptive"])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1.1), (torch.bfloat16, 1.0)], ids=["fp32", "bf16"])
def test_peak_memory_is_below_the_stock_models(pruning, dtype, most):
    """In float32 ragged rows are padded for the attention, and lie there twice meanwhile."""
    native = tiny.build(TEXT)
    inputs = on_cuda(tiny.text_inputs([60, 31, 47, 12] * 64))
    stock, ours = native.to("cuda", dtype), moved(prune(native, pruning), dtype)
    with torch.inference_mode():
        for model in (stock, ours):
            model(**inputs)
        held, less = (peak_memory(lambda model=model: model(**inputs), "cuda") for model in (stock, ours))
    assert 0 < less < most * held


def test_a_call_is_timed_until_the_device_is_done():
    cycles = 20_000_000
    timing = time_interleaved({"sleep": lambda: torch.cuda._sleep(cycles), "nothing": lambda: None}, rounds=3)
    assert min(timing["sleep"].seconds) > 0.004 > max(timing["nothing"].seconds)


@pytest.mark.parametrize("execution", tiny.EXECUTIONS[:2])
def test_three_ways_of_counting_agree(execution):
    """With heads as wide as real ones: in narrow ones the zeros that scores are multiplied with on CUDA count."""
    config = BertConfig(**{**tiny.BERT.to_dict(), "hidden_size": 128, "intermediate_size": 256})
    model = moved(prune(BertForSequenceClassification(config).eval(), {**FIXED, "execution": execution}))
    counts = vars(count_flops(model, on_cuda(tiny.text_inputs([23])))).values()
    assert max(counts) <= 1.01 * min(counts)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("case", ["BertForSequenceClassification", "ViTForImageClassification"])
def test_compiled(case, mode):
    """Kernels that inductor makes, and CUDA graphs of them: the same results."""
    (case,) = (param.values[0] for param in tiny.HEADS if param.id == case)
    model = moved(pruned(tiny.build(case), METHODS["top_k"]))
    torch._dynamo.reset()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    with torch.no_grad():
        for seed in (0, 1, 2):
            inputs = on_cuda(tiny.inputs_for(case, seed=seed))
            assert_close(compiled(**inputs).logits.clone(), model(**inputs).logits.cpu(), 1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
@pytest.mark.parametrize(
    "name, pruning, more",
    [
        ("top_k", TOP_K, {"keep_rate_warmup_end": 0.5}),
        ("budget", BUDGET, {"pruner_learning_rate": 0.1}),
        ("checkpointed", TOP_K, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_training(name, pruning, more, precision, tmp_path):
    half = {} if precision == "no" else {precision: True}
    teacher = native_model() if name == "top_k" else None
    given = {"distillation_weight": 1.0} if teacher is not None else {}
    trainer = trainer_for(pruning, tmp_path, use_cpu=False, max_steps=20, teacher=teacher, **half, **more, **given)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.model.device.type == "cuda" and len(losses) == 20
    assert all(torch.isfinite(torch.tensor(losses))) and sum(losses[-4:]) < sum(losses[:4])
    assert trainer.predict(rows_of()).predictions.shape == (24, 3)


def test_every_method_trains_in_half_precision(tmp_path):
    for name, method in METHODS.items():
        model = pruned(native_model(), method)
        trainer = trainer_for(model, tmp_path / name, use_cpu=False, bf16=True, max_steps=2)
        trainer.train()
        assert all(parameter.isfinite().all() for parameter in model.parameters()), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_profile(model, tmp_path, dtype):
    report = profile(model, tmp_path / "out", device="cuda", dtype=dtype, batch_rounds=20)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["where"]["device"] == torch.cuda.get_device_name() and not any(
        "CPU" in note for note in report.notes
    )
    found = {(figure["what"], figure["model"]): figure["value"] for figure in written["measured"]}
    for name in ("baseline", "unpadded", "pruned"):
        assert found["median peak memory reserved, weights included", name] > 0
        assert "CUDA total" in (tmp_path / "out" / f"profiling_{name}.txt").read_text()
    layers = {figure["model"]: figure["value"] for figure in written["by_layer"] if "time" in figure["what"]}
    assert all(0 < seconds < 0.1 for each in layers.values() for seconds in each)


def test_out_of_memory_halves_the_batch(model, tmp_path):
    """The device is left with so little that the batch does not fit and half of it does."""
    pruning = {**PRUNING, "execution": "packed"}
    total = torch.cuda.get_device_properties(0).total_memory
    spare = 24 << 20
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)
    try:
        report = profile(
            model, tmp_path / "out", device="cuda", lengths=[60] * 4, batch_size=4096, pruning=json.dumps(pruning)
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    size = report.subject["batch_size"]
    assert size < 4096 and f"Out of memory in batches of 4096: halved to {size}." in report.notes


def test_predictions_are_the_cpus(room, tmp_path):
    predict_dataset(wish(room, tmp_path))
    expected = naive(room, lambda model, inputs: model(**inputs).logits[0])
    torch.testing.assert_close(torch.tensor(result(tmp_path)["logits"][:]), expected, rtol=0, atol=1e-4)


def test_saved_on_cuda_loads_anywhere(tmp_path):
    model = moved(pruned(tiny.build(TEXT), METHODS["adaptive"]), torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert all(x.dtype is torch.bfloat16 for x in load_file(tmp_path / "model.safetensors").values() if x.dim() > 1)
    again = type(model).from_pretrained(tmp_path, device_map="cuda")
    inputs = on_cuda(tiny.text_inputs([17, 5]))
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
