"""For each rule a graph with just that defect, and what it ought to compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from sketch import Sketch


@dataclass(frozen=True)
class Defect:
    """A graph that one rule objects to."""

    model: onnx.ModelProto
    target: str
    fixed_db: float | None  # SQNR that the fixed graph reaches at least; None: cannot be fixed
    meaning: onnx.ModelProto | None = None  # what it ought to compute, if not what it computes


def _conv_net(draw: Callable[[Sketch, str], str]) -> onnx.ModelProto:
    """A graph of the input, quantized, and whatever ``draw`` adds."""
    s = Sketch()
    return s.model(draw(s, s.pair("input", 4 / 127)))


def _weights(s: Sketch) -> np.ndarray:
    return s.kernel(8, 3, 3, 3)


def operator_format() -> Defect:
    s = Sketch()
    codes = s.add("DynamicQuantizeLinear", "input")
    nodes = s.nodes[-1]
    nodes.output.extend(["dynamic_scale", "dynamic_zero"])
    return Defect(
        s.model(s.add("DequantizeLinear", codes, "dynamic_scale", "dynamic_zero")), "tensorrt", None
    )


def nothing_quantized() -> Defect:
    s = Sketch()
    return Defect(s.model(s.conv("input", s.constant(_weights(s)))), "onnxruntime", None)


def unread_quantize() -> Defect:
    s = Sketch()
    numbers = [s.constant(0.1), s.constant(0, np.int8)]
    codes = s.add("QuantizeLinear", "input", *numbers)
    return Defect(s.model(s.add("Cast", codes, to=1)), "openvino", None)


def scale_not_constant() -> Defect:
    s = Sketch()
    peak = s.add("ReduceMax", s.add("Abs", "input"), keepdims=0)
    scale = s.add("Div", peak, s.constant(127.0))
    codes = s.add("QuantizeLinear", "input", scale, s.constant(0, np.int8))
    return Defect(s.model(s.add("DequantizeLinear", codes, scale)), "tensorrt", None)


def scale_not_positive() -> Defect:
    def draw(scale: np.ndarray) -> onnx.ModelProto:
        s = Sketch()
        w = _weights(s)
        w[0] = 0
        x = s.pair("input", 4 / 127)
        return s.model(s.conv(x, s.weight(w, 0, scale)))

    scale = np.full(8, 0.01)
    right = draw(scale)
    scale[0] = 0
    return Defect(draw(scale), "onnxruntime", 60, right)


def pair_mismatch() -> Defect:
    s, t = Sketch(), Sketch()
    wrong = s.model(s.pair("input", 0.03, dq_scale=0.06))
    return Defect(wrong, "openvino", 100, t.model(t.pair("input", 0.03)))


def activation_per_channel() -> Defect:
    s = Sketch()
    x = s.pair("input", np.array([0.024, 0.03, 0.04]))
    return Defect(s.model(s.conv(x, s.weight(_weights(s)))), "onnxruntime", 35)


def weight_axis() -> Defect:
    def draw(s: Sketch, x: str) -> str:
        w = _weights(s)
        return s.conv(x, s.weight(w, 1))

    return Defect(_conv_net(draw), "tensorrt", 38)


def weight_zero_point() -> Defect:
    def draw(s: Sketch, x: str) -> str:
        codes = s.random.integers(0, 255, (8, 3, 3, 3))
        inputs = [s.constant(codes, np.uint8), s.constant(0.01), s.constant(120, np.uint8)]
        return s.conv(x, s.add("DequantizeLinear", *inputs))

    return Defect(_conv_net(draw), "tensorrt", 38)


def weight_clipped() -> Defect:
    s, t = Sketch(), Sketch()
    w = _weights(s)
    small = np.float32(np.abs(w).max() / 127 / 4)
    wrong = s.model(s.conv(s.pair("input", 4 / 127), s.pair(s.constant(w), small)))
    right = t.model(t.conv(t.pair("input", 4 / 127), t.constant(w)))
    return Defect(wrong, "tensorrt", 38, right)


def weight_minus_128() -> Defect:
    def draw(s: Sketch, x: str) -> str:
        w = _weights(s)
        return s.conv(x, s.weight(np.where(w == w.min(), -2.0, w), None, 2 / 128))

    return Defect(_conv_net(draw), "tensorrt", 38)


def weight_half_range() -> Defect:
    def draw(s: Sketch, x: str) -> str:
        w = _weights(s)
        return s.conv(x, s.weight(w, 0, np.abs(w).max(axis=(1, 2, 3)) / 63.5))

    return Defect(_conv_net(draw), "tensorrt", None)


def weight_per_tensor() -> Defect:
    s, t = Sketch(), Sketch()
    w = _weights(s) * np.logspace(0, -3, 8, dtype=np.float32)[:, None, None, None]
    scale = np.abs(w).max() / 127

    def draw(s: Sketch, weight: str) -> onnx.ModelProto:
        return s.model(s.add("Softsign", s.conv(s.pair("input", 4 / 127), weight)))

    right = draw(t, t.constant(w))
    return Defect(draw(s, s.pair(s.constant(w), scale)), "openvino", 38, right)


def unfolded_batchnorm() -> Defect:
    def draw(s: Sketch, x: str) -> str:
        y = s.conv(x, s.weight(_weights(s)))
        gamma = s.random.uniform(-1, 1, 8)
        rest = [s.random.normal(size=8), s.random.normal(size=8), s.random.uniform(0.5, 2, 8)]
        return s.add("BatchNormalization", y, s.constant(gamma), *map(s.constant, rest))

    return Defect(_conv_net(draw), "tensorrt", 90)


def unsigned_activation() -> Defect:
    s = Sketch()
    x = s.pair(s.add("Relu", "input"), 4 / 255, 0, np.uint8)
    return Defect(s.model(s.conv(x, s.weight(_weights(s)))), "tensorrt", 35)


def activation_zero_point() -> Defect:
    """As ONNX Runtime writes it: the Relu is gone, the zero point of -128 stands for it."""
    s, t = Sketch(), Sketch()
    w, v = _weights(s), s.kernel(8, 8, 3, 3)

    def draw(s: Sketch, x: str) -> onnx.ModelProto:
        return s.model(s.conv(x, s.weight(v)))

    y = s.conv(s.pair("input", 4 / 127), s.weight(w))
    right = t.add("Relu", t.conv(t.pair("input", 4 / 127), t.weight(w)))
    return Defect(draw(s, s.pair(y, 7 / 255, -128)), "tensorrt", 30, draw(t, right))


def quantized_before_activation() -> Defect:
    def draw(s: Sketch, x: str) -> str:
        y = s.pair(s.conv(x, s.weight(_weights(s))), 4 / 127)
        z = s.add("Relu", y)
        return s.conv(s.pair(z, 4 / 127), s.weight(s.kernel(8, 8, 3, 3)))

    return Defect(_conv_net(draw), "tensorrt", 35)


def split_activation() -> Defect:
    def draw(s: Sketch, x: str) -> str:
        y = s.pair(s.conv(x, s.weight(_weights(s))), 4 / 127)
        gate = s.pair(s.add("Sigmoid", y), 1 / 127)
        z = s.pair(s.add("Mul", y, gate), 4 / 127)
        return s.conv(z, s.weight(s.kernel(8, 8, 3, 3)))

    return Defect(_conv_net(draw), "openvino", 30)


def computed_batch() -> Defect:
    s = Sketch()
    x = s.pair("input", 4 / 127)
    levels = [s.pair(s.conv(x, s.weight(_weights(s))), 4 / 127)]
    small = s.conv(x, s.weight(s.kernel(8, 3, 3, 3)), strides=[2, 2])
    levels.append(s.pair(small, 4 / 127))
    batch = s.add("Gather", s.add("Shape", levels[0]), s.constant(0, np.int64))
    batch = s.add("Unsqueeze", batch, s.constant([0], np.int64))
    rest = [s.constant([8], np.int64), s.constant([-1], np.int64)]
    target = s.add("Concat", batch, *rest, axis=0)
    flat = [s.add("Reshape", level, target) for level in levels]
    return Defect(s.model(s.add("Concat", *flat, axis=2)), "openvino", 60)


def vanishing_scores() -> Defect:
    def draw(joined: bool) -> onnx.ModelProto:
        s = Sketch()
        x = s.pair("input", 4 / 127)
        boxes = s.add("Mul", s.conv(x, s.weight(_weights(s))), s.constant(np.float32(100)))
        scores = s.add("Sigmoid", s.conv(x, s.weight(s.kernel(8, 3, 3, 3))))
        end = s.add("Concat", boxes, scores, axis=1)
        return s.model(s.pair(end, 400 / 127) if joined else end)

    return Defect(draw(True), "openvino", 60, draw(False))


def double_quantization() -> Defect:
    def draw(s: Sketch, x: str) -> str:
        return s.conv(s.pair(x, 4 / 100), s.weight(_weights(s)))

    return Defect(_conv_net(draw), "tensorrt", 35)


def duplicate_quantize() -> Defect:
    s = Sketch()
    x = s.add("Relu", "input")
    one = s.conv(s.pair(x, 4 / 127), s.weight(_weights(s)))
    two = s.conv(s.pair(x, 3.9 / 127), s.weight(_weights(s)))
    return Defect(s.model(s.add("Sub", one, two)), "tensorrt", 30)


def _residual(pairs_at: tuple[bool, bool]) -> onnx.ModelProto:
    s = Sketch()
    x = s.add("Relu", "input")
    quantized = s.pair(x, 4 / 127)
    y = s.add("Relu", s.conv(quantized, s.weight(_weights(s))))
    y = s.conv(s.pair(y, 4 / 127), s.weight(s.kernel(3, 8, 3, 3)))
    branch = s.pair(y, 4 / 127) if pairs_at[0] else y
    x = s.add("Relu", s.add("Add", branch, quantized if pairs_at[1] else x, name="sum"))
    return s.model(s.conv(s.pair(x, 4 / 127), s.weight(_weights(s))))


def residual_both_sides() -> Defect:
    return Defect(_residual((True, True)), "tensorrt", 30)


def residual_skip_float() -> Defect:
    return Defect(_residual((False, False)), "tensorrt", 30)


def needless_pair() -> Defect:
    def draw(s: Sketch, x: str) -> str:
        y = s.pair(s.conv(x, s.weight(_weights(s))), 8 / 127)
        return s.add("GlobalAveragePool", y)

    return Defect(_conv_net(draw), "tensorrt", 30)


def reduce_mean() -> Defect:
    def draw(s: Sketch, x: str) -> str:
        y = s.pair(s.conv(x, s.weight(_weights(s))), 6 / 255, 128, np.uint8)
        return s.add("ReduceMean", y, s.constant([2, 3], np.int64), keepdims=0)

    s = Sketch()
    return Defect(s.model(draw(s, s.pair("input", 8 / 255, 128, np.uint8))), "onnxruntime", 30)


def _pooled(ceil: int) -> onnx.ModelProto:
    """Draw a pool that counts what lies outside the image: padding, or nothing."""

    def draw(s: Sketch, x: str) -> str:
        y = s.pair(s.conv(x, s.weight(_weights(s))), 6 / 255, 128, np.uint8)
        options = {"kernel_shape": [3, 3], "strides": [2, 2], "count_include_pad": 1}
        return s.add("AveragePool", y, **options, ceil_mode=ceil, pads=[1 - ceil] * 4)

    s = Sketch()
    return s.model(draw(s, s.pair("input", 8 / 255, 128, np.uint8)))


def rounded_up_pool() -> Defect:
    return Defect(_pooled(ceil=1), "onnxruntime", 100)


def padded_average_pool() -> Defect:
    return Defect(_pooled(ceil=0), "openvino", 100)


def half_quantized() -> Defect:
    s = Sketch()
    return Defect(s.model(s.conv("input", s.weight(_weights(s)))), "openvino", 100)


def float_weight() -> Defect:
    def draw(s: Sketch, x: str) -> str:
        return s.conv(x, s.constant(_weights(s)))

    return Defect(_conv_net(draw), "tensorrt", 38)


def signed_activation() -> Defect:
    s = Sketch()
    x = s.pair("input", 4 / 127)
    y = s.add("Relu", s.conv(x, s.weight(_weights(s))))
    return Defect(s.model(s.pair(y, 4 / 127)), "onnxruntime", 38)


def signed_activation_with_zero_point() -> Defect:
    s = Sketch()
    x = s.pair("input", 6 / 255, 13)
    return Defect(s.model(s.conv(x, s.weight(_weights(s)))), "openvino", 100)


def wasted_range() -> Defect:
    s = Sketch()
    x = s.pair(s.add("Relu", "input"), 8 / 255, 128, np.uint8)
    return Defect(s.model(s.conv(x, s.weight(_weights(s)))), "openvino", 35)


def missing_input_quantization() -> Defect:
    s = Sketch()
    x = s.add("Relu", "input")
    quantized = s.pair(x, 4 / 255, 0, np.uint8)
    y = s.conv(quantized, s.weight(s.kernel(3, 3, 3, 3)))
    y = s.add("Add", x, s.pair(y, 6 / 255, 128, np.uint8), name="sum")
    y = s.conv(s.pair(y, 8 / 255, 100, np.uint8), s.weight(s.kernel(3, 3, 3, 3)))
    return Defect(s.model(y), "onnxruntime", 30)


def missing_output_quantization() -> Defect:
    s = Sketch()
    x = s.pair("input", 8 / 255, 128, np.uint8)
    x = s.pair(s.conv(x, s.weight(_weights(s))), 8 / 255, 128, np.uint8)
    y = s.add("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
    y = s.conv(s.add("Softsign", y), s.constant(s.kernel(3, 8, 3, 3)))  # a layer in float reads it
    return Defect(s.model(y), "onnxruntime", 25)


def moved_with_another_scale() -> Defect:
    def draw(s: Sketch, x: str) -> str:
        y = s.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
        return s.conv(s.pair(y, 4 / 120), s.weight(_weights(s)))

    return Defect(_conv_net(draw), "tensorrt", 33)


def concat_scales() -> Defect:
    s = Sketch()
    x = s.pair("input", 4 / 127)
    sides = [s.conv(x, s.weight(_weights(s))) for _ in range(2)]
    scales = (8 / 127, 6.4 / 127)
    joined = [s.pair(y, scale) for y, scale in zip(sides, scales, strict=True)]
    y = s.add("Concat", *joined, axis=1)
    return Defect(s.model(s.conv(y, s.weight(s.kernel(8, 16, 3, 3)))), "tensorrt", 30)


def biased(scale_error: float | None, weight: float = 1.0, dtype: type = np.int8) -> Sketch:
    s = Sketch()
    unsigned = dtype == np.uint8
    x = s.pair("input", 8 / 255, 128 if unsigned else 0, dtype)
    w = _weights(s)
    w[0] *= weight
    scale = np.abs(w).max(axis=(1, 2, 3)) / 127
    bias = s.random.uniform(0.5, 1, 8)
    if scale_error is None:
        b = s.constant(bias)
    else:
        exact = scale * (8 / 255) * scale_error
        codes = np.clip(np.rint(bias / exact), -(2**31), 2**31 - 1)
        b = s.add("DequantizeLinear", s.constant(codes, np.int32), s.constant(exact), axis=0)
    y = s.conv(x, s.weight(w, 0, scale), b)
    s.add("Identity", s.pair(y, 16 / 255, 128 if unsigned else 0, dtype), name="end")
    return s


def bias_quantized() -> Defect:
    return Defect(biased(1.0).model("end_out"), "tensorrt", 30)


def bias_overflow() -> Defect:
    return Defect(biased(None, 1e-9, np.uint8).model("end_out"), "onnxruntime", 45)


def bias_scale() -> Defect:
    return Defect(biased(2.0, 1, np.uint8).model("end_out"), "onnxruntime", 45)


def bias_float() -> Defect:
    return Defect(biased(None, 1, np.uint8).model("end_out"), "onnxruntime", 45)


DEFECTS: dict[str, Callable[[], Defect]] = {
    function.__name__.replace("_", "-"): function
    for function in list(globals().values())
    if getattr(function, "__module__", "") == __name__
    and getattr(function, "__annotations__", {}).get("return") == "Defect"
}

__all__ = ["DEFECTS", "Defect"]
