"""Networks with a state whose batch is its second dimension, as LSTMs have it."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import compress
from compress.errors import QuantizationError
from compress.graph.model import GraphIndex
from compress.quantize.notes import float_parts
from compress.quantize.sessions import sqnr_db

WIDTH, SAMPLES, IMAGES = 16, 64, 24


def node(kind, inputs, outputs, **attributes):
    return helper.make_node(kind, inputs, outputs, name=outputs[0], **attributes)


def speech(batch, *, turned=False):
    """Return two convolutions and an LSTM, (2, batch, width) its state; (batch, 2, ...) turned."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.normal(size=(16, 1, 8)) / 3,
        "w2": rng.normal(size=(WIDTH, 16, 3)) / 7,
        "w": rng.normal(size=(1, 4 * WIDTH, WIDTH)) / 4,
        "r": rng.normal(size=(1, 4 * WIDTH, WIDTH)) / 4,
        "b": np.zeros((1, 8 * WIDTH)),
        "w3": rng.normal(size=(1, WIDTH, 1)),
    }
    constants = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()]
    numbers = {"zero": 0, "one": 1, "first": [0], "second": [1], "third": [2]}
    constants += [numpy_helper.from_array(np.array(v, np.int64), n) for n, v in numbers.items()]
    inner, outer = ("state_in", "state_out") if turned else ("state", "next")
    nodes = [
        node("Unsqueeze", ["input", "second"], ["x"]),
        node("Conv", ["x", "w1"], ["c1"], strides=[4]),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "w2"], ["c2"], strides=[2]),
        node("Relu", ["c2"], ["r2"]),
        node("Transpose", ["r2"], ["seq"], perm=[2, 0, 1]),
        node("Gather", [inner, "zero"], ["h"]),
        node("Gather", [inner, "one"], ["c"]),
        node("Unsqueeze", ["h", "first"], ["h0"]),
        node("Unsqueeze", ["c", "first"], ["c0"]),
        node("LSTM", ["seq", "w", "r", "b", "", "h0", "c0"], ["y", "hn", "cn"], hidden_size=WIDTH),
        node("Concat", ["hn", "cn"], [outer], axis=0),
        node("Squeeze", ["hn", "first"], ["hs"]),
        node("Unsqueeze", ["hs", "third"], ["ht"]),
        node("Conv", ["ht", "w3"], ["logit"]),
        node("Sigmoid", ["logit"], ["probability"]),
    ]
    if turned:
        nodes.insert(0, node("Transpose", ["state"], [inner], perm=[1, 0, 2]))
        nodes.append(node("Transpose", [outer], ["next"], perm=[1, 0, 2]))
    state = [batch, 2, WIDTH] if turned else [2, batch, WIDTH]
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "speech",
        [
            helper.make_tensor_value_info("input", kind, [batch, SAMPLES]),
            helper.make_tensor_value_info("state", kind, state),
        ],
        [
            helper.make_tensor_value_info("probability", kind, [batch, 1, 1]),
            helper.make_tensor_value_info("next", kind, state),
        ],
        constants,
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def sounds(count=IMAGES, *, turned=False):
    rng = np.random.default_rng(1)
    samples = rng.normal(size=(count, SAMPLES)).astype(np.float32)
    states = rng.normal(size=(count, 2, WIDTH)).astype(np.float32)
    return {"input": samples, "state": states if turned else states.transpose(1, 0, 2)}


def quantized(folder, batch, batches, *, turned=False, **options):
    path, out = folder / f"{turned}.onnx", folder / f"{turned}.int8.onnx"
    onnx.save(speech(batch, turned=turned), str(path))
    return path, out, compress.quantize_onnx(path, batches, out, **options)


@pytest.mark.parametrize(
    ("batch", "target"), [("batch", "onnxruntime"), (None, "tensorrt"), (1, "openvino")]
)
def test_a_state_is_as_one_that_begins_with_the_batch(batch, target, tmp_path):
    """The oracle is the same network with its state turned inside, for which nothing is special."""
    pytest.importorskip("openvino" if target == "openvino" else "onnxruntime")
    plans, answers = [], []
    for turned in (False, True):
        every = sounds(turned=turned)
        rows = [
            {
                n: a[i : i + 1] if turned or n == "input" else a[:, i : i + 1]
                for n, a in every.items()
            }
            for i in range(IMAGES)
        ]
        path, out, plan = quantized(tmp_path, batch, rows, turned=turned, target=target)
        plans.append(plan)
        assert compress.lint_onnx(out, target=target) == []
        assert onnx.load(out).graph.input[1] == onnx.load(path).graph.input[1]
        with compress.open_session(out) as session:
            answers.append([session.run(row["input"], row["state"]) for row in rows])
    one, other = plans
    assert one.weights == other.weights
    assert one.biases == other.biases
    assert one.trials == other.trials
    assert all(one.activations[name] == other.activations[name] for name in one.activations)
    assert any("LSTM" in note and "float" in note for note in one.notes)
    assert not any("batch first" in note for note in (*one.notes, *one.trials))
    for first, second in zip(*answers, strict=True):
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1].transpose(1, 0, 2))


def test_a_stream_of_whole_batches_gives_the_same_graph(tmp_path):
    every = sounds()
    quantized(tmp_path, "batch", [every])
    alone = (tmp_path / "False.int8.onnx").read_bytes()
    half = [
        {"input": every["input"][p], "state": every["state"][:, p]}
        for p in (slice(12), slice(12, 24))
    ]
    quantized(tmp_path, "batch", half)
    assert (tmp_path / "False.int8.onnx").read_bytes() == alone


def test_a_state_without_the_batch_is_refused_in_a_sentence(tmp_path):
    rows = [{"input": sounds()["input"][:1], "state": np.zeros(2, np.float32)}]
    with pytest.raises(QuantizationError, match=r"'state'.*shape \(2,\).*batch in dimension 1"):
        quantized(tmp_path, "batch", rows)
    assert not (tmp_path / "False.int8.onnx").exists()


def test_a_state_that_holds_no_rows_is_one_value_for_all(tmp_path):
    """Rows are times there, so that the state is that of one sound, whatever their number."""
    rng = np.random.default_rng(0)
    shapes = {"w0": (8, 8), "w": (1, 32, 8), "r": (1, 32, 8), "w1": (8, 4)}
    constants = [
        numpy_helper.from_array((rng.normal(size=s) / 3).astype(np.float32), n)
        for n, s in shapes.items()
    ]
    constants.append(numpy_helper.from_array(np.array([1], np.int64), "second"))
    nodes = [
        node("Gemm", ["input", "w0"], ["x"]),
        node("Unsqueeze", ["x", "second"], ["seq"]),
        node("LSTM", ["seq", "w", "r", "", "", "h", "h"], ["each", "hn"], hidden_size=8),
        node("Squeeze", ["each", "second"], ["rows"]),
        node("Squeeze", ["rows", "second"], ["told"]),
        node("Gemm", ["told", "w1"], ["y"]),
    ]
    values = {"input": ["time", 8], "h": [1, 1, 8], "y": ["time", 4], "hn": [1, 1, 8]}
    ends = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in values.items()}
    graph = helper.make_graph(
        nodes, "times", [ends["input"], ends["h"]], [ends["y"], ends["hn"]], constants
    )
    opsets = [helper.make_opsetid("", 17)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    path, out = tmp_path / "times.onnx", tmp_path / "int8.onnx"
    onnx.save(made, str(path))
    batch = {
        "input": rng.normal(size=(IMAGES, 8)).astype(np.float32),
        "h": rng.normal(size=(1, 1, 8)).astype(np.float32),
    }
    compress.quantize_onnx(path, [batch], out)
    with compress.open_session(path) as fp32, compress.open_session(out) as int8:
        for want, got in zip(fp32.run(*batch.values()), int8.run(*batch.values()), strict=True):
            assert sqnr_db([want], [got]) > 20
    other = {**batch, "h": batch["h"] + 1}
    with pytest.raises(QuantizationError, match="'h' is no image and differs"):
        compress.quantize_onnx(path, [batch, other], out)


def test_what_lies_in_a_branch_is_said_to_stay_in_float():
    empty = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    inside = helper.make_graph([node("LSTM", ["x", "w", "r"], ["y"])], "then", [], [empty])
    choice = helper.make_node("If", ["c"], ["z"], "choice", then_branch=inside, else_branch=inside)
    flag = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    graph = helper.make_graph([choice], "g", [flag], [])
    notes = float_parts(GraphIndex(helper.make_model(graph)), "onnxruntime")
    assert notes == ["choice (If) stays in float, LSTM inside"]
