"""Times the three baselines in turn on given shapes: padded stock model, our engine with nothing pruned, pruned.

    python scripts/run_benchmark.py --output_file model_cards/evidence/engine.json

Weights are random: time does not depend on them, and `top_k` keeps as many tokens whatever they are.
"""

import json
import os
from dataclasses import dataclass, field


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from tqdm.auto import tqdm
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, set_seed

from hf_tokenprune import PruningConfig, count_macs, prune
from hf_tokenprune.files import write_atomically
from hf_tokenprune.profiling import Timing, speedup, time_interleaved
from hf_tokenprune.profiling.machine import describe_machine


MODELS = {
    "bert-base": (BertConfig(), [2, 5, 8]),
    "minilm-l6": (
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
        [1, 3, 4],
    ),
}
BATCHES = {
    "8 x 128": [128] * 8,
    "8 x 512": [512] * 8,
    "8 texts of 32, 64 ... 256": list(range(32, 257, 32)),
    "1 x 128": [128],
}


@dataclass
class BenchmarkArguments:
    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": f"of {', '.join(MODELS)}"})
    keep_rate: float = 0.7
    rounds: int = 11
    attn_implementation: str = "sdpa"
    output_file: str = "outputs/engine.json"


def main() -> None:
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    unknown = sorted(set(arguments.models) - set(MODELS))
    if unknown:
        raise SystemExit(f"unknown models {unknown}; known: {', '.join(MODELS)}")
    rows = [row for name in arguments.models for row in measure_model(name, arguments)]
    report = {"machine": describe_machine(), "attn_implementation": arguments.attn_implementation, "rows": rows}
    write_atomically(arguments.output_file, json.dumps(report, indent=2).encode())
    print(table(rows))


def measure_model(name: str, arguments: BenchmarkArguments) -> list[dict]:
    set_seed(0)
    config, layers = MODELS[name]
    stock = BertForSequenceClassification._from_config(config, attn_implementation=arguments.attn_implementation).eval()
    pruned = prune(stock, PruningConfig.preset("top_k", layers=layers, keep_rate=arguments.keep_rate))
    models = {"padded": stock, "unpadded": prune(stock, None), "pruned": pruned}
    rows = []
    for batch, lengths in BATCHES.items():
        inputs = text_batch(lengths, config.vocab_size)
        with torch.inference_mode():
            timings = time_interleaved(
                {which: lambda model=model, inputs=inputs: model(**inputs) for which, model in models.items()},
                rounds=arguments.rounds,
                warmup=2,
                progress=lambda steps, label=f"{name} {batch}": tqdm(steps, desc=label),
            )
            difference = (models["unpadded"](**inputs).logits - stock(**inputs).logits).abs().max().item()
        rows.append({"model": name, "batch": batch, "unpadded_logit_difference": difference})
        rows[-1] |= figures(timings, count_macs(pruned, inputs))
    return rows


def text_batch(lengths: list[int], vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, vocabulary, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def figures(timings: dict[str, Timing], macs: object) -> dict:
    saved = speedup(timings["unpadded"], timings["pruned"])
    return {
        "rounds": len(timings["padded"].seconds),
        "milliseconds": {name: 1e3 * timing.median for name, timing in timings.items()},
        "quartiles": {name: [1e3 * seconds for seconds in timing.spread] for name, timing in timings.items()},
        "unpadded_over_padded": speedup(timings["padded"], timings["unpadded"]),
        "pruned_over_padded": speedup(timings["padded"], timings["pruned"]),
        "pruned_over_unpadded": saved,
        "macs": {"total": macs.total, "lossless": macs.lossless, "unpruned": macs.unpruned},
        "realised": saved * macs.total / macs.lossless,
    }


def table(rows: list[dict]) -> str:
    lines = [f"{'':38} {'padded':>9} {'unpadded':>9} {'pruned':>9}   unpadded  pruned over    MACs  realised"]
    for row in rows:
        times = " ".join(f"{ms:8.1f} " for ms in row["milliseconds"].values())
        lines.append(
            f"{row['model'] + ', ' + row['batch']:38} {times}  {row['unpadded_over_padded']:7.2f}x "
            f"{row['pruned_over_unpadded']:11.2f}x {row['macs']['lossless'] / row['macs']['total']:6.2f}x "
            f"{row['realised']:9.2f}"
        )
    return "\n".join([*lines, "milliseconds per batch, medians of interleaved rounds"])


if __name__ == "__main__":
    main()
