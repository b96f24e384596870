"""What exporters from TensorFlow write around layers becomes the layers' own; answers stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from int8_graphs import Sketch, images, run

from compress.qdq import prepare

LAST, FIRST, SWAPPED = [0, 2, 3, 1], [0, 3, 1, 2], [1, 0, 2, 3]


def kinds_after(model: onnx.ModelProto) -> Counter[str]:
    """Prepare a graph, check that it answers as before, and return how many operators it has."""
    prepared, feed = prepare(model), images(model)
    if model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1:
        feed = {name: array[:1] for name, array in feed.items()}
    onnx.checker.check_model(prepared, full_check=True)
    for got, want in zip(run(prepared, feed), run(model, feed), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    return Counter(node.op_type for node in prepared.graph.node)


def shape(s: Sketch, name: str, *sizes: int) -> str:
    return s.constant(name, np.array(sizes))


def gate(s: Sketch, x: str, pooled: str) -> str:
    x8 = s.op("Reshape", [pooled, shape(s, "to_image", -1, 8, 1, 1)], "one_pixel")
    y = s.relu(s.conv(x8, "narrow", 8, 4, k=1))
    y = s.op("Reshape", [y, shape(s, "as_it_is", -1, 4, 1, 1)], "again")
    return s.op("Sigmoid", [s.conv(y, "wide", 4, 8, k=1)], "opened")


def gate_of_channels_last(s: Sketch, x: str) -> str:
    pooled = s.op("ReduceMean", [x], "mean", axes=[1, 2], keepdims=1)
    opened = s.op("Reshape", [gate(s, x, pooled), shape(s, "to_last", -1, 1, 1, 8)], "last")
    return s.op("Mul", [x, opened], "gated")


def gate_through_squeeze(s: Sketch, x: str) -> str:
    y = s.op("Transpose", [x], "gate_first", perm=FIRST)
    pooled = s.op("Squeeze", [s.op("GlobalAveragePool", [y], "mean"), shape(s, "s", 2, 3)], "flat2")
    opened = s.op("Mul", [y, gate(s, y, pooled)], "gated")
    return s.op("Transpose", [opened], "gate_last", perm=LAST)


def gate_by_a_pool(s: Sketch, x: str) -> str:
    y = s.op("Transpose", [x], "gate_first", perm=FIRST)
    pooled = s.op("AveragePool", [y], "mean", kernel_shape=[8, 8], strides=[8, 8])
    opened = s.op("Mul", [y, gate(s, y, pooled)], "gated")
    return s.op("Transpose", [opened], "gate_last", perm=LAST)


@pytest.mark.parametrize("gated", [gate_of_channels_last, gate_through_squeeze, gate_by_a_pool])
@pytest.mark.parametrize("batch", ["batch", 1])
def test_gates_of_squeeze_excite_have_no_reshapes_between_their_layers(gated, batch):
    s = Sketch((8, 8, 3), batch=batch)
    x = s.op("Transpose", ["input"], "first", perm=FIRST)
    x = s.op("Transpose", [s.conv(x, "one", 3, 8)], "last_of_one", perm=LAST)
    x = gated(s, s.op("HardSwish", [x], "swish"))
    x = s.op("Transpose", [x], "first_of_two", perm=FIRST)
    s.op("Transpose", [s.conv(x, "two", 8, 8)], "logits", perm=LAST)
    model = s.model()
    if batch == 1:
        for constant in model.graph.initializer:
            if constant.name.startswith(("to_", "as_")):
                target = onnx.numpy_helper.to_array(constant).copy()
                target[0] = 1
                constant.CopyFrom(onnx.numpy_helper.from_array(target, constant.name))
    kinds = kinds_after(model)
    assert kinds == {
        "Transpose": 2,
        "Conv": 4,
        "HardSwish": 1,
        "GlobalAveragePool": 1,
        "Relu": 1,
        "Sigmoid": 1,
        "Mul": 1,
    }


def test_a_reshape_that_moves_more_than_ones_stays():
    s = Sketch((3, 4, 1))
    x = s.op("Reshape", ["input", shape(s, "other", -1, 4, 3, 1)], "turned")
    x = s.op("Reshape", [s.conv(x, "c", 4, 4, k=1), shape(s, "flat", -1, 12)], "flatter")
    s.op("Reshape", [x, shape(s, "back", -1, 4, 3, 1)], "logits")
    assert kinds_after(s.model()) == {"Reshape": 3, "Conv": 1}


def test_a_pool_over_a_part_of_an_image_stays():
    s = Sketch((8, 8, 8))
    x = s.conv("input", "c", 8, 8)
    s.op("AveragePool", [x], "logits", kernel_shape=[8, 4])
    assert kinds_after(s.model()) == {"Conv": 1, "AveragePool": 1}


def padded(s: Sketch, x: str, pads: list[int], **more) -> str:
    return s.op(
        "Pad", [x, shape(s, f"{x}_pads", *pads), *more.pop("fill", ())], f"{x}_padded", **more
    )


def test_layers_pad_by_themselves():
    s = Sketch((3, 9, 9))
    x = s.relu(s.conv(padded(s, "input", [0, 0, 0, 0, 0, 0, 1, 1]), "c", 3, 8, pads=[0, 0, 0, 0]))
    x = padded(s, x, [0, 0, 1, 1, 0, 0, 1, 0])
    x = s.op("MaxPool", [x], "pool", kernel_shape=[3, 3], strides=[2, 2])
    x = padded(s, x, [0, 0, 1, 0, 0, 0, 0, 2], fill=[s.constant("zero", np.float32(0))])
    s.conv(x, "logits", 8, 8, pads=[1, 1, 1, 1])
    assert kinds_after(s.model()) == {"Conv": 2, "Relu": 1, "MaxPool": 1}


@pytest.mark.parametrize(
    "pads, more",
    [
        ([0, 0, 1, 1, 0, 0, 1, 1], {"mode": "edge"}),
        ([0, 0, 1, 1, 0, 0, 1, 1], {"fill": 0.5}),
        ([0, 1, 1, 1, 0, 0, 1, 1], {}),
        ([0, 0, 1, 1, 0, 0, -1, 1], {}),
    ],
    ids=["edge", "no zero", "channels", "cut"],
)
def test_a_pad_that_is_no_border_of_zeros_stays(pads, more):
    s = Sketch((3, 9, 9))
    if "fill" in more:
        more = {"fill": [s.constant("half", np.float32(more["fill"]))]}
    s.conv(padded(s, "input", pads, **more), "logits", 3 + pads[1], 8)
    assert kinds_after(s.model()) == {"Pad": 1, "Conv": 1}


def test_a_pool_of_values_below_zero_keeps_its_border_of_zeros():
    s = Sketch((3, 9, 9))
    x = padded(s, s.conv("input", "c", 3, 8), [0, 0, 1, 1, 0, 0, 1, 1])
    s.op("MaxPool", [x], "logits", kernel_shape=[3, 3])
    assert kinds_after(s.model()) == {"Conv": 1, "Pad": 1, "MaxPool": 1}


@pytest.mark.parametrize("group", [1, 8])
def test_a_convolution_over_every_second_pixel_is_dilated(group):
    s = Sketch((3, 8, 8))
    x = padded(s, s.relu(s.conv("input", "one", 3, 8)), [0, 0, 2, 2, 0, 0, 2, 2])
    x = s.op("SpaceToDepth", [s.op("Transpose", [x], "a", perm=SWAPPED)], "apart", blocksize=2)
    x = s.op("Transpose", [x], "b", perm=SWAPPED)
    x = s.conv(x, "two", 8, 8, group=group, pads=[0, 0, 0, 0])
    x = s.op("DepthToSpace", [s.op("Transpose", [x], "d", perm=SWAPPED)], "whole", blocksize=2)
    ends = [shape(s, n, v, v) for n, v in (("from", 0), ("to", 7))]
    x = s.relu(s.op("Slice", [x, *ends, shape(s, "sides", 2, 3)], "cut"))
    s.conv(s.op("Transpose", [x], "e", perm=SWAPPED), "logits", 8, 4)
    model = s.model()
    assert kinds_after(model) == {"Conv": 3, "Relu": 2, "Slice": 1}
    two = next(node for node in prepare(model).graph.node if node.name == "two")
    told = {item.name: onnx.helper.get_attribute_value(item) for item in two.attribute}
    assert (told["dilations"], told["pads"]) == ([2, 2], [2, 2, 2, 2])


def test_a_slice_that_takes_all_is_gone():
    s = Sketch((3, 8, 8))
    ends = [shape(s, n, v, v) for n, v in (("from", 0), ("to", 2**31 - 1))]
    x = s.op("Slice", [s.conv("input", "one", 3, 8), *ends, shape(s, "sides", 2, 3)], "all")
    s.relu(x)
    assert kinds_after(s.model(outputs=["all_relu"])) == {"Conv": 1, "Relu": 1}


def scaled(s: Sketch, x: str, name: str, channels: int) -> str:
    x = s.op("Mul", [x, s.floats(f"{name}_factor", 1, channels, 1, 1)], f"{name}_scaled")
    return s.op("Add", [x, s.floats(f"{name}_offset", 1, channels, 1, 1)], name)


def test_factors_and_offsets_between_layers_are_batchnorm():
    s = Sketch((3, 8, 8))
    x = s.conv(scaled(s, "input", "pixels", 3), "one", 3, 8)
    y = s.conv(s.relu(x), "two", 8, 4)
    x = s.relu(scaled(s, s.op("Concat", [x, y], "both", axis=1), "norm", 12))
    s.conv(x, "logits", 12, 4)
    kinds = kinds_after(s.model())
    assert kinds["BatchNormalization"] == 1
    assert kinds["Mul"] == kinds["Add"] == 1  # of the pixels
