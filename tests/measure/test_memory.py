"""Memory: static numbers against arithmetic, the fresh process against what it must hold."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.errors import EngineError
from compress.measure import METHODS, memory, probe
from compress.measure.memory import activations_mib, weights_mib

MIB = 2**20


def chain(channels: int = 16, side: int = 64, layers: int = 3, batch: Any = "batch") -> Any:
    """A chain of 1x1 convolutions and a sum with its own start."""
    names = ["input", *(f"t{i}" for i in range(layers))]
    nodes = [
        helper.make_node("Conv", [a, f"w{i}"], [b])
        for i, (a, b) in enumerate(itertools.pairwise(names))
    ]
    nodes.append(helper.make_node("Add", [names[-1], names[1]], ["output"]))
    shape = [batch, channels, side, side]
    weight = np.ones((channels, channels, 1, 1), np.float32) / channels
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight, f"w{i}") for i in range(layers)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    return model


@pytest.mark.parametrize(("batch", "given"), [("batch", 1), ("batch", 4), (4, 4)])
def test_activations_are_the_tensors_alive_together(batch: Any, given: int) -> None:
    """While t2 is made, t0 waits for the sum and t1 is read: three tensors; the input is gone."""
    one = given * 16 * 64 * 64 * 4
    assert activations_mib(chain(batch=batch), given) == 3 * one / MIB


def test_activations_of_one_layer_are_its_two_ends() -> None:
    model = chain(layers=1)
    assert activations_mib(model) == 2 * 16 * 64 * 64 * 4 / MIB  # the sum reads one tensor twice


def test_activations_are_not_known_where_a_shape_is_not() -> None:
    model = chain()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    assert activations_mib(model) is None


def test_weights_are_stored_bytes_also_of_four_bits() -> None:
    model = chain()
    assert weights_mib(model) == 3 * 16 * 16 * 4 / MIB
    model.graph.initializer.append(helper.make_tensor("q", TensorProto.INT4, [8, 2], [1] * 16))
    assert weights_mib(model) == (3 * 16 * 16 * 4 + 8) / MIB


def test_a_fresh_process_holds_at_least_its_weights_and_activations(tmp_path: Path) -> None:
    small, large = tmp_path / "small.onnx", tmp_path / "large.onnx"
    onnx.save(chain(4, 8), small)
    onnx.save(chain(1024, 64), large)  # 12 MiB of weights, tensors of 16 MiB
    little = memory(small, "onnxruntime", calls=2, threads=1)
    much = memory(large, "onnxruntime", calls=2, threads=1)
    assert much.weights_mib == 12
    assert much.activations_mib == 48
    assert much.peak_memory_mib > much.weights_mib + 32
    assert little.peak_memory_mib < 10
    assert much.peak_rss_mib > much.peak_memory_mib
    assert much.file_mib == large.stat().st_size / MIB
    assert much.load_ms > 0
    assert much.first_call_ms > 0


def test_json_leaves_out_what_was_not_measured_and_says_why(tmp_path: Path) -> None:
    model = chain(4, 8)
    del model.graph.node[-1]
    model.graph.node.append(helper.make_node("Identity", ["t2"], ["output"]))
    onnx.save(model, tmp_path / "m.onnx")
    told = memory(tmp_path / "m.onnx", calls=1).to_json()
    json.dumps(told, allow_nan=False)
    if "peak_device_mib" not in told:
        assert told["skipped"]["peak_device_mib"] == "it used no GPU that PyTorch sees"
    assert {key for key in told if key.endswith(("_mib", "_ms"))} <= set(METHODS)


def test_what_the_process_finds_wrong_is_raised_here(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(chain().SerializeToString()[:200])
    with pytest.raises(EngineError, match=r"m\.onnx"):
        memory(tmp_path / "m.onnx")


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    onnx.save(chain(), tmp_path / "m.onnx")
    with pytest.raises(EngineError, match=r"m\.onnx: did not load and run within 0\.01 s"):
        memory(tmp_path / "m.onnx", timeout_seconds=0.01)


@pytest.mark.parametrize(
    ("returncode", "stderr", "message"),
    [
        (-9, "", r"killed by signal 9.*memory ran out"),
        (1, "Traceback\nImportError: no lib", r"failed: ImportError: no lib"),
        (0, "", r"failed: no message"),
    ],
)
def test_a_process_that_dies_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str, message: str
) -> None:
    import subprocess

    ended = subprocess.CompletedProcess([], returncode, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    onnx.save(chain(), tmp_path / "m.onnx")
    with pytest.raises(EngineError, match=message):
        memory(tmp_path / "m.onnx")


def test_free_image_size_needs_given_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = chain(4, 8)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(model, tmp_path / "m.onnx")
    request = {
        "path": str(tmp_path / "m.onnx"),
        "runtime": "onnxruntime",
        "batch": 2,
        "shapes": None,
        "calls": 1,
        "options": {},
    }

    def ask(**changes: Any) -> dict[str, Any]:
        monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(request | changes)))
        probe.main()
        return json.loads(capsys.readouterr().out)

    assert "shape of input 'input' is not known" in ask()["error"]
    assert ask(shapes=[[2, 4, 8, 8]])["peak_rss_mib"] > 0


def test_the_process_imports_no_torch_unless_its_runtime_needs_it() -> None:
    import subprocess
    import sys

    code = "import sys, compress.measure.probe, compress.runtimes; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
