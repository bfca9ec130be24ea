"""Is pruning worth it for this model, here? One command, one folder, one verdict.

    python scripts/run_profile.py --model_name_or_path minilm-l6 --lengths 64 128 256
    python scripts/run_profile.py --model_name_or_path your/classifier --dataset_name your/data --batch_size 32
    python scripts/run_profile.py --model_name_or_path your/vit --image_column image --dataset_name your/images
    accelerate launch scripts/run_profile.py profile.yaml      # the same arguments, from a .json or .yaml file

The stock model on padded batches, our engine with nothing pruned, and the pruned model run on the same inputs. Writes
into `output_dir`: report.md and report.json (time, throughput, memory, FLOPs counted three ways), profiling_*.txt
(operators, from torch.profiler), traces/ (for chrome://tracing or Perfetto), and PNG pictures. Of several processes the
first measures and writes, and the others wait.
"""

import os


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch.distributed

from hf_tokenprune import packaged
from hf_tokenprune.command_line import parse_arguments
from hf_tokenprune.profiling.arguments import ProfileArguments
from hf_tokenprune.profiling.run import run_profile
from hf_tokenprune.viz.profile_plots import draw_profile


def main() -> None:
    try:
        (arguments,) = parse_arguments(ProfileArguments)
        report = run_profile(arguments, draw_profile)
    except (
        packaged.PackagedFileError,
        ImportError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise SystemExit(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if report is not None:
        print("\n".join([report.verdict, *report.notes, f"Everything is in {arguments.output_dir}."]))


if __name__ == "__main__":
    main()
