"""No graph is handed over that its target's own runtime computes wrongly."""

import importlib
import platform
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from int8_graphs import Sketch, images, residual, run
from test_openvino_reshapes import head, openvino_answer
from test_openvino_reshapes import images as head_images

import compress
from compress.errors import EngineError, QuantizationError
from compress.graph.model import GraphIndex
from compress.qdq import prepare
from compress.qdq.writer import write_qdq
from compress.quantize import calibrate, confirm, make_quant_plan, quantize_targets
from compress.quantize.remedies import MOST_ALONE, last_layers, most_asked, needed_in_float
from compress.quantize.sessions import sqnr_db
from compress.runtimes.onnxruntime import Onnxruntime
from compress.runtimes.tensorrt import Tensorrt
from compress.runtimes.tensorrt_rtx import TensorrtRtx


def two_layers():
    s = Sketch((3, 8, 8))
    s.head(s.relu(s.conv("input", "stem", 3, 8, 3)), 8)
    return s.model()


def quantized(model, tmp_path, target="onnxruntime", method="plain"):
    onnx.save(model, tmp_path / "float.onnx")
    out = tmp_path / "int8.onnx"
    batches = [images(model, 16)]
    return compress.quantize_onnx(
        tmp_path / "float.onnx", batches, out, target=target, method=method
    )


def test_what_openvino_computes_wrongly_is_left_in_float_and_said(tmp_path, monkeypatch):
    """The rewriting that avoids the defect is taken out: the runtime itself finds it."""
    import onnxruntime

    monkeypatch.setattr(importlib.import_module("compress.graph.preprocess"), "keep_batch", id)
    path = head(tmp_path / "head.onnx")
    plan = compress.quantize_onnx(
        path, head_images(), tmp_path / "int8.onnx", target="openvino", method="plain"
    )
    feed = head_images()[0]
    reference = onnxruntime.InferenceSession(str(path)).run(None, feed)
    assert sqnr_db(reference, openvino_answer(tmp_path / "int8.onnx", feed)) > 25
    (said,) = [note for note in plan.notes if "else, in openvino, y has" in note]
    assert said.startswith(("the last layers are left in float", "weights "))


def lying(monkeypatch, answer):
    monkeypatch.setattr(confirm.Confirmation, "_in_runtime", answer)


def test_a_runtime_that_cannot_be_made_to_agree_is_refused(tmp_path, monkeypatch):
    def wrong(self, written, feeds, names, runtime):
        return [
            [np.random.default_rng(0).normal(size=(1, 10)).astype(np.float32) for _ in names]
            for _ in feeds
        ]

    lying(monkeypatch, wrong)
    with pytest.raises(QuantizationError, match=r"computes the int8 graph wrongly: logits has -"):
        quantized(two_layers(), tmp_path)
    assert not (tmp_path / "int8.onnx").exists()


def test_a_graph_that_a_runtime_cannot_load_is_told_of_by_the_file(tmp_path, monkeypatch):
    def refusing(self, written, feeds, names, runtime):
        raise EngineError("no conversion of Loop", where="/tmp/scratch/model.onnx")

    lying(monkeypatch, refusing)
    with pytest.raises(QuantizationError, match="no conversion of Loop") as caught:
        quantized(two_layers(), tmp_path)
    message = str(caught.value)
    assert "float.onnx" in message and "scratch" not in message
    assert "leave target onnxruntime out" in message
    assert not (tmp_path / "int8.onnx").exists()


@pytest.mark.parametrize("wrong", [("openvino",), ("onnxruntime", "openvino")])
def test_a_refused_target_leaves_the_others_alone(wrong, tmp_path, monkeypatch):
    right = confirm.Confirmation._in_runtime

    def answer(self, written, feeds, names, runtime):
        found = right(self, written, feeds, names, runtime)
        return [[-a for a in each] for each in found] if runtime in wrong else found

    lying(monkeypatch, answer)
    model = two_layers()
    onnx.save(model, tmp_path / "float.onnx")
    outs = {name: tmp_path / f"{name}.onnx" for name in ("onnxruntime", "openvino")}
    given = (tmp_path / "float.onnx", [images(model, 16)], outs, "plain")
    refused = {}
    if len(wrong) == 2:
        with pytest.raises(QuantizationError, match=r"float\.onnx: openvino computes"):
            quantize_targets(*given, on_refusal=refused.setdefault)
    else:
        with pytest.raises(QuantizationError, match="openvino computes the int8 graph wrongly"):
            quantize_targets(*given)
        assert not outs["onnxruntime"].exists()
        plans = quantize_targets(*given, on_refusal=refused.setdefault)
        assert list(plans) == ["onnxruntime"] and outs["onnxruntime"].exists()
    assert list(refused) == [wrong[0]] and "float.onnx" in str(refused[wrong[0]])
    assert not outs["openvino"].exists()


@pytest.mark.parametrize("helps", [True, False])
def test_sizes_that_a_runtime_wants_fixed_are_asked_for(helps, tmp_path, monkeypatch):
    right = confirm.Confirmation._in_runtime

    def answer(self, written, feeds, names, runtime):
        found = right(self, written, feeds, names, runtime)
        side = written.graph.input[0].type.tensor_type.shape.dim[2]
        return found if helps and side.dim_value else [[-a for a in each] for each in found]

    lying(monkeypatch, answer)
    model = two_layers()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "side"
    onnx.save(model, tmp_path / "float.onnx")
    batch = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    with pytest.raises(QuantizationError, match="computes the int8 graph wrongly") as caught:
        compress.quantize_onnx(tmp_path / "float.onnx", [batch], tmp_path / "q", method="plain")
    assert ("--input-size 3,8,8" in str(caught.value)) == helps
    assert ("--exclude" in str(caught.value)) != helps


@pytest.mark.parametrize(
    ("kinds", "left"),
    [({"ConvTranspose"}, {"up"}), ({"ConvTranspose", "Gemm"}, {"up", "logits"})],
    ids=["transposed", "last layers too"],
)
def test_transposed_layers_that_a_runtime_computes_wrongly_are_left_in_float(
    kinds, left, tmp_path, monkeypatch
):
    """What OpenVINO does without VNNI, on any processor: every other layer keeps its int8."""
    right = confirm.Confirmation._in_runtime

    def wrong(self, written, *others):
        made_by = {name: node.op_type for node in written.graph.node for name in node.output}
        asked = [node for node in written.graph.node if node.op_type in kinds]
        is_int8 = any(made_by.get(node.input[1]) == "DequantizeLinear" for node in asked)
        found = right(self, written, *others)
        return [[-value for value in each] for each in found] if is_int8 else found

    lying(monkeypatch, wrong)
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "stem", 3, 8))
    x = s.relu(s.op("ConvTranspose", [x, s.floats("up_w", 8, 8, 2, 2)], "up", strides=[2, 2]))
    s.head(s.relu(s.conv(x, "body", 8, 8)), 8)
    plan = quantized(s.model(), tmp_path, "openvino")
    assert set(plan.float_nodes) == left
    (said,) = [note for note in plan.notes if "in openvino, logits has" in note]
    assert "transposed convolutions are left in float" in said


def test_a_layer_that_a_runtime_computes_wrongly_is_searched_for(tmp_path, monkeypatch):
    """None of the remedies for known faults has an effect on a layer in the middle."""
    right = confirm.Confirmation._in_runtime

    def wrong(self, written, *others):
        made_by = {name: node.op_type for node in written.graph.node for name in node.output}
        (asked,) = [node for node in written.graph.node if node.name == "body"]
        found = right(self, written, *others)
        is_int8 = made_by.get(asked.input[1]) == "DequantizeLinear"
        return [[-value for value in each] for each in found] if is_int8 else found

    lying(monkeypatch, wrong)
    s = Sketch((3, 8, 8), batch=1)
    x = "input"
    for name, channels in {"stem": 3, "first": 8, "body": 8, "last": 8}.items():
        x = s.relu(s.conv(x, name, channels, 8))
    s.head(x, 8)
    plan = quantized(s.model(), tmp_path, "openvino")
    assert set(plan.float_nodes) == {"body"}
    (said,) = [note for note in plan.notes if "else, in openvino, logits has" in note]
    assert said.startswith("'body' left in float")
    (given,) = onnx.load(tmp_path / "int8.onnx").graph.input
    assert given.type.tensor_type.shape.dim[0].dim_value == 1  # corrections free the batch


def test_a_little_noise_of_the_runtime_is_no_reason_for_a_coarser_remedy(tmp_path, monkeypatch):
    # Ten logits are asked for twice before they are said to be wrong
    found = iter([[confirm.NoisyOutput("logits", 45, db)] for db in (20, 20, 36)])
    monkeypatch.setattr(confirm.Confirmation, "losses", lambda *asked: next(found))
    plan = quantized(two_layers(), tmp_path)
    (said,) = [note for note in plan.notes if "else, in onnxruntime, logits has" in note]
    assert said.startswith("weights whose products overflow in 16 bits")
    assert said.endswith(
        "20.0 dB instead of 45.0 dB; and still logits has 36.0 dB instead of 45.0 dB"
    )


def test_noise_of_the_runtime_that_is_no_fault_is_told_all_the_same(tmp_path, monkeypatch):
    found = [confirm.NoisyOutput("logits", 59, 41)]
    monkeypatch.setattr(confirm.Confirmation, "losses", lambda *asked: found)
    plan = quantized(two_layers(), tmp_path)
    assert "in onnxruntime itself: logits has 41.0 dB instead of 59.0 dB" in plan.notes[-1]


@pytest.mark.parametrize("left", [[], [(59, 43)], [(59, 41.5)], [(59, 43), (59, 50)]])
def test_overflow_that_is_no_fault_yet_is_avoided_where_that_helps(left, tmp_path, monkeypatch):
    """Other images may overflow more: UltraFace lost 12 dB on these and 20 dB on others."""
    after = [confirm.NoisyOutput(f"logits{'!' * k}", *each) for k, each in enumerate(left)]
    found = iter([[confirm.NoisyOutput("logits", 59, 41)], after])
    monkeypatch.setattr(confirm.Confirmation, "losses", lambda *asked: next(found))
    plan = quantized(two_layers(), tmp_path)
    helps = left in ([], [(59, 43)])
    assert ("products overflow in 16 bits have longer steps: else" in plan.notes[-1]) == helps
    assert ("in onnxruntime itself: logits has" in plan.notes[-1]) != helps


def test_a_runtime_is_known_to_overflow_before_it_is_asked_for_a_network(monkeypatch):
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.exists():
        pytest.skip("which instructions there are is not known")
    assert not confirm.overflows("onnxruntime")  # its sessions are told not to
    if "openvino" in confirm._runtime_for("openvino")[:1]:
        assert confirm.overflows("openvino") == ("vnni" not in info.read_text())
    lying(monkeypatch, lambda *asked: pytest.fail("a GPU was asked"))
    monkeypatch.setattr(confirm, "_runtime_for", lambda target: ("tensorrt", {}))
    assert not confirm.overflows.__wrapped__("tensorrt")


def test_few_values_are_judged_over_all_images(tmp_path, monkeypatch):
    """An answer of ten scores: one image whose noise falls badly is no defect, all images are."""

    def noisy(amount):
        def answer(self, written, feeds, names, runtime):
            told = confirm.answers_each(self.prepared, feeds, names=names)
            moved = told[0][0] * (1 + amount[0])
            rest = [[each[0] * (1 + amount[1])] for each in told[1:]]
            return [[moved], *rest]

        return answer

    seen = []
    original = confirm.Confirmation.losses

    def recorded(self, written, runtime):
        seen.append([each for each in original(self, written, runtime) if each.is_lost])
        return []

    monkeypatch.setattr(confirm.Confirmation, "losses", recorded)
    for amount in ((0.016, 0.0), (0.1, 0.1)):
        lying(monkeypatch, noisy(amount))
        quantized(two_layers(), tmp_path)
    assert seen[0] == [] and len(seen[1]) == 1


@pytest.mark.parametrize(("outputs", "asked"), [(("logits",), [4, 16]), (("features",), [4, 4])])
def test_few_numbers_that_are_wrong_are_asked_for_on_more_images(
    outputs, asked, tmp_path, monkeypatch
):
    """Of four images with two scores each chance takes 4 dB, as of PP-OCR's classifier."""
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "stem", 3, 8))
    s.head(x, 8)
    s.op("Identity", [x], "features")
    seen = []

    def answer(self, written, feeds, names, runtime):
        seen.append(len({feed["input"].tobytes() for feed in feeds}))
        found = confirm.answers_each(written, feeds, names=names)
        return [[2 * value for value in each] for each in found] if len(seen) == 1 else found

    lying(monkeypatch, answer)
    plan = quantized(s.model(outputs), tmp_path)
    assert seen == asked
    assert any("onnxruntime, " in note for note in plan.notes) == (asked[1] == 4)


@pytest.mark.parametrize(("amounts", "lost"), [((0, 0, 0, 9), 0), ((4, 4, 4, 4), 1)])
def test_an_image_of_next_to_no_answer_is_no_defect(amounts, lost, monkeypatch):
    """A detector's scores for an image without objects: what they lose is nothing to the rest."""
    rng = np.random.default_rng(0)
    power = np.array([1.0, 1.0, 1.0, 1e-3])[:, None]
    want = rng.normal(size=(4, 100)) * power
    noise = rng.normal(size=(4, 100)) * power / 10
    real = noise * 10 ** (np.array(amounts)[:, None] / 20)
    sides = iter([[[row[None]] for row in each] for each in (want, want + noise)])
    monkeypatch.setattr(confirm, "answers_each", lambda *_, **__: next(sides))
    lying(monkeypatch, lambda *_: [[row[None]] for row in want + real])
    graph = two_layers()
    confirmation = confirm.Confirmation(graph, images(graph, 4), None)
    assert sum(each.is_lost for each in confirmation.losses(graph, "openvino")) == lost


def test_the_float_graph_answers_once_however_many_graphs_are_judged(monkeypatch):
    graph = prepare(residual())
    asked = []
    answer = confirm.answers_each

    def counted(model, feeds, **options):
        asked.append(model is graph)
        return answer(model, feeds, **options)

    monkeypatch.setattr(confirm, "answers_each", counted)
    confirmation = confirm.Confirmation(graph, images(graph, 4), None)
    written = write_qdq(graph, make_quant_plan(calibrate(graph, [images(graph)])))
    assert not [confirmation.losses(written, "onnxruntime") for _ in range(3)][-1]
    assert asked.count(True) == 1 and asked.count(False) == 3


def test_a_runtime_that_agrees_is_asked_once(tmp_path):
    asked = []
    original = confirm.Confirmation.losses

    def recorded(self, written, runtime):
        asked.append(original(self, written, runtime))
        return asked[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confirm.Confirmation, "losses", recorded)
        plan = quantized(two_layers(), tmp_path)
    assert asked == [[]]
    assert not plan.float_nodes


@pytest.mark.parametrize("method", ["plain", "bias-correction"])
def test_openvino_is_right_on_any_processor(method, tmp_path):
    """Without VNNI its kernels overflow on weights of 8 bits: 24 dB where arithmetic says 44."""
    model = two_layers()
    plan = quantized(model, tmp_path, "openvino", method=method)
    feed = images(model, 4)
    (found,) = openvino_answer(tmp_path / "int8.onnx", feed)
    assert sqnr_db(run(model, feed), [found]) > 35
    written = onnx.load(tmp_path / "int8.onnx")
    assert sqnr_db([found], run(written, feed, plain=True)) > 40
    assert compress.lint_onnx(tmp_path / "int8.onnx", target="openvino") == []
    said = any(note.startswith("weights ") for note in plan.notes)
    searched = method != "plain"  # scales of weights, whether or not they leave headroom
    assert bool(plan.weights) == (said or searched)


def test_a_target_without_its_hardware_is_said_not_to_be_judged(tmp_path, monkeypatch):
    monkeypatch.setattr("compress.runtimes.unavailable", lambda runtime: f"no {runtime} here")
    plan = quantized(two_layers(), tmp_path, "tensorrt")
    assert plan.notes[-1] == (
        "not judged in a runtime: tensorrt: no tensorrt here; tensorrt-rtx: no tensorrt-rtx here"
    )


@pytest.mark.parametrize("wrong", [False, True])
def test_a_target_of_engines_is_judged_in_an_engine_of_any_of_its_runtimes(
    tmp_path, monkeypatch, wrong
):
    """Each TensorRT has its GPU or not; here one of them seems to, and its engines are ONNX."""
    built = []

    def build(self, source, out, request):
        built.append(out.name)
        out.write_bytes(source.read_bytes())

    def opened(self, path):
        assert path.suffix == ".engine"
        session = Onnxruntime(optimization="none").open(path)
        return Wrong(session) if wrong else session

    monkeypatch.setattr(Tensorrt, "available", lambda self: "not installed")
    monkeypatch.setattr(TensorrtRtx, "available", lambda self: None)
    monkeypatch.setattr(TensorrtRtx, "build", build)
    monkeypatch.setattr(TensorrtRtx, "open", opened)
    if wrong:
        with pytest.raises(QuantizationError, match="tensorrt-rtx computes the int8 graph wrongly"):
            quantized(two_layers(), tmp_path, "tensorrt")
    else:
        plan = quantized(two_layers(), tmp_path, "tensorrt")
        assert not any("not judged in a runtime" in note for note in plan.notes)
        assert built == ["model.engine"]


class Wrong:
    """A session whose answers are nobody's."""

    def __init__(self, session):
        self.inputs, self.run_rightly, self.close = session.inputs, session.run, session.close

    def run(self, arrays):
        return [np.zeros_like(array) for array in self.run_rightly(arrays)]


def test_last_layers_are_those_that_no_other_layer_follows():
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "stem", 3, 8, 3))
    ends = [s.op("Sigmoid", [s.conv(x, f"end{i}", 8, 4, 1)], f"y{i}") for i in (0, 1)]
    s.conv(s.relu(s.conv(x, "middle", 8, 8, 3)), "end2", 8, 4, 1)
    model = prepare(s.model([*ends, "end2"]))
    names = {n.output[0]: n.name for n in model.graph.node}
    assert set(last_layers(GraphIndex(model))) == {names[t] for t in ("end0", "end1", "end2")}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_the_session_option_that_int8_needs_on_cpus_without_vnni_is_said(tmp_path, target):
    notes = quantized(two_layers(), tmp_path, target).notes
    line = "options.add_session_config_entry('session.x64quantprecision', '1')"
    assert any(line in note for note in notes) == (target == "onnxruntime")


LAYERS = [f"layer{k}" for k in range(24)]


@pytest.mark.parametrize("count", range(1, MOST_ALONE + 1))
@pytest.mark.parametrize("seed", range(20))
def test_exactly_the_faulty_layers_are_found_with_few_questions(count, seed):
    faulty = set(random.Random(seed).sample(LAYERS, count))
    asked = []

    def is_right(floating):
        asked.append(floating)
        return faulty.issubset(floating)

    assert set(needed_in_float(LAYERS, is_right)) == faulty
    assert len(asked) <= 1 + count * (len(LAYERS).bit_length() + 1) <= most_asked(LAYERS)


def test_of_many_faulty_layers_all_from_one_on_are_left():
    faulty = set(LAYERS[3:15:2])
    found = needed_in_float(LAYERS, lambda floating: faulty.issubset(floating))
    assert found == ["layer3", "layer5", "layer7", *LAYERS[9:]]


def test_layers_that_are_wrong_only_together_leave_one_in_float():
    def is_right(floating):
        return not {"layer4", "layer9"}.isdisjoint(floating)

    assert needed_in_float(LAYERS, is_right) == ["layer9"]


def test_nothing_is_found_where_float_is_wrong_too():
    assert needed_in_float(LAYERS, lambda _: False) is None
