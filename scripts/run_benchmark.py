"""Times the three baselines in turn over a grid of shapes: padded stock model, our engine with nothing pruned, pruned.

    python scripts/run_benchmark.py --output_file model_cards/evidence/engine.json

Weights are random: time does not depend on them, and `top_k` keeps as many tokens whatever they are. Every point is
written as soon as it is measured, and a second start goes on where the first one ended. The table lies beside the JSON.
"""

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from tqdm.auto import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_tokenprune import PruningConfig, count_macs, prune
from hf_tokenprune.command_line import parse_arguments
from hf_tokenprune.files import write_atomically
from hf_tokenprune.profiling import Timing, peak_memory, speedup, speedup_bound, time_interleaved
from hf_tokenprune.profiling.arguments import DTYPES
from hf_tokenprune.profiling.machine import describe_machine


Inputs = dict[str, torch.Tensor]

SMALL = {"hidden_size": 384, "num_attention_heads": 6, "num_labels": 1000}
MODELS = {
    "bert-base": (BertForSequenceClassification, BertConfig(), [2, 5, 8]),
    "minilm-l6": (
        BertForSequenceClassification,
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
        [1, 3, 4],
    ),
    "deit-s": (ViTForImageClassification, ViTConfig(intermediate_size=1536, **SMALL), [3, 6, 9]),
    "dinov2-s": (Dinov2ForImageClassification, Dinov2Config(image_size=224, **SMALL), [3, 6, 9]),
}
LENGTHS = (16, 128, 512)
COMPILED = {"compiled": {"dynamic": True}, "graphs": {"mode": "reduce-overhead", "dynamic": False}}
RUNTIMES = ("eager", "onnx", *COMPILED)
RAGGED = {
    "8 texts of 32, 64 ... 256": list(range(32, 257, 32)),
    "32 texts of 16 ... 512": list(range(16, 513, 16)),
    "128 texts of 4 ... 512": list(range(4, 513, 4)),
}


@dataclass
class BenchmarkArguments:
    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": f"of {', '.join(MODELS)}"})
    keep_rate: float = 0.7
    rounds: int = field(default=101, metadata={"help": "interleaved rounds of each point, at most"})
    seconds_per_point: float = field(default=30.0, metadata={"help": "after so long no further round is begun"})
    most_tokens: int = field(default=10**9, metadata={"help": "points of more tokens in a batch are left out"})
    device: str = "cpu"
    batches: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "inputs of a batch"})
    dtypes: list[str] = field(
        default_factory=lambda: ["float32", "bfloat16"],
        metadata={"help": "of the whole grid; further ones, measured at the second batch size (length 128)"},
    )
    runtimes: list[str] = field(
        default_factory=lambda: ["eager", "compiled", "onnx"],
        metadata={
            "help": "further ways to run, at the first two batch sizes (length 128): of eager, compiled, onnx, graphs, "
            "which are CUDA graphs of what is compiled for one shape"
        },
    )
    output_file: str = "outputs/engine.json"


@dataclass(frozen=True)
class Point:
    """One line of the table. lengths: of the texts; of an image model just so many entries."""

    model: str
    batch: str
    lengths: tuple[int, ...]
    dtype: str
    runtime: str = "sdpa"

    @property
    def name(self) -> str:
        return ", ".join([self.model, self.batch, self.dtype, self.runtime])


def main() -> None:
    try:
        (arguments,) = parse_arguments(BenchmarkArguments)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    for name, known in {"models": MODELS, "dtypes": DTYPES, "runtimes": RUNTIMES}.items():
        unknown = sorted(set(getattr(arguments, name)) - set(known))
        if unknown:
            raise SystemExit(f"unknown {name} {unknown}; known: {', '.join(known)}")
    points = [point for name in arguments.models for point in grid(name, arguments)]
    least = min(sum(point.lengths) for point in points)
    if least > arguments.most_tokens:
        raise SystemExit(f"most_tokens ({arguments.most_tokens}) must be at least {least}, those of the smallest point")
    dtype = arguments.dtypes[0]
    report = {"machine": describe_machine(arguments.device) | {"dtype": dtype}, "keep_rate": arguments.keep_rate}
    report["rows"] = []
    path = Path(arguments.output_file)
    if path.exists() and {**json.loads(path.read_text()), "rows": []} == report:
        report = json.loads(path.read_text())
    done = {row["name"] for row in report["rows"]}
    for point in points:
        if point.name not in done and sum(point.lengths) <= arguments.most_tokens:
            report["rows"].append(measure(point, arguments))
            write_atomically(path, json.dumps(report, indent=1).encode())
    text = f"{table(report['rows'], dtype)}\n\n{summary(report['rows'], dtype)}\n"
    write_atomically(path.with_suffix(".md"), text.encode())
    print(text)


def grid(model: str, arguments: BenchmarkArguments) -> list[Point]:
    text = MODELS[model][0] is BertForSequenceClassification
    typical = "x 128" if text else "images"

    first, *others = arguments.dtypes
    batches = arguments.batches

    def point(batch: int, dtype: str = first, **how: str) -> Point:
        return Point(model, f"{batch} {typical}", (128,) * batch, dtype, **how)

    if text:
        points = [
            Point(model, f"{batch} x {length}", (length,) * batch, first) for batch in batches for length in LENGTHS
        ]
        ragged = {name: tuple(lengths) for name, lengths in RAGGED.items() if len(lengths) <= max(batches)}
        points += [Point(model, name, lengths, first) for name, lengths in ragged.items()]
    else:
        points = [point(batch) for batch in batches]
    points += [point(batches[:2][-1], dtype) for dtype in others]
    return points + [point(batch, runtime=runtime) for runtime in arguments.runtimes for batch in batches[:2]]


def measure(point: Point, arguments: BenchmarkArguments) -> dict:
    set_seed(0)
    native, config, layers = MODELS[point.model]
    dtype, device = getattr(torch, point.dtype), torch.device(arguments.device)
    attention = "eager" if point.runtime == "eager" else "sdpa"
    stock = native._from_config(config, attn_implementation=attention, dtype=dtype).eval().to(device)
    pruning = PruningConfig.preset("top_k", layers=layers, keep_rate=arguments.keep_rate)
    models = {"padded": stock, "unpadded": prune(stock, None), "pruned": prune(stock, pruning)}
    inputs = {name: x.to(device) for name, x in batch_of(point, config, dtype).items()}
    row = {"name": point.name, "model": point.model, "batch": point.batch, "samples": len(point.lengths)}
    row |= {"dtype": point.dtype, "runtime": point.runtime}
    with torch.inference_mode(), TemporaryDirectory() as folder:
        logits = {which: model(**inputs).logits for which, model in models.items()}
        calls = {name: runner(model, inputs, point.runtime, folder + name) for name, model in models.items()}
        if len(set(point.lengths)) > 1 and len(point.lengths) > 8:
            calls["padded, sorted"] = sorted_by_length(stock, inputs, point.lengths)
        if point.runtime in (*COMPILED, "onnx"):
            for call in calls.values():  # compiles, and records graphs
                call()
                call()
        row["peak_memory"] = {name: peak_memory(call, device) for name, call in calls.items()}
        timings = time_interleaved(
            calls,
            rounds=arguments.rounds,
            warmup=3 if sum(point.lengths) <= 1024 else 0,  # each has run twice, for its logits and its memory
            seconds=arguments.seconds_per_point,
            progress=lambda steps: tqdm(steps, desc=point.name),
            device=device,
        )
        macs = count_macs(models["pruned"], inputs)
    row["unpadded_logit_difference"] = (logits["unpadded"] - logits["padded"]).abs().max().item()
    return row | figures(timings, macs)


def batch_of(point: Point, config: object, dtype: torch.dtype) -> Inputs:
    batch, length = len(point.lengths), max(point.lengths)
    if not isinstance(config, BertConfig):
        return {"pixel_values": torch.randn(batch, 3, config.image_size, config.image_size, dtype=dtype)}
    mask = torch.arange(length) < torch.tensor(point.lengths)[:, None]
    # Arrival order is no order of length.
    mask = mask[torch.randperm(batch)]
    return {"input_ids": torch.randint(1000, config.vocab_size, (batch, length)) * mask, "attention_mask": mask.long()}


def sorted_by_length(stock: PreTrainedModel, inputs: Inputs, lengths: tuple[int, ...]) -> Callable[[], None]:
    """The stock model on the same texts, sorted and cut into four batches, each padded to its own longest."""
    order = inputs["attention_mask"].sum(dim=1).argsort()
    batches = []
    for rows in order.split(len(lengths) // 4):
        longest = int(inputs["attention_mask"][rows].sum(dim=1).max())
        batches.append({name: x[rows, :longest] for name, x in inputs.items()})
    return lambda: [stock(**batch) for batch in batches] and None


def runner(model: PreTrainedModel, inputs: Inputs, runtime: str, folder: str) -> Callable[[], object]:
    if runtime in COMPILED:
        torch._dynamo.reset()
        compiled = torch.compile(model, **COMPILED[runtime])
        return lambda: compiled(**inputs)
    if runtime != "onnx":
        return lambda: model(**inputs)
    import onnxruntime
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    sample = {name: torch.cat([x, x, x, x])[:4] for name, x in inputs.items()}  # a batch of one would stay one
    OnnxExporter().export(model, sample, config=OnnxConfig(dynamic=True)).save_pretrained(folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    path = next(Path(folder).glob("*.onnx"))
    session = onnxruntime.InferenceSession(path, options, providers=onnxruntime.get_available_providers())
    feed = {name: x.cpu().numpy() for name, x in inputs.items()}
    return lambda: session.run(["logits"], feed)


def figures(timings: dict[str, Timing], macs: object) -> dict:
    padded, unpadded, pruned = (timings[name] for name in ("padded", "unpadded", "pruned"))
    saved = speedup(unpadded, pruned)
    return {
        "rounds": len(padded.seconds),
        "milliseconds": {name: 1e3 * timing.median for name, timing in timings.items()},
        "quartiles": {name: [1e3 * seconds for seconds in timing.spread] for name, timing in timings.items()},
        "unpadded_over_padded": speedup(padded, unpadded),
        "unpadded_over_padded_bound": speedup_bound(padded, unpadded),
        "pruned_over_padded": speedup(padded, pruned),
        "pruned_over_padded_bound": speedup_bound(padded, pruned),
        "pruned_over_unpadded": saved,
        "macs": {"total": macs.total, "lossless": macs.lossless, "unpruned": macs.unpruned},
        "realised": saved * macs.total / macs.lossless,
    }


def table(rows: list[dict], dtype: str) -> str:
    lines = [
        "| shape | padded, ms | unpadded, ms | pruned, ms | unpadded over padded | pruned over padded | pruned over "
        "unpadded | MACs saved | realised | peak MB padded / unpadded / pruned | rounds |",
        "|" + " --- |" * 11,
    ]
    for row in rows:
        times = row["milliseconds"]
        shown = " | ".join(f"{times[name]:.1f}" for name in ("padded", "unpadded", "pruned"))
        peaks = " / ".join(f"{row['peak_memory'][name] / 1e6:.1f}" for name in ("padded", "unpadded", "pruned"))
        peaks = "" if row["runtime"] == "onnx" else peaks
        lines.append(
            f"| {row['name'].removesuffix(f', {dtype}, sdpa')} | {shown} | {row['unpadded_over_padded']:.2f}x | "
            f"{row['pruned_over_padded']:.2f}x (>= {row['pruned_over_padded_bound']:.2f}) | "
            f"{row['pruned_over_unpadded']:.2f}x | {row['macs']['lossless'] / row['macs']['total']:.2f}x | "
            f"{row['realised']:.2f} | {peaks} | {row['rounds']} |"
        )
    return "\n".join(lines)


def summary(rows: list[dict], dtype: str) -> str:
    """What the engine promises, over the points of the grid, through SDPA."""
    plain = [row for row in rows if row["dtype"] == dtype and row["runtime"] == "sdpa"]
    large = [row for row in plain if row["samples"] >= 8]
    lines = [f"largest logit difference with nothing pruned: {max(r['unpadded_logit_difference'] for r in plain):.1e}"]
    if large:
        lines.append(f"realised, median at batch >= 8: {statistics.median(row['realised'] for row in large):.2f}")
        heavy = [row["name"] for row in large if row["peak_memory"]["pruned"] >= row["peak_memory"]["padded"]]
        lines.append(f"peak memory not below the stock model's: {heavy or 'nowhere'}")
    least = min(plain, key=lambda row: row["pruned_over_padded_bound"])
    lines.append(
        f"least speed-up over the stock model: {least['pruned_over_padded']:.2f}x "
        f"(>= {least['pruned_over_padded_bound']:.2f}), {least['name']}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
