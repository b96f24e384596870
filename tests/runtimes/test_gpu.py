"""What needs a GPU: engines that run, CUDA graphs, device time. Run with -m gpu."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import expected, network
from test_contract import Twin

from compress.errors import EngineError
from compress.runtimes import build_engine, build_record, open_session, unavailable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def runtime(request: pytest.FixtureRequest) -> str:
    reason = unavailable(request.param)
    if reason:
        pytest.skip(reason)
    name: str = request.param
    return name


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["plain", "graph"])
def test_engine_answers_as_torch(
    runtime: str, tmp_path: Path, images: np.ndarray, cuda_graph: bool
) -> None:
    out = build_engine(network(tmp_path / "x.onnx"), tmp_path / "x.engine", runtime=runtime)
    with open_session(out, {runtime: {"cuda_graph": cuda_graph}}) as session:
        for batch in (images, images[:1], images * 2, images):
            np.testing.assert_allclose(
                session.run(batch)[0], expected(batch), rtol=1e-2, atol=1e-3
            )  # tf32


def test_engine_tells_memory_layers_and_device_time(
    runtime: str, tmp_path: Path, images: np.ndarray
) -> None:
    out = build_engine(network(tmp_path / "x.onnx"), tmp_path / "x.engine", runtime=runtime)
    assert build_record(out)["layers"] > 0
    with open_session(out, runtime) as session:
        raw = session.raw  # type: ignore[attr-defined]
        assert raw.weights_bytes > 0
        assert raw.device_memory_bytes >= 0
        assert raw.device_latency_ms((images,)) > 0
        with pytest.raises(EngineError, match="outside what this engine was built for"):
            session.run(np.zeros((9, 3, 8, 8), np.float32))


def test_timing_cache_makes_the_second_build_the_same(tmp_path: Path) -> None:
    if unavailable("tensorrt"):
        pytest.skip(str(unavailable("tensorrt")))
    cache = str(tmp_path / "cache")
    source = network(tmp_path / "x.onnx")
    hashes = []
    for name in ("a.engine", "b.engine"):
        out = build_engine(source, tmp_path / name, runtime="tensorrt", timing_cache=cache)
        hashes.append(build_record(out)["timing_cache"]["sha256"])
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}, {"dtype": "float16"}])
def test_pytorch_on_the_gpu_answers_as_torch(images: np.ndarray, options: dict) -> None:
    with open_session(Twin(), "pytorch", device="cuda", **options) as session:
        for batch in (images, images[:1], images):
            np.testing.assert_allclose(session.run(batch)[0], expected(batch), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_onnxruntime_on_the_gpu_answers_as_torch(
    tmp_path: Path, images: np.ndarray, device: str
) -> None:
    try:
        session = open_session(network(tmp_path / "x.onnx"), "onnxruntime", device=device)
    except EngineError as error:
        pytest.skip(str(error))
    with session:
        np.testing.assert_allclose(session.run(images)[0], expected(images), rtol=1e-2, atol=1e-2)
