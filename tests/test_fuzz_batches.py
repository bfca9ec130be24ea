"""Random batches by random prunings: alone as in the batch, one meaning in each execution; threads and long runs."""

import gc
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods import METHODS, pruned
from random_cases import Batch, Inputs, batches, prunings
from test_invariants import alone, at_own_places, at_tokens, examples, native_of, scale
from tiny import ALL, BASES, EXECUTIONS, LAYERS, Case, cases, inputs_for, main_output, text_inputs
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from hf_tokenprune import PruningConfig
from hf_tokenprune.modeling.pruning_stage import SALIENCIES


SMALL, LARGE = 40, 1000
CASES = cases(ALL)
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16)
OUTPUTS = ("logits", "last_hidden_state", "pooler_output")


@dataclass(frozen=True)
class Answer:
    """What a model says of a batch: outputs as its layout has them, and by site and sample the row of each place."""

    outputs: dict[str, torch.Tensor]
    rows: list


def in_rows(model: PreTrainedModel, inputs: Inputs) -> Answer:
    """A batch as it is: samples side by side, with padding."""
    with torch.no_grad():
        outputs = model(**inputs, output_token_trace=True)
    named = {name: outputs[name] for name in OUTPUTS if outputs.get(name) is not None}
    return Answer(named, outputs.token_trace.source.tolist())


def in_one_row(model: PreTrainedModel, inputs: Inputs) -> Answer:
    """The texts of a batch one after the other, with their borders; images as they are."""
    if "input_ids" not in inputs:
        return in_rows(model, inputs)
    there = inputs["attention_mask"].bool()
    flat = {name: value[there][None] for name, value in inputs.items() if name != "attention_mask"}
    flat["cu_seq_lens_q"] = nn.functional.pad(there.sum(dim=1).cumsum(dim=0), (1, 0))
    answer = in_rows(model, flat)

    def back(of_tokens: torch.Tensor) -> torch.Tensor:  # [1, T, D] -> [B, N, D]
        padded = of_tokens.new_zeros(*there.shape, of_tokens.shape[2])
        padded[there] = of_tokens[0]
        return padded

    rows = [
        [[own.pop(0) if real else -1 for real in places] for own, places in zip(site, there.tolist())]
        for site in answer.rows
    ]
    return Answer({name: back(x) if x.dim() == 3 else x for name, x in answer.outputs.items()}, rows)


# Other ways to give the same samples, which say the same in the end: each takes a model and padded inputs.
LAYOUTS: dict[str, Callable[[PreTrainedModel, Inputs], Answer]] = {"rows": in_rows, "one row": in_one_row}


def looks_ids_up(pruning: PruningConfig) -> bool:
    return any(SALIENCIES[stage.saliency].token_ids for stage in pruning.resolve(LAYERS).stages)


@st.composite
def methods_for(draw: st.DrawFn, case: Case) -> PruningConfig:
    """A preset, or any stages that go together."""
    named = [pruning for pruning in METHODS.values() if case.text or not looks_ids_up(pruning)]
    return draw(st.one_of(st.sampled_from(named), prunings(case.text)))


@st.composite
def asked(draw: st.DrawFn) -> tuple[Case, PruningConfig, Batch, torch.dtype, str]:
    case = draw(st.sampled_from(CASES))
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    return case, draw(methods_for(case)), draw(batches(case)), draw(st.sampled_from(DTYPES)), layout


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert_close(ours, theirs, rtol=0, atol=1e-5 * scale(theirs))


def assert_one_meaning(case: Case, pruning: PruningConfig, batch: Batch, dtype: torch.dtype, layout: str) -> None:
    native, inputs = native_of(case, dtype=dtype), cast(batch.inputs, dtype)
    answers = [
        LAYOUTS[layout](pruned(native, replace(pruning, execution=execution)), inputs) for execution in EXECUTIONS
    ]
    if dtype == torch.bfloat16:  # which of near-ties stays is open
        assert all(value.dtype == dtype and value.isfinite().all() for one in answers for value in one.outputs.values())
        return
    first, *others = answers
    for other in others:
        assert other.rows == first.rows
        for name, value in first.outputs.items():
            assert_near(other.outputs[name], value)
    model = pruned(native, pruning)
    kept, value = at_own_places(first.rows, batch), main_output(first.outputs)
    for row, where in enumerate(batch.places):
        single = alone(batch, row)
        expected = in_rows(model, cast(single.inputs, dtype))
        assert [site[row] for site in kept] == [site[0] for site in at_own_places(expected.rows, single)]
        ours = value[row]
        assert_near(ours[where] if ours.dim() == 2 else ours[None], at_tokens(main_output(expected.outputs), single))


def fuzz(count: int) -> None:
    @examples(count)
    @given(asked())
    def check(case: tuple[Case, PruningConfig, Batch, torch.dtype, str]) -> None:
        assert_one_meaning(*case)

    check()


def test_random_batches():
    fuzz(SMALL)


@pytest.mark.fuzz
def test_many_random_batches():
    fuzz(LARGE)


# Threads

WISHES: list[dict[str, Any]] = [
    {},
    {"output_token_trace": True},
    {"output_hidden_states": True},
    {"output_hidden_states": True, "output_token_trace": True},
]


def different_inputs(case: Case, count: int) -> list[Inputs]:
    chance = random.Random(0)
    if not case.text:
        return [inputs_for(case, seed=seed) for seed in range(count)]
    lengths = [[chance.randint(1, 30) for _ in range(chance.randint(1, 4))] for _ in range(count)]
    return [text_inputs(own, seed=seed, padding=seed % 3) for seed, own in enumerate(lengths)]


def everything(outputs: Any) -> list[torch.Tensor]:
    trace = outputs.get("token_trace")
    found = [main_output(outputs), *(outputs.get("hidden_states") or ())]
    return found + ([trace.source, trace.counts] if trace is not None else [])


def assert_threads_equal_serial(case: Case, name: str, calls: int) -> None:
    if looks_ids_up(METHODS[name]) and not case.text:
        pytest.skip("no token ids to look up")
    model = pruned(native_of(case), METHODS[name])
    work = [(inputs, WISHES[i % len(WISHES)]) for i, inputs in enumerate(different_inputs(case, calls))]

    def call(one: tuple[Inputs, dict[str, Any]]) -> list[torch.Tensor]:
        with torch.no_grad():
            return everything(model(**one[0], **one[1]))

    expected = [call(one) for one in work]
    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(call, work))
    for ours, theirs in zip(actual, expected):
        assert len(ours) == len(theirs)
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("name", METHODS)
def test_eight_threads_equal_serial(name):
    assert_threads_equal_serial(CASES[0], name, 16)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", BASES)
def test_eight_threads_equal_serial_many_times(case, name):
    assert_threads_equal_serial(case, name, 64)


# Long runs


def alive() -> tuple[int, int]:
    """Objects and tensors that are there."""
    gc.collect()
    objects = gc.get_objects()
    return len(objects), sum(issubclass(type(item), torch.Tensor) for item in objects)


def grown(calls: int) -> tuple[int, int, float]:
    """By how many objects, tensors and MiB the second half of some calls leaves more behind."""
    case = CASES[0]
    models = [pruned(native_of(case), pruning) for pruning in METHODS.values()]
    work = different_inputs(case, 97)

    def call(count: int) -> None:
        for i in range(count):
            with torch.no_grad():
                models[i % len(models)](**work[i % len(work)], **WISHES[i % len(WISHES)])

    call(calls // 2)
    objects, tensors = alive()
    memory = psutil.Process().memory_info().rss
    call(calls - calls // 2)
    more_memory = psutil.Process().memory_info().rss - memory
    more_objects, more_tensors = alive()
    return more_objects - objects, more_tensors - tensors, more_memory / 2**20


def assert_no_growth(calls: int) -> None:
    objects, tensors, mebibytes = grown(calls)
    assert tensors == 0
    assert objects < 100 and mebibytes < 16, (objects, mebibytes)


def test_calls_leave_nothing_behind():
    assert_no_growth(300)


@pytest.mark.fuzz
def test_two_thousand_calls_leave_nothing_behind():
    assert_no_growth(2 * 2000)  # after as many


def test_prunings_that_come_and_go_leave_nothing_behind():
    model, inputs = pruned(native_of(CASES[0]), None), inputs_for(CASES[0])

    def switch(count: int) -> None:
        for i in range(count):
            model.set_pruning({"preset": "top_k", "layers": [1, 2], "keep_rate": (i % 997 + 1) / 1000})
            with torch.no_grad():
                model(**inputs)

    switch(160)  # fills what is remembered of sites, which has an end
    before, tensors = alive()
    switch(160)
    after, more_tensors = alive()
    assert more_tensors == tensors and after - before < 100, after - before
