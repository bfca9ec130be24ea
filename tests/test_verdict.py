"""What a profile says in words: what it praises, what it does not, and what it counts as pruning."""

from hf_tokenprune.profiling import Timing
from hf_tokenprune.profiling.report import verdict


def timings(pruned: float, rounds: int = 15, unpadded: float = 1.0) -> dict[str, Timing]:
    """Of rounds that are all alike."""
    seconds = {"padded": 1.2, "unpadded": unpadded, "pruned": pruned}
    return {name: Timing((each,) * rounds) for name, each in seconds.items()}


def said(overall: dict[str, Timing], by_batch_size: dict | None = None, macs: float = 0.5) -> str:
    return verdict(overall, by_batch_size or {8: overall}, macs, 8, "cpu")


def test_what_the_engine_gains_without_pruning_is_not_called_padding_alone():
    words = said(timings(0.5))
    assert words.startswith("Worth it: in batches of 8 on cpu pruning gains 2.00x (at least 2.00x) over the unpadded")
    assert "(no padding, no last-layer tokens that nobody reads) gains 1.20x over the stock model" in words
