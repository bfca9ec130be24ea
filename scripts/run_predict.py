"""Predict or embed a data set of any size, under `accelerate launch`, into Parquet shards; resumable.

    python scripts/run_predict.py --task embed --dataset_name 20newsgroups --split test --normalize
    accelerate launch --num_processes 8 scripts/run_predict.py --model_name_or_path your/bert --dataset_name your/data
    python scripts/run_predict.py run.yaml            # the same arguments, from a .json or .yaml file

Started again with the same arguments and `output_dir`, it computes what is missing, with as many processes as there are
now.
"""

import os


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from accelerate import PartialState
from transformers.utils import logging

from hf_tokenprune.command_line import parse_arguments
from hf_tokenprune.prediction import PredictionArguments, predict_dataset
from hf_tokenprune.prediction.arguments import one_line


def main() -> None:
    try:
        (arguments,) = parse_arguments(PredictionArguments)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {one_line(error)}") from error
    logging.disable_progress_bar()  # one bar per process, for loading weights
    summary = predict_dataset(arguments)
    run, state = summary["this_run"], PartialState()
    if state.is_main_process:
        print(
            f"{summary['rows']} rows in {summary['shards']} shards are in {arguments.output_dir}; computed now: "
            f"{run['rows']} rows in {run['seconds']:.1f} s, {run['rows_per_second']:.1f} rows/s, "
            f"{run['tokens_per_second']:.0f} tokens/s"
        )
    state.destroy_process_group()


if __name__ == "__main__":
    main()
