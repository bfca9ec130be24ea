"""`run_profile`: every figure says what it is, three ways of counting agree, and what goes wrong is said."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from methods import METHODS, pruned
from transformers import ViTForImageClassification
from transformers.models.bert.modeling_bert import BertEmbeddings

from hf_tokenprune import prune
from hf_tokenprune.profiling import energy, operators, peak_memory, run
from hf_tokenprune.profiling.arguments import ProfileArguments
from hf_tokenprune.profiling.baselines import stock_model
from hf_tokenprune.profiling.energy import measure_energy
from hf_tokenprune.profiling.latency import Timing, time_interleaved
from hf_tokenprune.profiling.memory import peak_resident
from hf_tokenprune.profiling.operators import count_flops
from hf_tokenprune.profiling.run import run_profile
from hf_tokenprune.profiling.session import Session
from hf_tokenprune.viz.profile_plots import draw_profile


PRUNING = {"preset": "top_k", "layers": [1, 2], "keep_rate": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiled")
    tiny.save_text_model(folder)
    return folder


def profile(model: Path, output: Path, **changes: Any) -> Any:
    given = {
        "model_name_or_path": str(model),
        "output_dir": str(output),
        "pruning": json.dumps(PRUNING),
        "lengths": [30, 12, 21],
        "rounds": 3,
        "batch_rounds": 3,
        "batch_sizes": [1],
        "device": "cpu",
    }
    return run_profile(ProfileArguments(**given | changes), draw_profile)


UNITS = {"seconds", "bytes", "MACs", "FLOPs", "tokens", "ratio", "inputs/second"}
KINDS = {"quartiles", "least and most", "95 % interval", "one-sided 95 % bound"}


def check_figures(written: dict[str, Any], inputs: int) -> None:
    """Every number of a report says what it is, its unit, how many measurements it is of and what its spread is."""
    curve = [point[which] for point in written["curve"] for which in ("macs", "accuracy")]
    figures = [*written["measured"], *written["by_layer"], *written["by_batch_size"], *curve]
    for figure in figures:
        assert figure["what"] and figure["model"] and figure["unit"] in UNITS and figure["n"] and figure["of"], figure
        assert figure["n"] == 1 or figure["spread"]["kind"] in KINDS, figure
        assert figure["n"] == inputs or figure["of"] != "inputs" or "FLOPs" in figure["what"], figure
    found = {(figure["what"], figure["model"]): figure for figure in figures}
    macs, layers = found["mean MACs of an input", "pruned"], found["median time inside each layer", "pruned"]
    assert macs["spread"]["low"] < macs["value"] < macs["spread"]["high"]
    assert len(layers["value"]) == len(layers["spread"]["low"]) == tiny.LAYERS and layers["n"] > 1
    for name in ("baseline", "unpadded", "pruned"):
        growth = found["median growth of resident memory in the first batch", name]
        assert growth["n"] == 3 and growth["value"] < found["median peak resident memory of the process", name]["value"]
        ways = [found[f"mean FLOPs of an input by {way}", name]["value"] for way in ("formula", "counter", "profiler")]
        assert max(ways) <= 1.01 * min(ways)
    assert found["FLOPs of the first batch by counter", "baseline"]["n"] == 1
    assert found["median speed-up", "pruned over unpadded"]["spread"] | {"low": 0} == {
        "kind": "one-sided 95 % bound", "low": 0, "high": None,
    }  # fmt: skip
    for size in (1, 8):
        p50, p99 = (found[f"p{percent} of the time of a batch of {size}", "pruned"] for percent in (50, 99))
        assert p50["n"] == p99["n"] == 100 and p50["value"] < p99["value"]
        assert p99["spread"]["low"] <= p99["value"] <= p99["spread"]["high"]
    assert "p99 of the time of a batch of 8" in {figure["what"] for figure in written["measured"]}


def test_a_folder_with_everything(model, tmp_path):
    rows = [json.dumps({"text": "w20 " * (3 + i % 20), "label": "abc"[i % 3]}) + "\n" for i in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(rows))
    report = profile(
        model, tmp_path / "out", dataset_name=str(tmp_path / "data.jsonl"), max_inputs=10, batch_rounds=100
    )
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {
        *(f"profiling_{name}.txt" for name in ("baseline", "unpadded", "pruned")),
        *(f"traces/{name}/profile_0.json" for name in ("baseline", "unpadded", "pruned")),
        *(f"{name}.png" for name in ("time_per_layer", "tokens_per_layer", "memory", "latency_over_batch_size")),
        *("accuracy_over_macs.png", "report.md", "report.json"),
    }
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    check_figures(written, inputs=10)
    assert {"processor", "threads", "device", "dtype", "torch", "transformers"} <= set(written["where"])
    assert written["curve"][0]["macs"]["value"] > written["curve"][-1]["macs"]["value"]
    trace = json.loads((tmp_path / "out" / "traces" / "pruned" / "profile_0.json").read_text())
    named = {event["name"] for event in trace["traceEvents"] if "name" in event}
    assert {"forward", "layer 0", "layer 3", "tokenprune: layer 1"} <= named
    head, _, table = (tmp_path / "out" / "profiling_pruned.txt").read_text().partition("\n")
    assert str(model) in head and f"torch {torch.__version__}" in head and "aten::addmm" in table
    assert all(str(written["where"][name]) in head for name in ("processor", "threads", "device", "transformers"))
    if not torch.cuda.is_available():
        assert "No CUDA device: times and memory are of the CPU." in report.to_markdown()
    assert report.verdict.startswith("Not shown to be worth it: ") and report.verdict in report.to_markdown()
    assert "3 rounds are too few for the bounds of the speed-ups, which are 0 here: they take 5." in report.notes
    tokens = report.values("tokens that leave each layer")
    assert tokens["pruned"][2] < tokens["pruned"][1] < tokens["unpadded"][1]
    assert not list(tmp_path.glob(".out*"))


def stock_flops(batch: int, tokens: int, last: int) -> int:
    """Of the tiny models' layers, the last of which computes so many tokens: projections, products with the map,
    feed-forward."""
    width, inner = 32, 64
    queries = [tokens] * (tiny.LAYERS - 1) + [last]
    return 2 * batch * sum(2 * tokens * width**2 + 2 * q * (width**2 + tokens * width + width * inner) for q in queries)


@pytest.mark.parametrize("execution", tiny.EXECUTIONS[:2])
@pytest.mark.parametrize("case", tiny.HEADS[:1] + [case for case in tiny.BASES if case.id == "Dinov2Model"])
def test_three_ways_of_counting_agree(case, execution):
    native = tiny.build(case)
    inputs = tiny.text_inputs([30, 30]) if case.text else tiny.image_inputs(2)  # padding is arithmetic to the counters
    tokens = 30 if case.text else case.tokens
    for model in (native, prune(native, None), prune(native, {**PRUNING, "execution": execution})):
        counts = count_flops(model, inputs)
        assert counts.counter == pytest.approx(counts.formula, rel=0.01)
        assert counts.profiler == pytest.approx(counts.formula, rel=0.01)
        assert model.config._attn_implementation == "sdpa"
    assert count_flops(native, inputs).formula == stock_flops(2, tokens, tokens)
    assert count_flops(prune(native, None), inputs).formula == stock_flops(2, tokens, 1 if case.text else tokens)
    assert counts.formula < stock_flops(2, tokens, tokens)


def test_the_profilers_count_owes_the_counter_nothing(monkeypatch):
    native, inputs = tiny.build(tiny.HEADS[0].values[0]), tiny.text_inputs([30, 30])
    monkeypatch.setattr(operators.FlopCounterMode, "get_total_flops", lambda self: 0)
    monkeypatch.setattr(operators.FlopCounterMode, "get_flop_counts", lambda self: {})
    counts = count_flops(native, inputs)
    assert counts.counter == 0 and counts.profiler == stock_flops(2, 30, 30)


def test_the_stock_model_is_native_and_the_same():
    native = tiny.build(tiny.Case(ViTForImageClassification, tiny.VIT))
    ours = prune(native, PRUNING)
    stock = stock_model(ours)
    assert type(stock) is ViTForImageClassification and stock_model(native) is native
    inputs = tiny.image_inputs(2)
    with torch.no_grad():
        assert torch.equal(stock(**inputs).logits, native(**inputs).logits)


@pytest.mark.parametrize("case", tiny.HEADS)
@pytest.mark.parametrize("saved", [False, True])
def test_the_stock_model_has_the_adapters(case, saved):
    peft = pytest.importorskip("peft")
    ours, inputs = prune(tiny.build(case), PRUNING), tiny.inputs_for(case)
    targets = ["query", "q_proj", "dense", "fc1"]
    settings = {"modules_to_save": ["classifier"]} if saved and hasattr(ours, "classifier") else {}
    peft.get_peft_model(ours, peft.LoraConfig(target_modules=targets, init_lora_weights=False, **settings))
    ours.eval()
    stock = stock_model(ours)
    assert type(stock) is case.native and not stock.training
    assert not {id(each) for each in stock.parameters()} & {id(each) for each in ours.parameters()}
    assert any("lora" in name for name in stock.state_dict())
    with torch.no_grad():
        found, expected = stock(**inputs)[0], prune(ours, None).eval()(**inputs)[0]
    real = inputs["attention_mask"].bool() if found.dim() == 3 else slice(None)  # what padding gives is not compared
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


def test_a_stock_model_without_weights_of_its_own_is_refused():
    ours = prune(tiny.build(tiny.Case(ViTForImageClassification, tiny.VIT)), PRUNING)
    ours.classifier.register_parameter("bias", None)
    words = "must have all weights of ViTForImageClassification, and has no classifier.bias"
    with pytest.raises(ValueError, match=words):
        stock_model(ours)


def test_the_stock_model_of_a_pruned_one_costs_what_is_stock():
    """Its config still speaks of the pruning, and of a table that it has not."""
    native, inputs = tiny.build(tiny.HEADS[0].values[0]), tiny.text_inputs([30])
    stock = stock_model(pruned(native, METHODS["adaptive_prior"]))
    assert stock.config.pruning is not None
    assert count_flops(stock, inputs) == count_flops(native, inputs)


class FakeEvent:
    """The clock of a device on which every call takes 5 ms."""

    now = 0.0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self, stream: str) -> None:
        assert stream == "that of cuda:1"
        self.at = FakeEvent.now

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at


def test_the_interval_of_a_percentile_holds_it_and_narrows_with_rounds():
    few, many = (Timing(tuple(1 + i % 10 / 10 for i in range(n))) for n in (10, 1000))
    low, high = few.percentile_interval(50)
    assert low <= few.percentile(50) <= high
    closer = many.percentile_interval(50)
    assert closer[1] - closer[0] < high - low
    assert Timing((2.0,)).percentile_interval(99) == (2.0, 2.0)


def test_cuda_is_timed_by_its_own_events(monkeypatch):
    def call() -> None:
        FakeEvent.now += 5

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"that of {device}")
    assert time_interleaved({"a": call}, rounds=3, device="cuda:1")["a"].seconds == (0.005,) * 3
    assert waited == [torch.device("cuda:1")] * 6
    assert max(time_interleaved({"a": call}, rounds=3, device="cpu")["a"].seconds) < 0.005


def test_memory_is_what_was_held():
    def call() -> None:
        first = torch.ones(8 << 20)
        held = first, first.add(1)  # two tensors of 32 MiB
        time.sleep(0.1)  # until they are seen on a busy machine, too
        del first, held

    assert peak_memory(call) == pytest.approx(64 << 20, abs=1024)
    resident = peak_resident(call)
    assert 60 << 20 < resident.growth < 80 << 20 and resident.peak > resident.growth + (20 << 20)


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets every model run out of memory in batches of more than so many texts."""
    forward = BertEmbeddings.forward

    def shorten(most: int) -> None:
        def short(self: BertEmbeddings, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if input_ids.shape[0] > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")
            return forward(self, input_ids, *args, **kwargs)

        monkeypatch.setattr(BertEmbeddings, "forward", short)

    return shorten


def test_out_of_memory_halves_the_batch_and_leaves_larger_ones_out(model, tmp_path, short_of_memory):
    short_of_memory(2)
    default = ProfileArguments().batch_sizes
    report = profile(model, tmp_path / "out", batch_size=8, batch_sizes=default)
    assert report.subject["batch_size"] == 2 and list(report.by_batch_size) == [1, 2]
    written = (tmp_path / "out" / "report.md").read_text()
    assert "Out of memory in batches of 8: halved to 2." in written
    assert "Out of memory in batches of 4: latency over batch size is without 4 and 16." in written


def test_the_largest_of_the_default_batches_may_not_fit(model, tmp_path, short_of_memory):
    short_of_memory(8)
    defaults = ProfileArguments()
    report = profile(model, tmp_path / "out", batch_size=defaults.batch_size, batch_sizes=defaults.batch_sizes)
    assert report.subject["batch_size"] == 8 and list(report.by_batch_size) == [1, 4, 8]
    assert "Out of memory in batches of 16: latency over batch size is without 16." in report.notes


def test_no_picture_of_an_old_report_lies_beside_the_new_one(model, tmp_path):
    (tmp_path / "out").mkdir()
    for name in (*run.PICTURES, "mine.png"):
        (tmp_path / "out" / name).write_text("old")
    profile(model, tmp_path / "out", batch_size=2, batch_sizes=[])  # without data, so without accuracy
    pictures = {path.name: path for path in (tmp_path / "out").glob("*.png")}
    assert pictures.keys() == {*run.PICTURES, "mine.png"} - {"accuracy_over_macs.png"}
    assert [name for name, path in pictures.items() if path.read_bytes() == b"old"] == ["mine.png"]


def test_an_interrupted_profile_leaves_the_old_report(model, tmp_path, monkeypatch):
    old = {"report.json", "accuracy_over_macs.png"}
    (tmp_path / "out").mkdir()
    for name in old:
        (tmp_path / "out" / name).write_text("old")

    def interrupt(self: Session) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "latency", interrupt)
    with pytest.raises(KeyboardInterrupt):
        profile(model, tmp_path / "out")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == old
    assert {path.read_text() for path in (tmp_path / "out").iterdir()} == {"old"}


SEVERAL = """
import datetime, os, sys, time, torch
torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
sys.path.insert(0, {scripts!r})
import run_profile
from hf_tokenprune.profiling import run
load_subject, rank = run.load_subject, torch.distributed.get_rank()
def slowly(*given):
    time.sleep(4)  # longer than a barrier of the process group waits
    print("LOADED BY", rank, flush=True)
    return load_subject(*given)
run.load_subject = slowly
used = time.process_time()
run_profile.main()
with open({folder!r} + f"/seconds-{{rank}}", "w") as written:
    written.write(str(time.process_time() - used))
sys.stdout.flush()
os._exit(0)  # threads of gloo sometimes abort an interpreter that is shutting down
"""


def test_of_several_processes_one_measures_and_the_others_sleep(model, tmp_path):
    places = {"scripts": str(Path(__file__).parents[1] / "scripts"), "folder": str(tmp_path)}
    (tmp_path / "script.py").write_text(SEVERAL.format(**places))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    given = {
        "model_name_or_path": model,
        "output_dir": tmp_path / "out",
        "pruning": json.dumps(PRUNING),
        "batch_sizes": 2,
        "lengths": 12,
        "rounds": 3,
        "batch_rounds": 3,
        "device": "cpu",
    }
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    done = subprocess.run([*launch, str(tmp_path / "script.py"), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("orth it: ") == 1 and re.findall(r"LOADED BY (\d)", done.stdout) == ["0"]
    assert float((tmp_path / "seconds-1").read_text()) < 2, done.stdout + done.stderr
    written = (tmp_path / "out" / "report.md").read_text()
    assert "Measured by the first of 2 processes, while the others waited." in written
    assert not list(tmp_path.glob(".out*"))


MISTAKES = {
    "device": ({"device": "cuda"}, "torch finds no CUDA device here"),
    "sites": ({"pruning": '{"stages": [], "format_version": 1}'}, "no sites"),
    "length": ({"lengths": [4000]}, "lengths (4000) must be at most 64"),
    "batch": ({"batch_size": 0}, "batch_size (0) must be at least 1"),
    "dtype": ({"dtype": "int8"}, "dtype ('int8') must be one of float32"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(model, tmp_path, mistake):
    changes, words = MISTAKES[mistake]
    if mistake == "device" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError) as error:
        profile(model, tmp_path / "out", **changes)
    assert words in str(error.value) and not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("hf_tokenprune.profiling.run.Session", None)  # nobody comes so far
    with pytest.raises(FileExistsError):
        profile(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_shapes_without_weights_and_checkpoints_that_are_pruned(model, tmp_path):
    pruned = prune(tiny.build(tiny.Case(ViTForImageClassification, tiny.VIT)), PRUNING)
    pruned.save_pretrained(tmp_path / "pruned")
    report = profile(tmp_path / "pruned", tmp_path / "a", pruning=None, batch_size=2, batch_sizes=[])
    assert report.subject["pruning"] == pruned.config.pruning.to_dict()
    report = profile(
        model, tmp_path / "b", random_weights=True, config_overrides='{"num_hidden_layers": 6}', batch_size=2
    )
    assert len(report.values("time inside each layer")["baseline"]) == 6
    name = "BertForSequenceClassification of 6 layers, 32 wide, with random weights"
    assert report.subject["model"] == name and report.to_markdown().startswith(f"# {name}, as it is and pruned")
    assert (tmp_path / "b" / "profiling_baseline.txt").read_text().startswith(name)


def test_what_the_counters_count_beside_the_formula_is_said_in_words(model, tmp_path):
    execution = json.dumps(PRUNING | {"execution": "masked"})
    report = profile(model, tmp_path / "out", pruning=execution, batch_size=2, batch_sizes=[])
    notes = [note for note in report.notes if "FLOPs" in note]
    assert not any("FlopCounts" in note for note in notes)
    said = [re.sub(r"\d+ %", "N %", note) for note in notes]
    assert said == [
        "N % of the baseline model's FLOPs of the first batch by counter are padding.",
        "The three counts of the pruned model's FLOPs of an input lie up to N % apart.",
        "N % of the pruned model's FLOPs of the first batch by counter are padding, or pruned tokens that masked "
        "execution computes.",
    ]


class Meter:
    """Reads 3 J of a GPU and 1 J of a processor for every call."""

    def __init__(self, known: bool = True):
        self.known, self.calls = known, 0

    def begin_window(self, name: str) -> None:
        self.calls = 0

    def end_window(self, name: str) -> SimpleNamespace:
        gpu, cpu = ({0: 3.0 * self.calls}, {0: 1.0 * self.calls}) if self.known else ({}, None)
        return SimpleNamespace(gpu_energy=gpu, cpu_energy=cpu, dram_energy=None)

    def call(self) -> None:
        self.calls += 1


def test_energy_is_what_all_meters_read():
    meter = Meter()
    assert measure_energy(meter, {"a": meter.call, "b": meter.call}, 3, 0.01) == {"a": [4.0] * 3, "b": [4.0] * 3}
    silent = Meter(known=False)
    assert measure_energy(silent, {"a": silent.call}, 3, 0.01) == {}


def test_energy_without_zeus_or_without_meters_is_said(model, tmp_path, monkeypatch):
    with monkeypatch.context() as early:
        early.setitem(sys.modules, "zeus.monitor", None)
        early.setattr(run, "load_subject", lambda *_: pytest.fail("meters are opened before all else"))
        with pytest.raises(ImportError, match=r"hf_tokenprune\[energy\]"):
            profile(model, tmp_path / "out", energy=True)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(run, "open_meters", lambda: Meter(known=False))
    monkeypatch.setattr(energy, "WINDOW", 0.0)
    report = profile(model, tmp_path / "out", energy=True)
    assert "zeus finds no meter on this machine" in report.to_markdown()
    assert not [each for each in report.measured if "energy" in each.what]
