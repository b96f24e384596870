"""TensorRT's own parser takes our graphs without a word; it needs no GPU."""

from __future__ import annotations

import pytest
from int8_graphs import GRAPHS, images

from compress.packages import is_installed
from compress.qdq import write_qdq
from compress.quantize import calibrate, make_quant_plan

pytestmark = pytest.mark.skipif(
    not is_installed("tensorrt_rtx"), reason="tensorrt-rtx is not installed"
)


def complaints(content: bytes, shapes, *, build: bool) -> list[str]:
    import tensorrt_rtx as trt

    said: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                said.append(message)

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(content):
        said.extend(str(parser.get_error(i)) for i in range(parser.num_errors))
    elif build:
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, (1, *shape), (1, *shape), (8, *shape))
        config.add_optimization_profile(profile)
        if builder.build_serialized_network(network, config) is None:
            said.append("no engine")
    return said


@pytest.mark.parametrize("name", GRAPHS)
def test_parses_without_a_warning(name):
    model = GRAPHS[name]()
    feed = images(model)
    plan = make_quant_plan(calibrate(model, [feed]), target="tensorrt")
    shapes = {key: array.shape[1:] for key, array in feed.items()}
    content = write_qdq(model, plan).SerializeToString()
    assert complaints(content, shapes, build=name in ("residual", "concat")) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_builds_without_a_warning(name):
    model = GRAPHS[name]()
    feed = images(model)
    plan = make_quant_plan(calibrate(model, [feed]), target="tensorrt")
    shapes = {key: array.shape[1:] for key, array in feed.items()}
    assert complaints(write_qdq(model, plan).SerializeToString(), shapes, build=True) == []


def test_the_parser_does_complain_of_the_graph_for_onnxruntime():
    model = GRAPHS["residual"]()
    feed = images(model)
    plan = make_quant_plan(calibrate(model, [feed]), target="onnxruntime")
    said = complaints(
        write_qdq(model, plan).SerializeToString(), {"input": (3, 16, 16)}, build=False
    )
    assert any("UINT8" in message or "Int32" in message for message in said)
