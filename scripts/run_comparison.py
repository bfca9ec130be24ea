"""Run a recipe and its controls over several seeds, and say what it gains and loses.

    python scripts/run_comparison.py --recipe recipes/minilm-20newsgroups-religion --output_dir out --seeds 0 1 2
    python scripts/run_comparison.py --recipe recipes/minilm-20newsgroups-religion --output_dir out --processes 2

Each run is one call of `run_finetune.py`. Runs that are done are not done again, and with other arguments are refused;
one that was interrupted goes on. However this ends, the runs that it started end with it.
At the end the padded, the unpadded and the pruned model of the first seed are timed in turn, and the `--timed_runs`
with them. Writes `comparison.json` and `comparison.md`.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from hf_tokenprune import TokenPruneTrainingArguments, packaged
from hf_tokenprune.checkpoints import weights_digest
from hf_tokenprune.command_line import parse_arguments, read_mapping, typed_arguments
from hf_tokenprune.files import write_atomically
from hf_tokenprune.profiling.machine import describe_machine
from hf_tokenprune.training.children import Children
from hf_tokenprune.training.comparison import Recipe, parsed, quality_table, summarise, time_table
from hf_tokenprune.training.finetune import FinetuneArguments
from hf_tokenprune.training.processes import check_alone
from hf_tokenprune.training.timed_runs import time_runs


FINETUNE = Path(__file__).with_name("run_finetune.py")


@dataclass
class ComparisonArguments:
    recipe: str = field(metadata={"help": "Folder with baseline.yaml, pruned.yaml and controls.yaml."})
    output_dir: str = field(metadata={"help": "Where the runs, comparison.json and comparison.md go."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One of each run for each."})
    processes: int = field(default=1, metadata={"help": "Runs at a time; the processor's threads are shared out."})
    held_out_samples: int | None = field(
        default=None, metadata={"help": "To choose a recipe by: every run is tested as run_finetune.py's says."}
    )
    timed_inputs: int = field(default=128, metadata={"help": "Test inputs of the timing; 0: no timing."})
    timed_rounds: int = field(default=9, metadata={"help": "Rounds of the timing."})
    timed_runs: list[str] = field(
        default_factory=list, metadata={"help": "Runs to time in turn with `pruned`, each on its own inputs."}
    )

    def __post_init__(self) -> None:
        for name, least in (("processes", 1), ("timed_inputs", 0), ("timed_rounds", 3)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be >= {least}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds ({self.seeds}) must be at least one, and none twice")


class Comparison:
    """The runs of all seeds, and what comes of them."""

    def __init__(self, arguments: ComparisonArguments):
        self.arguments = arguments
        check_alone("run_comparison.py")
        self.recipe = Recipe.read(arguments.recipe)
        self._check_runs()
        self.folder = Path(arguments.output_dir)
        self.threads = max(1, torch.get_num_threads() // arguments.processes)
        self.children = Children()

    def _check_runs(self) -> None:
        """Raises a ValueError, before any run begins, for a run that there is not, and an argument of one that there is
        not or that is of another type."""
        others = [name for name in self.recipe.others if name != "pruned"]
        for name in self.arguments.timed_runs:
            if name not in others or self.arguments.timed_runs.count(name) > 1:
                raise ValueError(f"timed_runs ({name!r}) must be, once, one of {', '.join(others)}")
        classes = FinetuneArguments, TokenPruneTrainingArguments
        known = {each.name for cls in classes for each in fields(cls)}
        for name, own in {"baseline": self.recipe.baseline, **self.recipe.others}.items():
            where = f"{name} of {self.arguments.recipe}"
            for argument in own:
                if argument not in known:
                    raise ValueError(f"{where} has {argument!r}, no run_finetune.py argument")
            typed_arguments(classes, own, where)

    def folder_of(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}"

    def arguments_of(self, name: str, seed: int, folder: Path) -> dict[str, Any]:
        """What a run is called with, where the runs of its seed are in `folder`."""
        arguments = self.recipe.arguments(name, folder, seed)
        if self.arguments.held_out_samples is not None:
            arguments["held_out_samples"] = self.arguments.held_out_samples
        return arguments

    def check_done(self, name: str, seed: int) -> None:
        """Raises a ValueError for a run that is done, but with other arguments than are asked for."""
        folder = self.folder_of(seed) / name
        if not (folder / "report.json").exists():
            return
        given = folder / "arguments.yaml"
        found = read_mapping(given)
        # Asked for where it was done: the same folder may since have moved, or be given by another path.
        asked = self.arguments_of(name, seed, Path(found["output_dir"]).parent)
        for argument in [*asked, *found]:
            was, wish = found.get(argument), asked.get(argument)
            if parsed(was) != parsed(wish):
                raise ValueError(f"{argument} ({wish!r}) must be {was!r}, as in {given}: take another output_dir")

    def finetune(self, name: str, seed: int) -> dict[str, Any]:
        """One run's report; the run itself, unless it is done."""
        folder = self.folder_of(seed) / name
        if not (folder / "report.json").exists():
            given = folder / "arguments.yaml"
            write_atomically(given, yaml.safe_dump(self.arguments_of(name, seed, self.folder_of(seed))).encode())
            with open(folder / "log.txt", "ab") as log:
                environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
                status = self.children.run(FINETUNE, [str(given)], stdout=log, stderr=log, env=environment)
            if status:
                raise RuntimeError(f"{name} of seed {seed} ended with {status}: see {folder / 'log.txt'}")
        return json.loads((folder / "report.json").read_text())

    def run(self) -> dict[str, Any]:
        seeds, names = self.arguments.seeds, ["baseline", *self.recipe.others]
        jobs = [(name, seed) for seed in seeds for name in names]
        for job in jobs:
            self.check_done(*job)
        failures: list[Exception] = []
        pool = ThreadPoolExecutor(self.arguments.processes)
        with pool, tqdm(total=len(jobs), desc="runs") as bar, self.children:  # the pool waits for all that still run

            def follow(job: tuple[str, int]) -> dict[str, Any] | None:
                if failures:  # what has not begun need not
                    return None
                try:
                    report = self.finetune(*job)
                except Exception as error:
                    failures.append(error)
                    return None
                bar.update()
                return report

            baselines = {seed: pool.submit(follow, ("baseline", seed)) for seed in seeds}  # before all others

            def follow_baseline(job: tuple[str, int]) -> dict[str, Any] | None:
                baselines[job[1]].result()
                return follow(job)

            rest = [job for job in jobs if job[0] != "baseline"]
            done = dict(zip(rest, pool.map(follow_baseline, rest)))
            done |= {("baseline", seed): baseline.result() for seed, baseline in baselines.items()}
        if failures:
            raise failures[0]
        reports = {name: [done[name, seed] for seed in seeds] for name in names}
        return {
            "recipe": {"baseline": self.recipe.baseline, **self.recipe.others},
            "seeds": seeds,
            "held_out_samples": self.arguments.held_out_samples,
            "problem_type": done[names[0], seeds[0]].get("problem_type"),
            "machine": done[names[0], seeds[0]]["machine"],
            "interpolated": any(report.get("interpolated") for report in reports["pruned"]),
            "quality": summarise(reports),
            "prunings": [report["pruning"] for report in reports["pruned"]],
            "weights": [weights_digest(self.folder_of(seed) / "pruned" / "model") for seed in seeds],
        }

    def time(self) -> dict[str, Any]:
        folder = self.folder_of(self.arguments.seeds[0])
        asked = self.arguments
        rows = time_runs(folder, asked.timed_runs, inputs=asked.timed_inputs, rounds=asked.timed_rounds)
        return {"machine": describe_machine(), "rows": rows}


def main() -> None:
    try:
        (arguments,) = parse_arguments(ComparisonArguments)
        comparison = Comparison(arguments)
        report = comparison.run()
        if arguments.timed_inputs:
            report["speed"] = comparison.time()
    except (packaged.PackagedFileError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    write_atomically(comparison.folder / "comparison.json", json.dumps(report, indent=1).encode())
    tables = quality_table(report["quality"])
    if "speed" in report:
        tables += "\n\n" + time_table(**report["speed"])
    write_atomically(comparison.folder / "comparison.md", f"{tables}\n".encode())
    print(tables)


if __name__ == "__main__":
    main()
