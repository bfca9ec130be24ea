"""Whether the processes of a launch are what a job takes."""

from accelerate.utils import get_int_from_env
from transformers import TrainingArguments


# As launchers tell a process how many there are: torchrun and accelerate, then three kinds of MPI.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def launched() -> int:
    """How many processes were launched together."""
    return get_int_from_env(SIZES, 1)


def check_together(training: TrainingArguments) -> None:
    """Raises a ValueError where several processes were launched and each would train by itself."""
    if launched() > 1 and training.world_size == 1:
        raise ValueError(
            f"use_cpu ({training.use_cpu}) must be true for {launched()} processes without an accelerator: each would "
            "train by itself"
        )


def check_alone(script: str) -> None:
    """Raises a ValueError for a script that was launched more than once, each of which would do all of its work."""
    if launched() > 1:
        raise ValueError(f"{script} was launched in {launched()} processes and must be one, which starts its own")
