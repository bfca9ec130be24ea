"""Arguments of `run_profile.py`."""

from dataclasses import dataclass, field

from .. import packaged
from ..command_line import parse_mapping
from ..data import DataArguments


DTYPES = ("float32", "bfloat16", "float16")
SPLITS = ("train", "test")


@dataclass(kw_only=True)
class ProfileArguments(DataArguments):
    """What is profiled, on what, and where the report goes.

    Raises:
        ValueError: an unknown choice, or a count out of range.
    """

    model_name_or_path: str = field(
        default="minilm-l6",
        metadata={"help": f"Hub id, folder, native or pruned, or one of {', '.join(packaged.available_models())}."},
    )
    output_dir: str = field(default="outputs/profile", metadata={"help": "Where the report and all else goes."})
    pruning: str | None = field(
        default=None,
        metadata={
            "help": "A preset's name, or JSON as PruningConfig takes it; the checkpoint's own if not given, or top_k "
            "with keep_rate 0.7 where it has none."
        },
    )
    config_overrides: str | None = field(default=None, metadata={"help": "JSON of fields of the model's config."})
    random_weights: bool = field(
        default=False, metadata={"help": "The model's shape alone, with config_overrides applied; no weights are read."}
    )
    lengths: list[int] = field(
        default_factory=lambda: [128], metadata={"help": "Real tokens of made-up texts; a batch takes them in turn."}
    )
    batch_size: int = field(default=8, metadata={"help": "Inputs of a batch."})
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 4, 16], metadata={"help": "Further batches, for latency over batch size."}
    )
    split: str = field(default="test", metadata={"help": "train or test: where the inputs are taken from."})
    max_inputs: int = field(default=64, metadata={"help": "Inputs that are read from the data."})
    rounds: int = field(default=15, metadata={"help": "Timed rounds, in each of which all models run in turn."})
    batch_rounds: int = field(
        default=100, metadata={"help": "Timed rounds of single batches, which p50 and p99 are taken from."}
    )
    seconds: float = field(default=120.0, metadata={"help": "After so long no further round is begun, of each timing."})
    dtype: str = field(default="float32", metadata={"help": f"Of the weights: {', '.join(DTYPES)}."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "As from_pretrained takes it."})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; what accelerate finds if not given."})
    energy: bool = field(
        default=False, metadata={"help": "Read the machine's meters with zeus, the extra 'energy', where it has some."}
    )
    seed: int = field(default=0, metadata={"help": "Of made-up inputs and random weights."})

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length", "max_inputs", "rounds", "batch_rounds"):
            _at_least_one(name, getattr(self, name))
        for name in ("lengths", "batch_sizes"):
            for value in getattr(self, name):
                _at_least_one(name, value)
        if not self.lengths:
            raise ValueError(f"lengths ({self.lengths}) must hold at least one length")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype ({self.dtype!r}) must be one of {', '.join(DTYPES)}")
        if self.split not in SPLITS:
            raise ValueError(f"split ({self.split!r}) must be one of {', '.join(SPLITS)}")
        _ = self.overrides  # or an error

    @property
    def overrides(self) -> dict:
        return parse_mapping("config_overrides", self.config_overrides or "{}")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} ({value}) must be at least 1")
