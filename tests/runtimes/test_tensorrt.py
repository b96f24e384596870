"""TensorRT engines: built where there is no GPU, refused where they do not belong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphs import network, quantized, save
from onnx import TensorProto, helper

from compress.errors import CompressError, EngineError, UsageError
from compress.packages import is_installed
from compress.runtimes import (
    _trt,
    _trt_build,
    build_engine,
    build_record,
    open_session,
)
from compress.runtimes._session import BuildRequest, Session, TensorSpec
from compress.runtimes._trt import TENSORRT, EngineHeader, Log
from compress.runtimes._trt_build import Build, BuildSettings
from compress.runtimes._trt_session import TrtSession, check_fits

pytestmark = pytest.mark.skipif(
    not is_installed("tensorrt_rtx"), reason="tensorrt-rtx is not installed"
)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    source = network(folder / "small.onnx")
    return build_engine(source, folder / "small.engine", runtime="tensorrt-rtx", batch=(1, 2, 4))


def copied(engine: Path, folder: Path, content: bytes | None = None, **record: Any) -> Path:
    """Return a copy of an engine and its record, changed."""
    copy = folder / "copy.engine"
    copy.write_bytes(engine.read_bytes() if content is None else content)
    facts = build_record(engine) | record
    copy.with_name("copy.engine.json").write_text(json.dumps(facts))
    return copy


def test_engine_is_built_without_a_gpu_and_told_about(engine: Path) -> None:
    record = build_record(engine)
    assert record["warnings"] == []
    assert record["batch"] == [1, 2, 4]
    assert record["built_for"] == ["SM80+"]
    assert record["weights_bytes"] >= 8 * 27 * 4 + 8 * 72 * 4  # the two convolutions in fp32
    assert record["activation_bytes"] >= 4 * 8 * 64 * 4  # one activation of the largest batch
    assert EngineHeader.read(engine).version == record["version"]


def test_layers_of_the_engine_lie_beside_it(engine: Path) -> None:
    told = json.loads(engine.with_name("small.engine.layers.json").read_text())
    assert told["Bindings"] == ["input", "logits"]
    assert len(told["Layers"]) == build_record(engine)["layers"] > 0
    named = " ".join(layer["Metadata"] for layer in told["Layers"])
    assert all(f"[ONNX Layer: {name}]" in named for name in ("conv1", "conv2", "fc"))
    assert {t["Datatype"] for layer in told["Layers"] for t in layer["Outputs"]} == {"Float"}


def test_int8_graph_builds_without_a_warning_and_runs_in_int8(tmp_path: Path) -> None:
    source = quantized(tmp_path / "q.onnx", TensorProto.INT8)
    out = build_engine(source, tmp_path / "q.engine", runtime="tensorrt-rtx", precision="int8")
    assert build_record(out)["warnings"] == []
    layers = json.loads((tmp_path / "q.engine.layers.json").read_text())["Layers"]
    assert "Int8" in {tensor["Datatype"] for layer in layers for tensor in layer["Outputs"]}


@pytest.mark.parametrize("runtime", ["tensorrt-rtx"])
def test_uint8_zero_points_are_refused_not_reinterpreted(tmp_path: Path, runtime: str) -> None:
    source = quantized(tmp_path / "q.onnx", TensorProto.UINT8)
    with pytest.raises(EngineError, match=r"'quantize' quantizes to .*UINT8.*half of the range"):
        build_engine(source, tmp_path / "q.engine", runtime=runtime)


def test_named_capabilities_are_built_for(tmp_path: Path) -> None:
    out = build_engine(
        network(tmp_path / "x.onnx"),
        tmp_path / "x.engine",
        runtime={"tensorrt-rtx": {"capabilities": ["8.9", "sm120"], "workspace_mib": 64}},
    )
    assert build_record(out)["built_for"] == ["SM89", "SM120"]
    with pytest.raises(UsageError, match=r"no such compute capability 'SM70'.*SM89"):
        build_engine(
            network(tmp_path / "x.onnx"),
            tmp_path / "y.engine",
            runtime="tensorrt-rtx",
            capabilities=["SM70"],
        )


def test_a_graph_of_fixed_batch_takes_that_batch_only(tmp_path: Path) -> None:
    source = network(tmp_path / "x.onnx", batch=2)
    build_engine(source, tmp_path / "x.engine", runtime="tensorrt-rtx", batch=2)
    with pytest.raises(EngineError, match=r"fixed batch 2, and batch 1,1,8.*Use batch 2"):
        build_engine(source, tmp_path / "y.engine", runtime="tensorrt-rtx")
    assert not (tmp_path / "y.engine").exists()


@pytest.mark.parametrize("batch", ["batch", 1])
def test_the_batch_of_a_state_may_be_its_second_dimension(batch: Any, tmp_path: Path) -> None:
    shapes: dict[str, list[Any]] = {"input": [batch, 4], "state": [2, batch, 4]}
    ends = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()}
    total = helper.make_tensor_value_info("sum", TensorProto.FLOAT, shapes["state"])
    nodes = [helper.make_node("Add", ["input", "state"], ["sum"])]
    graph = helper.make_graph(nodes, "g", [*ends.values()], [total])
    opsets = [helper.make_opsetid("", 17)]
    source = tmp_path / "x.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), source)
    sizes = (1, 2, 4) if batch == "batch" else 1
    assert build_engine(source, tmp_path / "x.engine", runtime="tensorrt-rtx", batch=sizes).exists()
    if batch == 1:
        with pytest.raises(EngineError, match="fixed batch 1, and batch 3,3,3"):
            build_engine(source, tmp_path / "y.engine", runtime="tensorrt-rtx", batch=3)


def test_a_free_image_size_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["input"], ["logits"], name="relu")
    shape = ["batch", 3, "height", 8]
    source = save(tmp_path / "x.onnx", [node], {}, shape, shape, TensorProto.FLOAT)
    with pytest.raises(EngineError, match=r"free dimension besides the batch.*--input-size"):
        build_engine(source, tmp_path / "x.engine", runtime="tensorrt-rtx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda b: b[: len(b) // 2], r"only a part of an engine: \d+ of", id="half"),
        pytest.param(lambda b: b[:20], r"is no TensorRT engine \(20 bytes\)", id="header cut"),
        pytest.param(lambda b: b"", r"is no TensorRT engine \(0 bytes\)", id="empty"),
        pytest.param(lambda b: b"nope" + b[4:], "is no TensorRT engine", id="no engine"),
        pytest.param(
            lambda b: b"ftrt" + b[4:], "is an engine of tensorrt, and tensorrt-rtx", id="flavour"
        ),
        pytest.param(
            lambda b: b[:24] + bytes([9]) + b[25:],
            r"was built by tensorrt-rtx 9\.\S+, and here is \d.*Build it again",
            id="version",
        ),
    ],
)
def test_an_engine_that_does_not_belong_here_is_refused(
    engine: Path, tmp_path: Path, change: Any, message: str
) -> None:
    copy = copied(engine, tmp_path, change(engine.read_bytes()))
    with pytest.raises(EngineError, match=message):
        open_session(copy, "tensorrt-rtx")


def test_onnxruntime_says_whose_engine_it_was_given(engine: Path) -> None:
    with pytest.raises(EngineError, match=r"engine of tensorrt-rtx.*Open it with runtime"):
        open_session(engine)


@no_gpu
def test_without_a_gpu_running_is_refused_with_what_it_needs(engine: Path) -> None:
    with pytest.raises(EngineError, match=r"no NVIDIA GPU here.*built for: SM80\+"):
        open_session(engine, "tensorrt-rtx")


@pytest.mark.parametrize(
    ("built_for", "here", "fits"),
    [
        (["SM89"], "SM89", True),
        (["SM89", "SM120"], "SM86", False),
        (["SM80+"], "SM120", True),
        (["SM80+"], "SM75", False),
        ([], "SM89", True),
    ],
)
def test_an_engine_of_another_gpu_is_refused(
    engine: Path, monkeypatch: pytest.MonkeyPatch, built_for: list[str], here: str, fits: bool
) -> None:
    monkeypatch.setattr(_trt, "gpu_capability", lambda: here)
    monkeypatch.setattr(_trt, "gpu_name", lambda: f"Some GPU ({here})")
    header = EngineHeader.read(engine)
    facts = {"built_for": built_for}

    def check() -> None:
        check_fits(_trt.TENSORRT_RTX, engine, header, facts, installed=header.version)

    if fits:
        check()
    else:
        with pytest.raises(EngineError, match=rf"was built for SM.*here is Some GPU \({here}\)"):
            check()


def test_a_version_compatible_engine_passes_the_version_check(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_trt, "gpu_capability", lambda: "SM89")
    header = EngineHeader.read(engine)
    check_fits(
        _trt.TENSORRT_RTX, engine, header, {"version_compatible": True}, installed="99.0.0.1"
    )


class Echo:
    """A raw session that an engine of batch 2 to 4 would be."""

    inputs = (TensorSpec("input", ("batch", 3), "float32", (2, 4)),)
    outputs = (TensorSpec("logits", ("batch", 3), "float32"),)

    def run(self, arrays: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        return list(arrays)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("size", [1, 5])
def test_a_batch_outside_the_profile_is_refused(size: int) -> None:
    session = Session(Echo(), "x.engine")
    with pytest.raises(
        EngineError,
        match=rf"batch of {size} is outside.*Expected 2 to 4.*--batch 2,2,{max(4, size)}",
    ):
        session.run(np.zeros((size, 3), np.float32))
    session.run(np.zeros((3, 3), np.float32))


@no_gpu
def test_tensorrt_says_that_it_builds_on_its_gpu_only(tmp_path: Path) -> None:
    flavour = dataclasses.replace(TENSORRT, module="tensorrt_rtx")
    build = Build(
        flavour, BuildSettings(), network(tmp_path / "x.onnx"), BuildRequest((1, 1, 8), None)
    )
    with pytest.raises(EngineError, match=r"on the GPU it is for.*compress bundle"):
        build.run(tmp_path / "x.engine")


class Without:
    """A module of TensorRT without some of its names, as an older or newer version has it."""

    def __init__(self, module: Any, **hidden: tuple[str, ...]) -> None:
        self._module, self._hidden = module, hidden

    def __getattr__(self, name: str) -> Any:
        if name in self._hidden.get("names", ()):
            raise AttributeError(name)
        value = getattr(self._module, name)
        return Without(value, names=self._hidden[name]) if name in self._hidden else value


@no_gpu
@pytest.mark.filterwarnings("ignore:Use Deprecated:DeprecationWarning")
def test_timing_cache_is_kept_and_hashed_and_absent_flags_are_not_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorrt_rtx

    class Stand(_trt.Flavour):
        def package(self) -> ModuleType:
            return Without(  # type: ignore[return-value]
                tensorrt_rtx, NetworkDefinitionCreationFlag=("STRONGLY_TYPED",)
            )

    monkeypatch.setattr(_trt_build, "gpu_name", lambda: "Some GPU (SM89)")
    monkeypatch.setattr(_trt_build, "gpu_capability", lambda: "SM89")
    monkeypatch.setattr(Build, "_layers", lambda *_: {"Layers": []})
    settings = BuildSettings(timing_cache=tmp_path / "cache.timing", workspace_mib=32, tf32=False)
    build = Build(
        Stand("tensorrt", "tensorrt_rtx", b"ftrt", builds_without_gpu=False),
        settings,
        network(tmp_path / "x.onnx"),
        BuildRequest((1, 1, 8), None),
    )
    facts = build.run(tmp_path / "x.engine")
    assert (tmp_path / "cache.timing").exists()
    assert facts["timing_cache"]["sha256_before"] is None
    assert len(facts["timing_cache"]["sha256"]) == 64
    assert facts["built_for"] == ["SM89"]


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        ("Error Code 2: OutOfMemory (out of memory)", "workspace_mib lower"),
        (
            "Could not find any implementation for node conv_7 + relu_7.",
            r"Q/DQ pair at conv_7 out",
        ),
        ("Something else", "finds known causes"),
    ],
)
def test_a_build_that_fails_gives_the_reason_and_a_remedy(
    tmp_path: Path, message: str, fix: str
) -> None:
    build = Build(TENSORRT, BuildSettings(), tmp_path / "x.onnx", BuildRequest((1, 1, 1), None))
    build.log.messages.append(("ERROR", message))
    with pytest.raises(EngineError, match=f"could not build an engine: .*{fix}"):
        raise build._failed()


def test_log_keeps_warnings_and_errors_apart_and_once() -> None:
    log = Log()
    for severity, text in (("WARNING", "w"), ("ERROR", "e1"), ("WARNING", "w"), ("ERROR", "e2")):
        log.hear(severity, text)
    assert log.warnings() == ["w"]
    assert log.errors() == ["e1", "e2"]
    assert log.last_error() == "e2"
    assert Log().last_error() == "it gives no reason"


TEN = {
    "Layers": [
        {
            "Name": "conv1 + relu1",
            "LayerType": "CaskConvolution",
            "Inputs": [
                {
                    "Name": "q",
                    "Location": "Device",
                    "Dimensions": [1, 4, 8, 8],
                    "Format/Datatype": "Four wide channel vectorized row major Int8 format",
                }
            ],
            "Outputs": [
                {
                    "Name": "r",
                    "Dimensions": [1, 8, 8, 8],
                    "Format/Datatype": "Row major linear FP32",
                }
            ],
            "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8",
        }
    ],
    "Bindings": ["input", "logits"],
}
ELEVEN = {
    "Layers": [
        {
            "Name": "conv1 + relu1",
            "LayerType": "CaskConvolution",
            "Inputs": [
                {
                    "Name": "q",
                    "Dimensions": [1, 4, 8, 8],
                    "Format": "Channel major",
                    "Datatype": "Int8",
                }
            ],
            "Outputs": [
                {"Name": "r", "Dimensions": [1, 8, 8, 8], "Format": "Linear", "Datatype": "Float"}
            ],
        },
        "a bare name",
    ],
    "I/O Tensors": [{"Name": "input", "IOMode": "Input"}, {"Name": "logits"}],
}


@pytest.mark.parametrize("told", [TEN, ELEVEN], ids=["10", "11"])
def test_both_dialects_of_the_inspector_say_the_same(told: dict[str, Any]) -> None:
    normal = _trt_build.normalized_layers(told)
    assert normal["Bindings"] == ["input", "logits"]
    first = normal["Layers"][0]
    assert [t["Datatype"] for t in first["Inputs"] + first["Outputs"]] == ["Int8", "Float"]
    assert all(isinstance(layer, dict) for layer in normal["Layers"])


def test_every_build_hears_its_own_messages_and_all_of_them(engine: Path, tmp_path: Path) -> None:
    first = json.loads(engine.with_name("small.engine.layers.json").read_text())
    source = network(tmp_path / "x.onnx")
    again = build_engine(source, tmp_path / "x.engine", runtime="tensorrt-rtx", batch=(1, 2, 4))
    assert json.loads(again.with_name("x.engine.layers.json").read_text()) == first
    quiet = Log(verbose=False)
    quiet.hear("VERBOSE", "chatter")
    assert quiet.messages == []


def test_a_log_without_layers_gives_none() -> None:
    assert _trt_build.from_log([("VERBOSE", "nothing")]) == {"Layers": [], "Bindings": []}


def test_errors_are_of_the_family(engine: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError):
        open_session(copied(engine, tmp_path, b"vtrt"), "tensorrt-rtx")


class FullGpu:
    """An engine that finds no memory for its execution context."""

    device_memory_size_v2 = 900 << 20

    def create_execution_context(self) -> None:
        return None


def test_too_little_gpu_memory_says_how_much_is_needed_and_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 << 20, 8000 << 20))
    with pytest.raises(EngineError, match=r"needs 900 MiB of scratch.*100 of 8000 MiB are free"):
        TrtSession(ModuleType("trt"), FullGpu(), Log(), cuda_graph=False)


class OldEngine:
    device_memory_size = 7

    def create_execution_context(self) -> None:
        return None


def test_memory_of_tensorrt_10_is_read_where_11_renamed_it() -> None:
    session = object.__new__(TrtSession)
    session._engine, session._trt = OldEngine(), ModuleType("trt")
    assert session.device_memory_bytes == 7
    assert session.weights_bytes is None
