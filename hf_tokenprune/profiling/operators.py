"""One batch under torch's profiler, driven by accelerate: a table by operator, a Chrome trace, layers by name."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProfileKwargs
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from .macs import count_macs


WARMUP = 2
LAYER_CALLS = 5
MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::conv2d")


@dataclass(frozen=True)
class OperatorProfile:
    """What one call did.

    Args:
        table: by operator, as text.
        trace: the Chrome trace's file.
        layer_seconds: time inside each layer, on the accelerator where there is one, of several calls.
    """

    table: str
    trace: Path
    layer_seconds: list[list[float]]


def profile_operators(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], accelerator: Accelerator, folder: Path
) -> OperatorProfile:
    """Profiles the third call with this batch; the trace goes into `folder`."""
    on_device = accelerator.device.type == "cuda"
    activities = ["cpu", "cuda"] if on_device else ["cpu"]
    handler = ProfileKwargs(activities=activities, record_shapes=True, profile_memory=True, with_flops=True)
    layers = encoder_layers(model)

    def call() -> None:
        model(**batch)
        if on_device:
            torch.cuda.synchronize()

    with torch.inference_mode():
        for _ in range(WARMUP):
            call()
        with _named(layers), accelerator.profile(handler) as profiler, record_function("forward"):
            call()
        with _named(layers), accelerator.profile(ProfileKwargs(activities=activities)) as layer_profiler:
            for _ in range(LAYER_CALLS):
                call()
    time = "device_time_total" if on_device else "cpu_time_total"
    table = profiler.key_averages().table(sort_by=f"self_{time}", row_limit=60, max_name_column_width=60)
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / "profile_0.json"  # written here: accelerate would wait for the other processes afterwards
    profiler.export_chrome_trace(str(trace))
    return OperatorProfile(table, trace, _layer_seconds(layer_profiler.events(), len(layers), time))


def _layer_seconds(events: Iterable[FunctionEvent], depth: int, time: str) -> list[list[float]]:
    """For each call, of each layer; the processor's ranges, which know their kernels."""
    spent: dict[str, list[float]] = {f"layer {index}": [] for index in range(depth)}
    for event in events:
        if event.name in spent and event.device_type == DeviceType.CPU:
            spent[event.name].append(getattr(event, time) / 1e6)
    return [list(call) for call in zip(*spent.values())]


def encoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the encoder, native or ours.

    Raises:
        ValueError: a model without a list of `num_hidden_layers` layers.
    """
    depth = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise ValueError(f"{type(model).__name__} must have a list of num_hidden_layers ({depth}) layers")


@contextmanager
def _named(layers: list[nn.Module]) -> Iterator[None]:
    """Names each layer in the profile."""
    open_ranges: list[record_function] = []

    def enter(index: int) -> None:
        open_ranges.append(record_function(f"layer {index}"))
        open_ranges[-1].__enter__()

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, index=index: enter(index)))
        handles.append(layer.register_forward_hook(lambda *_: open_ranges.pop().__exit__(None, None, None)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class FlopCounts:
    """Floating-point operations of the encoder layers on one batch, counted three ways.

    Args:
        formula: 2 x `count_macs`, from how many tokens each layer computed; padding is not counted.
        counter: `torch.utils.flop_counter`, of what ran inside the layers.
        profiler: torch.profiler's `with_flops`, of the matrix products that ran inside the layers.
    """

    formula: int
    counter: int
    profiler: int


def count_flops(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> FlopCounts:
    """Counts one batch three ways; they agree where the batch has no padding or the model computes none.

    The model's attention runs eagerly meanwhile: torch.profiler knows no fused attention.
    """
    kept = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            layers = encoder_layers(model)
            counter, profiler = _counter_flops(model, layers, batch), _profiler_flops(model, layers, batch)
            formula = 2 * count_macs(model, batch).total
    finally:
        model.set_attn_implementation(kept)
    return FlopCounts(formula, counter, profiler)


def _counter_flops(model: PreTrainedModel, layers: list[nn.Module], batch: Mapping[str, torch.Tensor]) -> int:
    names = {id(module): name for name, module in model.named_modules()}
    with FlopCounterMode(display=False) as counter:
        model(**batch)
    counts = counter.get_flop_counts()
    return sum(sum(counts.get(f"{type(model).__name__}.{names[id(layer)]}", {}).values()) for layer in layers)


def _profiler_flops(model: PreTrainedModel, layers: list[nn.Module], batch: Mapping[str, torch.Tensor]) -> int:
    with _named(layers), profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        model(**batch)
    inside = {f"layer {index}" for index in range(len(layers))}
    products = (event for event in profiler.events() if event.name in MATMULS)
    return sum(event.flops or 0 for event in products if not inside.isdisjoint(_ranges_around(event)))


def _ranges_around(event: FunctionEvent) -> Iterator[str]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name
