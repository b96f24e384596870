"""Nodes come behind what they read, whatever order a file has."""

from __future__ import annotations

import numpy as np
import onnx
from graphs import network
from int8_graphs import run
from onnx import helper

import compress
from compress.graph import files


def test_a_file_in_another_order_is_read_and_quantized(tmp_path):
    """As converters to half precision leave it: ONNX Runtime takes it, ONNX's checker does not."""
    path = network(tmp_path / "net.onnx")
    plain = files.load(path)
    moved = onnx.load(str(path))
    nodes = list(moved.graph.node)[::-1]
    del moved.graph.node[:]
    moved.graph.node.extend(nodes)
    onnx.save(moved, str(path))
    assert [n.name for n in files.load(path).graph.node] == [n.name for n in plain.graph.node]
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(8, 3, 8, 8)).astype(np.float32) for _ in range(2)]
    compress.quantize_onnx(path, batches, tmp_path / "int8.onnx", method="plain")
    feed = {"input": batches[0]}
    wanted, found = (run(files.load(p), feed)[0] for p in (path, tmp_path / "int8.onnx"))
    assert np.abs(wanted - found).max() < 0.1 * np.abs(wanted).max()


def test_branches_are_sorted_and_wait_for_what_they_read_outside(tmp_path):
    value = helper.make_tensor_value_info
    inner = [
        helper.make_node("Relu", ["negated"], ["end"]),
        helper.make_node("Neg", ["made"], ["negated"]),
    ]
    ends = [value("end", 1, None)]
    branches = {
        key: helper.make_graph(inner, key, [], ends) for key in ("then_branch", "else_branch")
    }
    nodes = [
        helper.make_node("If", ["which"], ["output"], **branches),
        helper.make_node("Exp", ["input"], ["made"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [value("input", 1, [2]), value("which", 9, [])], [value("output", 1, [2])]
    )
    onnx.save(helper.make_model(graph), str(tmp_path / "net.onnx"))
    model = files.load(tmp_path / "net.onnx")
    assert [node.op_type for node in model.graph.node] == ["Exp", "If"]
    branch = model.graph.node[1].attribute[0].g
    assert [node.op_type for node in branch.node] == ["Neg", "Relu"]


def test_nodes_that_need_each_other_stay_and_are_refused_by_name_of_the_file(tmp_path):
    path = network(tmp_path / "net.onnx")
    model = onnx.load(str(path))
    model.graph.node[0].input[0] = "r2"
    onnx.save(model, str(path))
    before = [node.name for node in model.graph.node]
    assert [node.name for node in files.load(path).graph.node] == before
