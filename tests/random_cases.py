"""Random prunings and random batches: strategies for properties."""

import random
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from tiny import BASES, BERT, LAYERS, VOCABULARY, Case, image_inputs

from hf_tokenprune import PruningConfig, PruningStage
from hf_tokenprune.modeling.pruning_stage import MERGES, REDUCTIONS, RULES, SALIENCIES


Inputs = dict[str, torch.Tensor]

# Random prunings

percents = st.integers(1, 100).map(lambda percent: percent / 100)
layer_lists = st.sets(st.integers(0, LAYERS - 1), min_size=1).map(sorted)
saliencies = st.sampled_from(["cls_attention", "received_attention"])


@st.composite
def top_k(draw: st.DrawFn) -> PruningConfig:
    return PruningConfig.preset("top_k", layers=draw(layer_lists), keep_rate=draw(percents))


@st.composite
def falling_rates(draw: st.DrawFn) -> PruningConfig:
    layers = draw(layer_lists)
    rates = sorted(draw(st.lists(percents, min_size=len(layers), max_size=len(layers))), reverse=True)
    return PruningConfig(stages=(PruningStage(layers, draw(saliencies), "keep_rate", rates),))


@st.composite
def adaptive(draw: st.DrawFn) -> PruningConfig:
    layers = draw(layer_lists)
    thresholds = draw(st.lists(st.integers(0, 150), min_size=len(layers), max_size=len(layers)))
    # Off the grid: a sample of one token scores exactly 1.
    thresholds = [threshold / 100 + 0.0033 for threshold in thresholds]
    return PruningConfig.preset("adaptive", layers=layers, threshold=thresholds, saliency=draw(saliencies))


hundredths = st.integers(0, 60).map(lambda value: value / 100 + 0.0033)
VALUES = {
    "keep_rate": percents,
    "site_keep_rate": percents,
    "keep_count": st.integers(1, 35),
    "remove_count": st.integers(0, 12),
    "relative_threshold": hundredths.map(lambda value: value * 2),
    "median_threshold": hundredths.map(lambda value: value * 2),
    "threshold": hundredths.map(lambda value: value / 8),
    "top_p": hundredths.map(lambda value: value + 0.39),
}


@st.composite
def staged(draw: st.DrawFn) -> PruningConfig:
    """Any saliency with any rule and any reduction that go together; every preset is one of these."""
    saliency = draw(st.sampled_from([name for name in SALIENCIES if name not in ("learned", "token_prior")]))
    layers = draw(layer_lists)
    pairs = SALIENCIES[saliency].similarity
    rule = "remove_count" if pairs else draw(st.sampled_from(sorted(VALUES)))
    reduction = draw(st.sampled_from(MERGES if pairs else REDUCTIONS))
    values = draw(st.lists(VALUES[rule], min_size=len(layers), max_size=len(layers)))
    values = sorted(values, reverse=True) if RULES[rule].falling else values
    cut = None
    if rule == "keep_count" and reduction != "drop" and draw(st.booleans()):
        cut = [value + draw(st.integers(0, 9)) for value in values]
    place = draw(st.sampled_from(SALIENCIES[saliency].places))
    stage = PruningStage(layers, saliency, rule, values, reduction, place, cut, seed=draw(st.integers(0, 3)))
    return PruningConfig(stages=(stage,), proportional_attention=draw(st.booleans()))


@st.composite
def prunings(draw: st.DrawFn, text: bool, drop: bool = False) -> PruningConfig:
    """drop: only those that fuse and merge nothing."""
    pruning = draw(st.one_of(top_k(), falling_rates(), adaptive(), *(() if drop else (staged(), staged()))))
    ids = draw(st.sets(st.integers(1, VOCABULARY - 1), max_size=4)) if text else ()
    return replace(pruning, min_tokens=draw(st.integers(1, 6)), protected_token_ids=tuple(ids))


# Random batches


@dataclass(frozen=True)
class Batch:
    """Inputs, and the places of each sample's tokens in order."""

    inputs: Inputs
    places: list[list[int]]

    @property
    def real(self) -> torch.Tensor:  # bool [B, N]
        width = max(max(places) for places in self.places) + 1
        if "attention_mask" in self.inputs:
            return self.inputs["attention_mask"].bool()
        return torch.ones(len(self.places), width, dtype=torch.bool)


def lay_out(samples: list[list[int]], how: str, extra: int, seed: int) -> Batch:
    """Token ids side by side in a batch.

    Args:
        how: "right", "left" or "holes", where the padding goes; "holes_inside": never at the first place.
        extra: padding of the longest sample.
        seed: chooses the holes and what the padding holds.
    """
    chance = random.Random(seed)
    width = max(map(len, samples)) + extra
    ids = [[chance.randrange(VOCABULARY) for _ in range(width)] for _ in samples]
    position_ids = [[chance.randrange(BERT.max_position_embeddings) for _ in range(width)] for _ in samples]
    places = []
    for row, sample in enumerate(samples):
        start = {"left": width - len(sample)}.get(how, 0)
        where = list(range(start, start + len(sample)))
        if how == "holes":
            where = sorted(chance.sample(range(width), len(sample)))
        elif how == "holes_inside":
            where = [0, *sorted(chance.sample(range(1, width), len(sample) - 1))]
        for position, (place, token) in enumerate(zip(where, sample)):
            ids[row][place], position_ids[row][place] = token, position
        places.append(where)
    mask = [[int(place in where) for place in range(width)] for where in places]
    tensors = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
    return Batch({name: torch.tensor(value) for name, value in tensors.items()}, places)


seeds = st.integers(0, 2**20)


def sentence(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1, VOCABULARY), k=length)


sentences = st.builds(sentence, st.integers(1, 30), seeds)


@st.composite
def text_batches(draw: st.DrawFn, how: str = "any", min_size: int = 1) -> Batch:
    where = st.sampled_from(["right", "left", "holes"]) if how == "any" else st.just(how)
    samples = draw(st.lists(sentences, min_size=min_size, max_size=4))
    return lay_out(samples, draw(where), draw(st.integers(0, 6)), draw(seeds))


@st.composite
def image_batches(draw: st.DrawFn, case: Case, masked: bool, min_size: int = 1) -> Batch:
    batch = draw(st.integers(min_size, 4))
    inputs, places = image_inputs(batch, seed=draw(seeds)), [list(range(case.tokens))] * batch
    if not masked:
        return Batch(inputs, places)
    chance = random.Random(draw(seeds))
    special, patches = list(range(case.prefix)), range(case.prefix, case.tokens)
    places = [[*special, *sorted(chance.sample(patches, chance.randrange(37)))] for _ in range(batch)]
    mask = torch.tensor([[int(place in where) for place in range(case.tokens)] for where in places])
    return Batch(inputs | {"attention_mask": mask}, places)


def batches(case: Case, how: str = "any", min_size: int = 1) -> st.SearchStrategy[Batch]:
    if case.text:
        return text_batches(how, min_size)
    whole = image_batches(case, masked=False, min_size=min_size)
    # An image head that pools its patches has no meaning for patches that are not there.
    return st.one_of(whole, image_batches(case, masked=True, min_size=min_size)) if is_base(case) else whole


def is_base(case: Case) -> bool:
    return any(param.values[0] is case for param in BASES)
