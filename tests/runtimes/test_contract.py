"""Every runtime keeps the same contract; a new file in the folder is tested at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from graphs import expected, network, one_node, weights
from onnx import TensorProto, helper
from torch import Tensor, nn

from compress import plugins
from compress.artifact import read_json
from compress.errors import CompressError, EngineError, UnknownNameError, UsageError
from compress.packages import is_installed
from compress.runtimes import Session, build_engine, build_record, open_session, unavailable

RUNTIMES = plugins.names("runtimes")
BUILDERS = [name for name in RUNTIMES if name != "pytorch"]


class Twin(nn.Module):
    """The network of ``graphs.network`` as a module."""

    def __init__(self) -> None:
        super().__init__()
        for name, array in weights().items():
            self.register_buffer(name, torch.from_numpy(array))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(torch.nn.functional.conv2d(x, self.w1, self.b1, padding=1))
        x = torch.relu(torch.nn.functional.conv2d(x, self.w2, self.b2, padding=1) + x)
        return x.mean((2, 3)) @ self.wf.T


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)


def opened(runtime: str, folder: Path) -> Session:
    """Return a session of the small network, or skip with the runtime's own reason."""
    reason = unavailable(runtime)
    if reason:
        pytest.skip(reason)
    if runtime == "pytorch":
        return open_session(Twin(), "pytorch", threads=1)
    source = network(folder / "small.onnx")
    if runtime.startswith("tensorrt"):
        source = build_engine(source, folder / "small.engine", runtime=runtime)
    return open_session(source, runtime, threads=1)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_answers_equal_torch(runtime: str, tmp_path: Path, images: np.ndarray) -> None:
    with opened(runtime, tmp_path) as session:
        assert isinstance(session, Session)
        for batch in (images, images[:1]):
            (answer,) = session.run(batch)
            assert answer.dtype == np.float32
            np.testing.assert_allclose(answer, expected(batch), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_answers_are_the_callers_to_keep(runtime: str, tmp_path: Path, images: np.ndarray) -> None:
    with opened(runtime, tmp_path) as session:
        (first,) = session.run(images)
        kept = first.copy()
        session.run(images * 2)
        np.testing.assert_array_equal(first, kept)
        first[:] = 0  # writable


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_strided_views_are_taken(runtime: str, tmp_path: Path, images: np.ndarray) -> None:
    flipped = images[:, :, ::-1, ::-1]
    with opened(runtime, tmp_path) as session:
        (answer,) = session.run(flipped)
    np.testing.assert_allclose(answer, expected(flipped.copy()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_closing_twice_is_fine_and_running_after_is_not(
    runtime: str, tmp_path: Path, images: np.ndarray
) -> None:
    session = opened(runtime, tmp_path)
    session.close()
    session.close()
    with pytest.raises(EngineError, match="session is closed"):
        session.run(images)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        pytest.param((), "0 arrays given. Expected one each for input", id="too few"),
        pytest.param((np.zeros((0, 3, 8, 8), np.float32),), "a batch of 0", id="empty batch"),
        pytest.param(([1.0],), "a list. Expected a numpy array", id="no array"),
        pytest.param((np.zeros((), np.float32),), "without a batch dimension", id="scalar"),
    ],
)
def test_what_is_no_batch_is_refused(
    runtime: str, tmp_path: Path, arrays: tuple, message: str
) -> None:
    with opened(runtime, tmp_path) as session, pytest.raises(EngineError, match=message):
        session.run(*arrays)


@pytest.mark.parametrize("runtime", BUILDERS)
@pytest.mark.parametrize(
    ("array", "message"),
    [
        pytest.param(
            np.zeros((1, 3, 8, 8)),
            r"input 'input': an array of float64. Expected float32. Pass array.astype",
            id="dtype",
        ),
        pytest.param(
            np.zeros((1, 1, 8, 8), np.float32),
            r"an array of shape \(1, 1, 8, 8\). Expected shape \(batch, 3, 8, 8\)",
            id="channels",
        ),
        pytest.param(np.zeros((3, 8, 8), np.float32), "an array of shape", id="rank"),
    ],
)
def test_what_the_network_would_misread_is_refused(
    runtime: str, tmp_path: Path, array: np.ndarray, message: str
) -> None:
    with opened(runtime, tmp_path) as session, pytest.raises(EngineError, match=message):
        session.run(array)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_fixed_batch_is_kept(runtime: str, tmp_path: Path, images: np.ndarray) -> None:
    source = network(tmp_path / "small.onnx")
    with open_session(source, runtime, batch=3) as session:
        assert session.inputs[0].shape == (3, 3, 8, 8)
        np.testing.assert_allclose(session.run(images)[0], expected(images), rtol=1e-4, atol=1e-5)
        with pytest.raises(EngineError, match=r"Expected shape \(3, 3, 8, 8\)"):
            session.run(images[:1])


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_built_engine_answers_alike_and_has_a_record(
    runtime: str, tmp_path: Path, images: np.ndarray
) -> None:
    out = tmp_path / f"built{plugins.plugin_class('runtimes', runtime).extension}"
    assert build_engine(network(tmp_path / "small.onnx"), out, runtime=runtime, batch=2) == out
    record = build_record(out)
    assert record["runtime"] == runtime
    assert record["batch"] == [2, 2, 2]
    assert record["bytes"] == out.stat().st_size
    assert record["inputs"][0]["shape"] == ["batch", 3, 8, 8]
    with open_session(out, runtime, threads=1) as session:
        np.testing.assert_allclose(session.run(images)[0], expected(images), rtol=1e-4, atol=1e-5)


def skip_without(runtime: str) -> None:
    """Skip where no engine can be built: TensorRT needs a GPU for it, TensorRT-RTX its package."""
    reason = unavailable(runtime)
    if reason and (runtime == "tensorrt" or not is_installed(runtime.replace("-", "_"))):
        pytest.skip(reason)


@pytest.mark.parametrize("runtime", BUILDERS)
@pytest.mark.parametrize("domain", ["", "my.operators"], ids=["unknown", "custom domain"])
def test_an_unknown_operator_is_named(runtime: str, tmp_path: Path, domain: str) -> None:
    skip_without(runtime)
    source = one_node(tmp_path / "x.onnx", "Curious", domain=domain)
    with pytest.raises(EngineError, match=r"no operator .*Curious") as caught:
        build_engine(source, tmp_path / "x.xml", runtime=runtime)
    assert "Replace the layer" in str(caught.value)
    assert "strange" in str(caught.value) or (domain and runtime == "onnxruntime")
    assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"]


@pytest.mark.parametrize("runtime", BUILDERS)
def test_a_truncated_file_is_refused_by_build_and_open(runtime: str, tmp_path: Path) -> None:
    whole = network(tmp_path / "whole.onnx").read_bytes()
    cut = tmp_path / "cut.onnx"
    for end in (0, 40, len(whole) // 2, len(whole) - 3):
        cut.write_bytes(whole[:end])
        with pytest.raises(EngineError, match=r"cut.onnx: (is no|holds no|its weight)"):
            build_engine(cut, tmp_path / "x.xml", runtime=runtime)
        with pytest.raises(EngineError, match=r"cut.onnx: (is no|holds no|its weight)"):
            open_session(cut, runtime)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.onnx", "whole.onnx"]


@pytest.mark.parametrize("runtime", BUILDERS)
def test_a_missing_file_is_named(runtime: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"nothing.onnx: no such file"):
        open_session(tmp_path / "nothing.onnx", runtime)
    with pytest.raises(EngineError, match=r"nothing.onnx: no such file"):
        build_engine(tmp_path / "nothing.onnx", tmp_path / "x.xml", runtime=runtime)


@pytest.mark.parametrize("runtime", BUILDERS)
def test_int8_of_a_float_graph_is_refused(runtime: str, tmp_path: Path) -> None:
    skip_without(runtime)
    with pytest.raises(EngineError, match="holds no Q/DQ nodes"):
        build_engine(
            network(tmp_path / "x.onnx"), tmp_path / "x.xml", runtime=runtime, precision="int8"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"batch": (4, 1, 8)}, "MIN,OPT,MAX with 1 <= MIN", id="order"),
        pytest.param({"batch": 0}, "MIN,OPT,MAX with 1 <= MIN", id="zero"),
        pytest.param({"precision": "int4"}, "no such precision 'int4'", id="precision"),
        pytest.param({"speed": 3}, "has no option 'speed'", id="option"),
        pytest.param({"runtime": "pytorch"}, "builds no engines", id="pytorch"),
        pytest.param({"runtime": "openvino"}, "--out that ends in .xml", id="openvino"),
    ],
)
def test_wishes_that_cannot_be_right_are_refused(
    tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build_engine(network(tmp_path / "x.onnx"), tmp_path / "y.engine", **options)


def test_a_name_of_the_ort_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Expected an --out that ends in \.onnx"):
        build_engine(network(tmp_path / "x.onnx"), tmp_path / "y.ort")
    assert not (tmp_path / "y.ort").exists()


@pytest.mark.parametrize(
    ("runtime", "options", "error", "message"),
    [
        pytest.param("onyxruntime", {}, UnknownNameError, "Did you mean 'onnxruntime'", id="name"),
        pytest.param("onnxruntime", {"threads": 0}, UsageError, "threads is 0", id="threads"),
        pytest.param("onnxruntime", {"device": "tpu"}, UsageError, "no such device", id="device"),
        pytest.param(
            "onnxruntime", {"optimization": "max"}, UsageError, "no such optimization", id="level"
        ),
        pytest.param("openvino", {"device": "npu"}, EngineError, "finds no device", id="npu"),
        pytest.param(
            "openvino",
            {"inference_precision": "f8"},
            UsageError,
            "auto, bf16, f16, f32",
            id="precision",
        ),
        pytest.param("pytorch", {}, EngineError, "is not a stage folder", id="folder"),
        pytest.param("pytorch", {"dtype": "int8"}, UsageError, "no such dtype", id="dtype"),
        pytest.param("pytorch", {"device": "tpu"}, UsageError, "no such device", id="torch device"),
        pytest.param("tensorrt-rtx", {}, EngineError, "is no TensorRT engine", id="onnx as engine"),
        pytest.param(
            "tensorrt", {"optimization_level": 9}, UsageError, "Expected 0 to 5", id="effort"
        ),
    ],
)
def test_opening_what_cannot_be_right_is_refused(
    tmp_path: Path, runtime: str, options: dict, error: type[CompressError], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_session(network(tmp_path / "x.onnx"), runtime, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("runtime", "options", "message"),
    [
        ("onnxruntime", {"device": "cuda"}, "no CUDAExecutionProvider"),
        ("pytorch", {"device": "cuda"}, "no GPU that PyTorch can use"),
        ("pytorch", {"cuda_graph": True}, "a CUDA graph needs a GPU"),
    ],
)
def test_a_gpu_that_is_not_there_is_an_error_never_a_fallback(
    tmp_path: Path, runtime: str, options: dict, message: str
) -> None:
    source = Twin() if runtime == "pytorch" else network(tmp_path / "x.onnx")
    with pytest.raises(EngineError, match=message):
        open_session(source, runtime, **options)


def test_pytorch_compiled_and_threads(images: np.ndarray) -> None:
    before = torch.get_num_threads()
    with open_session(Twin(), "pytorch", threads=before + 1) as session:
        np.testing.assert_allclose(session.run(images)[0], expected(images), rtol=1e-4, atol=1e-5)
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_pytorch_compiled_answers_alike(images: np.ndarray) -> None:
    with open_session(Twin(), "pytorch", compile=True, device="cpu") as session:
        np.testing.assert_allclose(session.run(images)[0], expected(images), rtol=1e-4, atol=1e-5)


def test_pytorch_reports_what_the_network_says(images: np.ndarray) -> None:
    with open_session(Twin(), "pytorch") as session, pytest.raises(EngineError, match="PyTorch: "):
        session.run(images[:, :2])


@pytest.mark.parametrize(
    ("runtime", "module"),
    [("openvino", "openvino"), ("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")],
)
def test_an_absent_package_is_an_error_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, module: str
) -> None:
    import compress.packages
    import compress.runtimes._trt
    import compress.runtimes.openvino

    def absent(name: str) -> bool:
        return name != module and is_installed(name)

    for where in (
        compress.packages,
        compress.runtimes._trt,
        compress.runtimes.openvino,
    ):
        monkeypatch.setattr(where, "is_installed", absent)
    with pytest.raises(CompressError, match=rf"not installed.*compress-cnn\[{runtime}\]"):
        build_engine(network(tmp_path / "x.onnx"), tmp_path / "x.xml", runtime=runtime)
    assert f"compress-cnn[{runtime}]" in str(unavailable(runtime))


def test_importing_runtimes_imports_none_of_them() -> None:
    code = (
        "import sys, compress.runtimes, compress.export; from compress import plugins; "
        "[plugins.plugin_class('runtimes', name) for name in plugins.names('runtimes')]; "
        "print([m for m in ('onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx', 'torchvision') "
        "if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_ports_are_called_as_the_file_calls_them(runtime: str, tmp_path: Path) -> None:
    """Beside a Cast without effect OpenVINO knows a port by the names of both its sides."""
    cast, relu = ("Cast", ["x"], ["a"]), ("Relu", ["a"], ["b"])
    nodes = [helper.make_node(*each) for each in (cast, relu, ("Cast", ["b"], ["y"]))]
    for node in (nodes[0], nodes[2]):
        node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "casts", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "casts.onnx")
    with open_session(tmp_path / "casts.onnx", runtime) as session:
        assert [spec.name for spec in (*session.inputs, *session.outputs)] == ["x", "y"]


def test_openvino_opens_no_connection(tmp_path: Path) -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('connects')\n"
        "socket.socket.connect = refuse; socket.create_connection = refuse\n"
        "import numpy as np\n"
        "from compress.runtimes import open_session\n"
        f"with open_session({str(network(tmp_path / 'x.onnx'))!r}, 'openvino') as s:\n"
        "    print(s.run(np.zeros((1, 3, 8, 8), np.float32))[0].shape)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "(1, 5)"


def test_float32_stays_float32_in_openvino(tmp_path: Path, images: np.ndarray) -> None:
    source = network(tmp_path / "x.onnx")
    with open_session(source, "openvino") as exact:
        error = np.abs(exact.run(images)[0] - expected(images)).max()
    assert error < 1e-5


@pytest.mark.parametrize(
    ("runtime", "tolerance"), [("onnxruntime", 0.02), ("openvino", 0.02), ("tensorrt-rtx", None)]
)
def test_fp16_is_in_the_graph(
    runtime: str, tolerance: float | None, tmp_path: Path, images: np.ndarray
) -> None:
    skip_without(runtime)
    out = tmp_path / f"half{plugins.plugin_class('runtimes', runtime).extension}"
    build_engine(network(tmp_path / "x.onnx"), out, runtime=runtime, precision="fp16")
    assert build_record(out)["precision"] == "fp16"
    if tolerance is None:
        layers = read_json(tmp_path / "half.engine.layers.json")["Layers"]
        kinds = {t["Datatype"] for each in layers for t in each["Inputs"] + each["Outputs"]}
        assert "Half" in kinds
        assert build_record(out)["warnings"] == []
        return
    with open_session(out, runtime, threads=1) as session:
        answer = session.run(images)[0]
    truth = expected(images)
    assert 0 < np.abs(answer - truth).max() <= tolerance * np.abs(truth).max()


def test_pytorch_opens_a_stage_folder(tmp_path: Path) -> None:
    from compress.models import load_model, save_model

    reference = "compress.models.cifar:resnet8"
    model = load_model(reference, num_classes=4)
    save_model(model, tmp_path / "stage", reference=reference, num_classes=4)
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    with open_session(tmp_path / "stage", "pytorch") as session:
        (answer,) = session.run(images)
    with torch.inference_mode():
        truth = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(answer, truth, rtol=1e-4, atol=1e-5)
    with pytest.raises(EngineError, match="is a stage folder, for pytorch, and"):
        open_session(tmp_path / "stage", "onnxruntime")
