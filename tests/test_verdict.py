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


def test_where_nothing_was_pruned_nothing_is_praised():
    words = said(timings(0.5), {1: timings(1.0), 8: timings(0.5)}, macs=0.9995)
    assert words.startswith("Not worth it: ") and "It took nothing away from these inputs" in words
    assert "leave it off there" not in words


def test_sizes_at_which_it_loses_are_other_sizes():
    words = said(timings(0.5), {1: timings(1.1), 4: timings(1.0), 8: timings(1.0)})
    assert words.startswith("Worth it: in batches of 8 ") and "At 1 and 4 inputs a batch it gains nothing" in words
    assert "leave it off" not in said(timings(0.5), {8: timings(1.0)})


def test_few_rounds_show_nothing():
    words = said(timings(0.5, rounds=4))
    assert words.startswith("Not shown to be worth it: ") and "2.00x (rounds: 4, too few for a bound)" in words
    assert said(timings(0.5, rounds=5)).startswith("Worth it: ")
