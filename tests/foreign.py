"""One fp32 network with every difficulty of placement, and what other tools make of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from sketch import Sketch

SIDE = 16


def images(count: int, seed: int = 1) -> np.ndarray:
    """Images (count, 3, 16, 16), standard normal."""
    return np.random.default_rng(seed).standard_normal((count, 3, SIDE, SIDE)).astype(np.float32)


def network() -> onnx.ModelProto:
    """Residual blocks with and without downsampling, depthwise, squeeze-excite, concat, pooling."""
    s = Sketch(("batch", 3, SIDE, SIDE))

    def layer(x: str, cin: int, cout: int, k: int = 3, stride: int = 1, groups: int = 1) -> str:
        w = s.constant(s.kernel(cout, cin // groups, k, k) * 1.4)
        b = s.constant(s.random.normal(0, 0.2, cout))
        pads = [k // 2] * 4
        return s.add("Conv", x, w, b, pads=pads, strides=[stride] * 2, group=groups)

    def relu(x: str) -> str:
        return s.add("Relu", x)

    x = relu(layer("input", 3, 16))
    x = relu(s.add("Add", layer(relu(layer(x, 16, 16)), 16, 16), x))
    branch = layer(relu(layer(x, 16, 32, stride=2)), 32, 32)
    x = relu(s.add("Add", layer(x, 16, 32, 1, 2), branch))
    limits = [s.constant(0.0), s.constant(6.0)]
    y = layer(s.add("Clip", layer(x, 32, 32, groups=32), *limits), 32, 32, 1)
    gate = s.add("GlobalAveragePool", y)
    gate = s.add("Sigmoid", layer(relu(layer(gate, 32, 8, 1)), 8, 32, 1))
    x = s.add("Add", x, s.add("Mul", y, gate))
    x = s.add("Concat", relu(layer(x, 32, 16, 1)), relu(layer(x, 32, 16)), axis=1)
    x = s.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = s.add("Flatten", s.add("GlobalAveragePool", x), axis=1)
    bias = s.constant(s.random.normal(0, 0.1, 10))
    return s.model(s.add("Gemm", x, s.constant(s.kernel(10, 32)), bias, transB=1))


def by_nncf(model: onnx.ModelProto) -> onnx.ModelProto:
    """NNCF with its defaults."""
    os.environ["NNCF_CI"] = "1"  # no telemetry
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nncf

        data = nncf.Dataset([{"input": images(1, seed)} for seed in range(16)])
        return nncf.quantize(model, data, subset_size=16)


def by_onnxruntime(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """quantize_static of ONNX Runtime with its defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = (images(4, seed) for seed in range(4))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch}

    source, out = folder / "fp32.onnx", folder / "onnxruntime.onnx"
    onnx.save(model, source)
    quantize_static(source, out, Reader())
    return onnx.load(out)


def by_compress(model: onnx.ModelProto, target: str) -> onnx.ModelProto:
    """The project's own writer."""
    from compress.quantize import calibrate, make_quant_plan, write_qdq

    statistics = calibrate(model, [images(4, seed) for seed in range(4)])
    return write_qdq(model, make_quant_plan(statistics, target=target))


def build_messages(trt: Any, model: onnx.ModelProto) -> list[str]:
    """Return what parser and builder complain of; the builder needs no GPU."""

    class Logger(trt.ILogger):
        def __init__(self):
            super().__init__()
            self.messages = []

        def log(self, severity, message):
            if severity <= trt.ILogger.Severity.WARNING:
                self.messages.append(message)

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        return [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("input", *[(b, 3, SIDE, SIDE) for b in (1, 1, 8)])
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    return logger.messages
