"""Head and tail together are the whole: in numbers, in bytes, and through the command."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from compress import progress
from compress.cli.app import app
from compress.errors import CompressError, UsageError
from compress.export import export_onnx
from compress.graph import files
from compress.measure import Timing
from compress.models.cifar import resnet8, unet
from compress.pipeline.cutting import Cuttable
from compress.pipeline.split import split_onnx
from compress.quantize import quantize_onnx
from compress.runtimes import open_session

BRIEF = Timing(seconds=0.01, min_rounds=3, warmup_seconds=0.0, warmup_limit_seconds=0.01)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("resnet")
    return export_onnx(resnet8().eval(), torch.zeros(1, 3, 32, 32), folder / "x.onnx")


def composed(
    folder: Path,
    images: np.ndarray,
    *,
    outputs: list[str],
    parts: tuple[str, ...] = ("head", "tail"),
) -> list[np.ndarray]:
    """Answer with ONNX Runtime alone, by name and unfused: nothing of what is tested."""
    import onnxruntime

    feed: dict[str, np.ndarray] = {}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for part in parts:
        session = onnxruntime.InferenceSession(folder / f"{part}.onnx", options)
        given = {i.name: feed.get(i.name, images) for i in session.get_inputs()}
        names = [o.name for o in session.get_outputs()]
        feed |= dict(zip(names, session.run(names, given), strict=True))
    return [feed[name] for name in outputs]


def whole(path: Path, images: np.ndarray) -> list[np.ndarray]:
    with open_session(path) as session:
        return session.run(images)


def output_names(path: Path) -> list[str]:
    return [value.name for value in onnx.load(path).graph.output]


def test_every_cut_of_a_residual_network_composes_to_the_whole(
    resnet: Path, tmp_path: Path
) -> None:
    images = np.random.default_rng(1).normal(size=(3, 3, 32, 32)).astype(np.float32)
    expected = whole(resnet, images)
    tensors = [node.output[0] for node in onnx.load(resnet).graph.node[:-1]]
    several = 0
    for tensor in tensors[::5]:
        split = split_onnx(resnet, tmp_path, at=tensor, timing=BRIEF)
        found = composed(tmp_path, images, outputs=output_names(resnet))
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-4)
        several += len(split.cut.crossing) > 1
    assert several, "no cut went through a residual block"


def test_bytes_are_those_of_the_arrays_that_cross(resnet: Path, tmp_path: Path) -> None:
    tensor = onnx.load(resnet).graph.node[3].output[0]
    split = split_onnx(resnet, tmp_path, at=tensor, timing=BRIEF)
    with open_session(split.head) as head:
        arrays = head.run(np.zeros((1, 3, 32, 32), np.float32))
    assert sum(a.nbytes for a in arrays) == split.cut.bytes
    assert split.places[0].link_ms == pytest.approx(split.cut.bytes * 8 / 10e6 * 1000)


def test_no_node_is_in_both_parts_and_none_is_lost(resnet: Path, tmp_path: Path) -> None:
    model = onnx.load(resnet)
    split = split_onnx(resnet, tmp_path, at=model.graph.node[5].output[0], timing=BRIEF)
    parts = [{n.output[0] for n in onnx.load(f).graph.node} for f in (split.head, split.tail)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {node.output[0] for node in model.graph.node}
    weights = [{t.name for t in onnx.load(f).graph.initializer} for f in (split.head, split.tail)]
    assert all(len(each) < len(model.graph.initializer) for each in weights)


def test_a_skip_over_the_cut_crosses_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = export_onnx(unet(3, 4).eval(), torch.zeros(1, 3, 16, 16), tmp_path / "u.onnx")
    pools = [n.output[0] for n in onnx.load(path).graph.node if n.op_type == "MaxPool"]
    split = split_onnx(path, tmp_path, at=pools[-1], timing=BRIEF)
    assert len(split.cut.crossing) == 3  # both skips and the pooled feature
    images = np.random.default_rng(1).normal(size=(1, 3, 16, 16)).astype(np.float32)
    found = composed(tmp_path, images, outputs=output_names(path))
    np.testing.assert_allclose(found[0], whole(path, images)[0], rtol=1e-4, atol=1e-5)


class Several(nn.Module):
    """Two outputs, one early, and an input that is used again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        early = self.first(x).relu()
        return early.mean((2, 3)), self.second(early) + x


def test_early_outputs_and_inputs_used_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = export_onnx(Several().eval(), torch.zeros(1, 3, 8, 8), tmp_path / "s.onnx")
    relu = next(n.output[0] for n in onnx.load(path).graph.node if n.op_type == "Relu")
    split = split_onnx(path, tmp_path, at=relu, timing=BRIEF)
    assert set(split.cut.crossing) == {relu, onnx.load(path).graph.input[0].name}
    assert split.cut.bytes == 4 * (4 * 64 + 3 * 64)
    images = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)
    found = composed(tmp_path, images, outputs=output_names(path))
    for ours, theirs in zip(found, whole(path, images), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_branch_that_reads_outer_tensors_goes_where_they_are(tmp_path: Path) -> None:
    branch = [
        helper.make_graph(
            [helper.make_node(op, ["a", "b"], ["r"])],
            op,
            [],
            [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
        )
        for op in ("Add", "Mul")
    ]
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Neg", ["b"], ["c"]),
        helper.make_node("ReduceSum", ["c"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["is"]),
        helper.make_node("If", ["is"], ["y"], then_branch=branch[0], else_branch=branch[1]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xy"]
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [zero])
    path = tmp_path / "if.onnx"
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    split = split_onnx(path, tmp_path, at="c", timing=BRIEF)
    assert set(split.cut.crossing) == {"a", "b", "c"}
    x = np.array([[1.0, -2.0, 3.0, 0.5]], np.float32)
    np.testing.assert_array_equal(composed(tmp_path, x, outputs=["y"])[0], whole(path, x)[0])


def test_int8_at_the_cut_sends_a_quarter_and_is_close(resnet: Path, tmp_path: Path) -> None:
    relu = [n.output[0] for n in onnx.load(resnet).graph.node if n.op_type == "Relu"][-2]
    plain = split_onnx(resnet, tmp_path / "a", at=relu, timing=BRIEF)
    small = split_onnx(resnet, tmp_path / "b", at=relu, int8=True, timing=BRIEF)
    sent = small.places[0].bytes
    assert sent == plain.cut.bytes // 4 + 5 * len(plain.cut.crossing)
    with open_session(small.head) as head:
        arrays = head.run(np.ones((1, 3, 32, 32), np.float32))
    assert sum(a.nbytes for a in arrays) == sent
    assert plain.difference < 1e-5 < small.difference < 0.05


def test_a_file_in_int8_can_be_split(resnet: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    batches = [generator.normal(size=(8, 3, 32, 32)).astype(np.float32)]
    out = tmp_path / "int8.onnx"
    quantize_onnx(resnet, batches, out, target="onnxruntime", method="plain")
    kinds = [n.output[0] for n in onnx.load(out).graph.node if n.op_type == "QuantizeLinear"]
    split = split_onnx(out, tmp_path, at=kinds[len(kinds) // 2], timing=BRIEF)
    images = generator.normal(size=(1, 3, 32, 32)).astype(np.float32)
    found = composed(tmp_path, images, outputs=output_names(out))
    # Unfused both round alike; fused, a runtime may round otherwise beside the cut.
    expected = composed(tmp_path, images, outputs=output_names(out), parts=("int8",))
    np.testing.assert_array_equal(found[0], expected[0])
    assert split.difference < 0.1


def test_auto_takes_the_fastest_of_a_front(resnet: Path, tmp_path: Path) -> None:
    fast = split_onnx(resnet, tmp_path / "a", link_mbps=1e6, edge_slowdown=1e4, timing=BRIEF)
    slow = split_onnx(resnet, tmp_path / "b", link_mbps=0.01, timing=BRIEF)
    for split in (fast, slow):
        cuts = split.places[:-2]
        sizes = [place.bytes for place in cuts]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
        work = [place.head_macs_pct for place in cuts]
        assert work == sorted(work)
        assert split.cut.tensor == min(cuts, key=lambda place: place.total_ms).name
    # A link without cost and a slow edge want little on the edge; a slow link the fewest bytes.
    assert fast.cut.head_macs_pct < 5
    assert slow.cut.bytes == min(place.bytes for place in slow.places[:-2])
    assert "<svg" in (tmp_path / "b" / "split.svg").read_text()
    told = json.loads((tmp_path / "b" / "split.json").read_text())
    assert told["tensor"] == slow.cut.tensor
    everything = {place["name"]: place for place in told["places"]}
    assert everything["(all on the server)"]["bytes"] == 4 * 3 * 32 * 32


def test_the_command_prints_the_cut(
    resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensor = onnx.load(resnet).graph.node[3].output[0]
    out = tmp_path / "out"
    words = ["split", str(resnet), "--at", tensor, "--out", str(out), "--json", str(tmp_path / "j")]
    app(words, standalone_mode=False)
    assert tensor in capsys.readouterr().out.replace("\n", "")
    assert json.loads((tmp_path / "j").read_text())["tensor"] == tensor


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"at": "convolution"}, "is no tensor of it"),
        ({"at": "OUTPUT"}, "nothing is left for the tail"),
        ({"at": "INPUT"}, "is an input or a constant"),
        ({"link_mbps": 0.0}, "--link-mbps 0"),
        ({"edge_slowdown": math.nan}, "--edge-slowdown nan"),
    ],
)
def test_what_cannot_be_split_is_said(
    resnet: Path, tmp_path: Path, options: dict, said: str
) -> None:
    graph = onnx.load(resnet).graph
    names = {"OUTPUT": graph.output[0].name, "INPUT": graph.input[0].name}
    given = {key: names.get(value, value) for key, value in options.items()}
    with pytest.raises(CompressError, match=said):
        split_onnx(resnet, tmp_path, timing=BRIEF, **given)


def test_what_crosses_beside_the_tensor_is_said(
    resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = onnx.load(resnet).graph.node
    inside = next(n for n in nodes[3:] if n.op_type == "Relu").output[0]
    with progress.show_progress():
        split = split_onnx(resnet, tmp_path, at=inside, timing=BRIEF)
    others = set(split.cut.crossing) - {inside}
    said = capsys.readouterr().err
    assert others and f"{inside} alone does not separate the graph: " in said
    assert all(name in said for name in others)


FOREIGN = Path(os.environ.get("COMPRESS_DATA", "../shared/data")) / "onnx"
FREE = {"mtcnn_pnet": "3,48,64", "yunet_n_dyn": "3,96,128", "ppocr2_cls": "3,48,192"}


@pytest.mark.skipif(not FOREIGN.is_dir(), reason=f"no networks of others at {FOREIGN}")
@pytest.mark.parametrize(
    "name", ["mnist", "mtcnn_pnet", "mtcnn_onet", "yunet_n_dyn", "litemono_dec", "ppocr2_cls"]
)
def test_networks_of_others_answer_in_two_parts_as_in_one(name: str, tmp_path: Path) -> None:
    source = FOREIGN / f"{name}.onnx"
    if name in FREE:
        with pytest.raises(CompressError, match="--input-size C,H,W"):
            split_onnx(source, tmp_path, timing=BRIEF)
        sizes = tuple(map(int, FREE[name].split(",")))
        files.copy(source, tmp_path / "fixed.onnx", facts={}, sizes=sizes)
        source = tmp_path / "fixed.onnx"
    graph = Cuttable(onnx.load(source))
    tensors = graph.candidates()
    for tensor in tensors[:: max(1, len(tensors) // 5)]:
        with contextlib.suppress(UsageError):  # nothing is left behind it
            split = split_onnx(source, tmp_path, at=tensor, timing=BRIEF)
            assert split.difference <= 1e-4  # of random values, on the runtime
