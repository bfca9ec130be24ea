"""Fine-tune a classifier or regression of texts or images under pruning, as `TokenPruneTrainingArguments` say.

    python scripts/run_finetune.py --model_name_or_path minilm-l6 --dataset_name reuters-r8 --output_dir out \\
        --pruning '{"preset": "top_k", "layers": [1, 3], "keep_rate": 0.5}' --num_train_epochs 2
    python scripts/run_finetune.py recipe.yaml         # the same arguments, from a .json or .yaml file
    accelerate launch --multi_gpu --num_processes 2 scripts/run_finetune.py recipe.yaml

A row's label is a class, a number (regression) or a list of labels; one line says which, and `--problem_type` overrules
it. Started again with the same arguments, it goes on from the last checkpoint in `output_dir`, if it saved any. Writes
the model and `report.json`: the metrics, what each test input was taken for, and the machine.
"""

from hf_tokenprune import TokenPruneTrainingArguments, packaged
from hf_tokenprune.command_line import parse_arguments
from hf_tokenprune.metrics import JUDGEMENTS
from hf_tokenprune.training.finetune import FinetuneArguments, finetune


def main() -> None:
    try:
        arguments, training = parse_arguments(FinetuneArguments, TokenPruneTrainingArguments)
        report = finetune(arguments, training)
    except (packaged.PackagedFileError, ImportError, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    test = report["test"]
    if training.process_index:
        return
    scores = ", ".join(f"{name} {test[f'test_{name}']:.4f}" for name in JUDGEMENTS[report["problem_type"]].names)
    print(f"{scores} at a MAC ratio of {test['test_mac_ratio']:.3f}; {training.output_dir}")


if __name__ == "__main__":
    main()
