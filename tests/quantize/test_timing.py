"""Layers in float for speed: which are tried, and when they are kept."""

from __future__ import annotations

import pytest
from int8_graphs import GRAPHS, Sketch, images
from test_methods import bench_of

from compress.graph.model import GraphIndex, attribute
from compress.qdq import write_qdq
from compress.quantize import search, timing
from compress.quantize.api import plan_by
from compress.quantize.sessions import CannotRunError, session_of
from compress.quantize.timing import faster_in_float


def int8_layers(model):
    """The convolutions of a written graph whose weight is int8."""
    graph = GraphIndex(model)
    return [n for n in graph.nodes if n.op_type == "Conv" and n.input[1] in graph.producer]


def has_few(node):
    return attribute(node, "group", 1) > 1


def timed(monkeypatch, time_of):
    """Let the time of a written graph, in ms, be what ``time_of`` says; return what was timed."""
    seen = []

    def times(models, feed):
        assert all(len(array) == 1 for array in feed.values())
        seen.append([len(int8_layers(model)) for model in models])
        return [time_of(int8_layers(model)) / 1e3 for model in models]

    monkeypatch.setattr(timing, "session_of", lambda model, threads: model)
    monkeypatch.setattr(timing, "_times_s", times)
    return seen


def test_layers_that_are_faster_in_float_are_left_there(monkeypatch):
    bench = bench_of(GRAPHS["depthwise"](), "onnxruntime")
    names = {n.name for n in bench.prepared.graph.node if n.op_type == "Conv" and has_few(n)}
    timed(monkeypatch, lambda int8: 10 - len(int8) + 3 * sum(map(has_few, int8)))
    plan, ratio = faster_in_float(bench, bench.ranges(), search._shares(bench))
    assert plan.float_nodes.keys() == names and 0 < ratio < 1
    assert set(plan.float_nodes.values()) == {"ONNX Runtime computes it faster in float"}


def test_layers_are_faster_twice_or_stay(monkeypatch):
    bench = bench_of(GRAPHS["depthwise"](), "onnxruntime")
    turns = iter([1.0, *[1.0, 0.5, 1.0, 1.1] * 20])
    timed(monkeypatch, lambda int8: next(turns))
    plan = bench.ranges()
    assert faster_in_float(bench, plan, search._shares(bench)) == (plan, 1.0)


def test_not_all_that_is_faster_is_left_in_float(monkeypatch):
    bench = bench_of(GRAPHS["depthwise"](), "onnxruntime")
    shares = search._shares(bench)
    timed(monkeypatch, lambda int8: 1.0 + len(int8))
    plan, _ = faster_in_float(bench, bench.ranges(), shares)
    outputs = {node.name: node.output[0] for node in bench.prepared.graph.node}
    assert plan.float_nodes
    assert sum(shares[outputs[name]] for name in plan.float_nodes) <= timing._LARGEST_PCT


def test_layers_that_come_to_float_with_others_count(monkeypatch):
    """Between depthwise layers in float all others stay there: nothing of a YuNet was left."""
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "stem", 3, 64, 3))
    for k in range(3):
        x = s.conv(s.conv(x, f"narrow{k}", 64, 64, 1), f"depthwise{k}", 64, 64, 3, group=64)
        x = s.relu(x)
    s.head(s.relu(x), 64)
    bench = bench_of(s.model(), "onnxruntime")
    timed(monkeypatch, lambda int8: 1.0 + len(int8))
    plan, _ = faster_in_float(bench, bench.ranges(), search._shares(bench))
    assert list(plan.float_nodes) == ["stem"]


def test_what_onnxruntime_cannot_run_is_passed_over(monkeypatch):
    bench = bench_of(GRAPHS["depthwise"](), "onnxruntime")
    names = {n.name for n in bench.prepared.graph.node if n.op_type == "Conv" and has_few(n)}

    def time_of(int8):
        if len(int8) != whole and any(map(has_few, int8)):
            raise CannotRunError("no kernel for this mixture")
        return 1.0 + len(int8)

    plan = bench.ranges()
    whole = len(int8_layers(write_qdq(bench.prepared, plan)))
    timed(monkeypatch, time_of)
    found, _ = faster_in_float(bench, plan, search._shares(bench))
    assert names <= found.float_nodes.keys()


def test_networks_that_take_no_time_are_not_timed(monkeypatch):
    bench = bench_of(GRAPHS["depthwise"](), "onnxruntime")
    seen = timed(monkeypatch, lambda int8: 0.1 + 0.001 * len(int8))
    plan = bench.ranges()
    assert faster_in_float(bench, plan, search._shares(bench)) == (plan, 1.0)
    assert len(seen) == 1


@pytest.mark.parametrize(("target", "kept"), [("onnxruntime", 1), ("openvino", 0)])
def test_auto_leaves_them_in_float_where_onnxruntime_is_the_target(target, kept, monkeypatch):
    bench = bench_of(GRAPHS["residual"](), target)
    first = next(n.name for n in bench.prepared.graph.node if n.op_type == "Conv")

    def faster(bench, plan, shares_pct):
        assert sum(shares_pct.values()) == pytest.approx(100)
        return plan.keep_float([first], "it is faster"), 0.7

    monkeypatch.setattr(search, "faster_in_float", faster)
    plan = plan_by("auto", bench)
    assert (plan.float_nodes.get(first) == "it is faster") == bool(kept)
    told = [note for note in plan.notes if "slows down (1) in float, 0.70 of the time" in note]
    assert len(told) == kept


def test_the_likeliest_are_tried_first():
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "pixels", 3, 8, 3))
    x = s.relu(s.conv(x, "depthwise", 8, 8, 3, group=8))
    x = s.relu(s.conv(x, "narrow", 8, 32, 1))
    s.head(s.relu(s.conv(x, "wide", 32, 8, 3)), 8)
    bench = bench_of(s.model(), "onnxruntime")
    tried = timing._candidates(GraphIndex(bench.prepared), bench.ranges())
    assert tried[0] == ["pixels"] and tried[1] == ["depthwise"]
    assert tried[2] == ["depthwise", "narrow"] and tried[3] == ["pixels", "depthwise", "narrow"]
    assert tried[-1] == tried[3]  # 288 products are many


def test_times_are_those_of_runs_in_turn():
    model = GRAPHS["residual"]()
    feed = {name: array[:1] for name, array in images(model, 1).items()}
    found = timing._times_s([session_of(model, threads=1) for _ in range(2)], feed)
    assert len(found) == 2 and all(0 < each < 1 for each in found)
