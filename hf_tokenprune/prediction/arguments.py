"""What a prediction run is asked for."""

from dataclasses import dataclass, field

from ..labels import PROBLEMS, REGRESSION, check_problem


# What two runs must share for one to go on where the other was stopped. How rows are batched and how many processes
# there are is not among it: no result depends on those.
DECISIVE = (
    "task",
    "pooling",
    "normalize",
    "logits",
    "problem_type",
    "dtype",
    "max_length",
    "dataset_name",
    "dataset_config",
    "dataset_revision",
    "data_files",
    "split",
    "text_column",
    "image_column",
    "id_column",
    "keep_columns",
    "max_rows",
    "rows_per_shard",
)
_CHOICES = {
    "task": ("predict", "embed"),
    "pooling": ("mean", "kept_mean", "cls"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}
_COUNTS = ("max_length", "max_rows", "rows_per_shard", "max_tokens_per_batch", "max_rows_per_batch")


class PredictionError(RuntimeError):
    """What stops a run that has begun and its user can mend; finished shards stay."""


def one_line(error: BaseException) -> str:
    """Its message without line breaks; some libraries send paragraphs."""
    return " ".join(str(error).split())


@dataclass
class PredictionArguments:
    """A prediction run.

    Raises:
        ValueError: an unknown choice, a count below one, or choices that do not go together.
    """

    model_name_or_path: str = field(
        default="minilm-l6", metadata={"help": "a packaged model's short name, a folder, or a Hub id; pruned or not"}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "a packaged set's short name, a Hub id, a folder of `save_to_disk`, a file, or with --data_files "
            "their kind (csv, json, parquet, text, ...)"
        },
    )
    output_dir: str = field(
        default="outputs/predict", metadata={"help": "where the shards go; an unfinished run in it is gone on with"}
    )
    task: str = field(default="predict", metadata={"help": "predict: a sequence's or image's class; embed: a vector"})
    pooling: str = field(
        default="mean",
        metadata={
            "help": "of embed. mean: over all real tokens, dropped ones as they were last; kept_mean: over the tokens "
            "that are left; cls: the first token"
        },
    )
    normalize: bool = field(default=False, metadata={"help": "embed: vectors of length one"})
    logits: bool = field(default=False, metadata={"help": "predict: the logits, too"})
    problem_type: str | None = field(
        default=None,
        metadata={
            "help": f"predict: one of {', '.join(PROBLEMS)}; the checkpoint's own if not given. Where it says none, "
            f"one logit gives its sigmoid, as in pipelines, and with {REGRESSION} the number"
        },
    )
    pruning: str | None = field(
        default=None,
        metadata={
            "help": "a preset's name, or JSON with its hyper-parameters; 'none': unpruned; not given: as the "
            "checkpoint has it"
        },
    )
    dataset_config: str | None = None
    dataset_revision: str | None = None
    data_files: list[str] | None = field(default=None, metadata={"help": "files or patterns of one kind"})
    split: str = field(
        default="train",
        metadata={"help": "local files have no other, unless a folder says so; 'train[10:20]': so many of its rows"},
    )
    text_column: str = "text"
    image_column: str | None = field(default=None, metadata={"help": "images in place of text"})
    id_column: str | None = field(default=None, metadata={"help": "a column that names the rows; copied"})
    keep_columns: list[str] | None = field(
        default=None,
        metadata={"help": "columns to copy; one named like a column of results comes as `input_<name>`"},
    )
    max_length: int | None = field(default=None, metadata={"help": "tokens; by default as many as the model takes"})
    max_rows: int | None = field(default=None, metadata={"help": "only the first so many"})
    rows_per_shard: int = field(default=2048, metadata={"help": "the unit of work, and all that a kill can cost"})
    max_tokens_per_batch: int = field(default=8192, metadata={"help": "real tokens: padding is not computed"})
    max_rows_per_batch: int = 256
    dtype: str = field(default="auto", metadata={"help": "auto (the checkpoint's), float32, bfloat16 or float16"})
    model_revision: str | None = None
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that a checkpoint brings along"})

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(choices)}")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if self.dataset_name is None and not self.data_files:
            raise ValueError("dataset_name (None) must be given, or data_files")
        if self.task == "predict" and self.normalize:
            raise ValueError("normalize (True) goes with task 'embed' alone")
        for name in ("logits", "problem_type"):
            if self.task == "embed" and getattr(self, name):
                raise ValueError(f"{name} ({getattr(self, name)!r}) goes with task 'predict' alone")
        check_problem(self.problem_type)
