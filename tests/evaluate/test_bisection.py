"""The first tensor that differs, where one was made to differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import saved
from onnx import TensorProto, helper, numpy_helper

from compress.errors import EngineError, UsageError
from compress.evaluate.bisection import bisect, part_for, precision_of

LAYERS = 6


def chain(broken: int | None = None, error: float = 0.3, prefix: str = "t") -> onnx.ModelProto:
    """Six convolutions with ReLU and a sum; the weights of one of them may be off."""
    generator = np.random.default_rng(0)
    nodes, weights, before = [], [], "input"
    for i in range(LAYERS):
        weight = generator.normal(size=(8, 8, 1, 1)).astype(np.float32) / 3
        if i == broken:
            weight += error * np.random.default_rng(9).normal(size=weight.shape).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(helper.make_node("Conv", [before, f"w{i}"], [f"{prefix}{i}"], name=f"conv{i}"))
        nodes.append(helper.make_node("Relu", [f"{prefix}{i}"], [f"{prefix}{i}r"]))
        before = f"{prefix}{i}r"
    nodes.append(helper.make_node("Add", [before, f"{prefix}0r"], [f"{prefix}out"]))
    shape = ["batch", 8, 6, 6]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"{prefix}out", TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    return model


@pytest.fixture
def images() -> list[tuple[np.ndarray, ...]]:
    generator = np.random.default_rng(1)
    return [(generator.normal(size=(b, 8, 6, 6)).astype(np.float32),) for b in (2, 1)]


@pytest.mark.parametrize("broken", range(LAYERS))
@pytest.mark.parametrize("memory_mib", [1e-6, 0.01, 256])
def test_the_first_tensor_that_differs_is_found_in_any_memory(
    tmp_path: Path, images: Any, broken: int, memory_mib: float
) -> None:
    old, new = saved(tmp_path, old=chain(), new=chain(broken))
    found = bisect(old, new, images, memory_mib=memory_mib)
    assert found.first is not None
    assert (found.first.name, found.first.op) == (f"t{broken}", "Conv")
    assert [tensor.name for tensor in found.tensors] == [
        name for i in range(LAYERS) for name in (f"t{i}", f"t{i}r")
    ] + ["tout"]
    before = found.tensors[: 2 * broken]
    assert all(tensor.drift.max_abs_diff == 0 for tensor in before)


def test_integers_of_a_runtimes_own_operators_are_not_compared(tmp_path: Path, images: Any) -> None:
    """As ONNX Runtime's quantizer writes 16 bits: inference does not know what these Q make."""
    model = chain()
    numbers = [np.float32(1e-3), np.uint16(2**15)]
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(value), name)
        for value, name in zip(numbers, ("scale", "zero"), strict=True)
    )
    pair = [
        helper.make_node(op, [given, "scale", "zero"], [made], domain="com.microsoft")
        for op, given, made in (
            ("QuantizeLinear", "input", "codes"),
            ("DequantizeLinear", "codes", "real"),
        )
    ]
    model.graph.node[0].input[0] = "real"
    nodes = [*pair, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    old, new = saved(tmp_path, old=model, new=model)
    found = bisect(old, new, images)
    assert found.first is None
    assert [tensor.name for tensor in found.tensors][:2] == ["real", "t0"]


def test_equal_graphs_do_not_part(tmp_path: Path, images: Any) -> None:
    old, new = saved(tmp_path, old=chain(), new=chain())
    found = bisect(old, new, images)
    assert found.first is None
    assert found.steepest is None
    json.dumps(found.to_json(), allow_nan=False)


def test_the_steepest_fall_is_told_from_the_first(tmp_path: Path, images: Any) -> None:
    reference = chain()
    candidate = chain(1, error=1e-4)
    worse = numpy_helper.to_array(chain(4, error=0.3).graph.initializer[4])
    candidate.graph.initializer[4].CopyFrom(numpy_helper.from_array(worse, "w4"))
    found = bisect(*saved(tmp_path, old=reference, new=candidate), images, threshold_db=75)
    assert found.first is not None
    assert found.steepest is not None
    assert (found.first.name, found.steepest.name) == ("t1", "t4")
    assert found.steepest.drop_db > 20


def test_held_tensors_stay_within_the_limit(tmp_path: Path, images: Any, monkeypatch: Any) -> None:
    from compress.evaluate import bisection

    portions: list[list[str]] = []
    original = bisection._compare_portion

    def watched(graphs: Any, names: list[str], *rest: Any) -> Any:
        portions.append(names)
        return original(graphs, names, *rest)

    monkeypatch.setattr(bisection, "_compare_portion", watched)
    tensor_mib = 2 * 8 * 36 * 4 / 2**20
    bisect(*saved(tmp_path, old=chain(), new=chain(2)), images, memory_mib=3.5 * tensor_mib)
    assert [len(names) for names in portions] == [3, 3, 3, 3, 1]


def test_cut_computes_the_tensors_asked_for_and_nothing_more(tmp_path: Path) -> None:
    part = part_for(chain(), ["t2", "t0r"])
    onnx.checker.check_model(part)
    assert [node.name for node in part.graph.node if node.op_type == "Conv"] == [
        "conv0",
        "conv1",
        "conv2",
    ]
    assert [tensor.name for tensor in part.graph.initializer] == ["w0", "w1", "w2"]
    assert [value.name for value in part.graph.output] == ["t2", "t0r"]


def test_precision_is_read_from_the_graph() -> None:
    assert precision_of(chain()) == "fp32"
    half = chain()
    half.graph.initializer[0].data_type = TensorProto.FLOAT16
    assert precision_of(half) == "fp16"
    half.graph.node.append(helper.make_node("QuantizeLinear", ["tout", "s"], ["q"]))
    assert precision_of(half) == "int8"


def test_what_cannot_be_compared_is_explained(tmp_path: Path, images: Any) -> None:
    old, new, other = saved(tmp_path, old=chain(), new=chain(1), other=chain(prefix="u"))
    with pytest.raises(UsageError, match="nothing to compare on"):
        bisect(old, new, [])
    with pytest.raises(EngineError, match=r"old\.onnx and .*other\.onnx: .*no tensor of the same"):
        bisect(old, other, images)
    wider = chain()
    wider.graph.node[0].attribute.append(helper.make_attribute("pads", [1, 1, 1, 1]))
    (padded,) = saved(tmp_path, padded=wider)
    with pytest.raises(EngineError, match=r"output 't0': the reference has shape \(2, 8, 6, 6\)"):
        bisect(old, padded, images)
