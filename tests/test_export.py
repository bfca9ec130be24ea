"""`torch.compile` and ONNX: one graph for all shapes, the same results."""

import copy

import pytest
import torch
import transformers
from methods import METHODS, pruned
from packaging import version
from tiny import BERT, HEADS, VIT, Case, build, image_inputs, main_output, text_inputs
from transformers import BertForSequenceClassification, ViTForImageClassification


# Each kind of head with a fixed rate or with thresholds: what a site does is the same in all of them.
OF_EACH_KIND = {
    "BertForSequenceClassification": ("top_k", "adaptive"),
    "BertForTokenClassification": ("adaptive",),
    "ViTForImageClassification": ("adaptive",),
    "Dinov2WithRegistersForImageClassification": ("top_k",),
}
OTHERS = (
    "adaptive_prior",
    "evit",
    "tome",
    "diffrate",
    "dynamicvit",
    "power_bert",
    "ltp",
    "adaptive_fuse",
    "value_merge",
    "top_p",
)
LENGTHS = ([17, 5, 30], [20], [9, 13, 7, 30, 2], [40, 3], [12, 12])


def _shapes(case: Case) -> list[dict[str, torch.Tensor]]:
    if case.text:
        return [text_inputs(lengths, seed=seed, padding=seed % 2) for seed, lengths in enumerate(LENGTHS)]
    # Not three first: torch takes sizes that are equal at first sight for one, and there are three channels.
    return [image_inputs(batch, seed=batch) for batch in (4, 2, 1, 5)]


def _pairs(elsewhere: tuple[str, ...]) -> list:
    """Each kind of head, and other methods with a text or an image classifier."""
    heads = [param.values[0] for param in HEADS if param.id in OF_EACH_KIND and not param.marks[0].args[0]]
    pairs = [(case, method) for case in heads for method in OF_EACH_KIND[str(case)]]
    text, image = Case(BertForSequenceClassification, BERT), Case(ViTForImageClassification, VIT)
    return pairs + [(image if method in ("evit", "tome", "diffrate") else text, method) for method in elsewhere]


@pytest.mark.parametrize("case, method", _pairs(elsewhere=OTHERS), ids=str)
def test_compiles_to_one_graph_for_all_shapes(case, method):
    model = pruned(build(case), METHODS[method])
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=count)
    with torch.no_grad():
        for inputs in _shapes(case):
            torch.testing.assert_close(
                main_output(compiled(**inputs)), main_output(model(**inputs)), atol=1e-5, rtol=1e-5
            )
    assert len(graphs) <= 2  # torch gives a batch of one a graph of its own


def test_layers_compiled_one_by_one_are_refused_where_they_prune():
    model, inputs = pruned(build(Case(BertForSequenceClassification, BERT)), METHODS["top_k"]), text_inputs([9, 5])
    for layer in model.base_model.token_layers():
        layer.compile(backend="eager")
    with torch.no_grad():
        with pytest.raises(ValueError, match="must not be compiled one by one: compile the model"):
            model(**inputs)
        model.set_pruning(None)
        assert model(**inputs).logits.isfinite().all()


def test_compiles_with_the_default_backend():
    """The stock encoder's own path through inductor, with a site in it."""
    shallow = copy.deepcopy(BERT)
    shallow.num_hidden_layers = 2  # a layer with a site, and one that computes the class token alone
    model = pruned(build(Case(BertForSequenceClassification, shallow)), {"preset": "top_k", "layers": [0]})
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for lengths in LENGTHS[:2]:
            inputs = text_inputs(lengths)
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.20"), reason="the exporters' interface changed"
)
@pytest.mark.parametrize("case, method", _pairs(elsewhere=("adaptive_prior", "evit", "tome", "dynamicvit")), ids=str)
def test_onnx_runtime_agrees_at_other_shapes(case, method, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = pruned(build(case), METHODS[method])
    sample = text_inputs([17, 30], padding=2) if case.text else image_inputs(4)
    OnnxExporter().export(model, sample, config=OnnxConfig(dynamic=True)).save_pretrained(tmp_path)
    session = onnxruntime.InferenceSession(next(tmp_path.glob("*.onnx")), providers=["CPUExecutionProvider"])
    for inputs in _shapes(case):
        with torch.no_grad():
            expected = model(**inputs).logits
        (logits,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=1e-4)
