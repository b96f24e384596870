"""Parts of the report that are made from int8 plans."""

import pytest

from compress.pipeline.details import tensor_ranges
from compress.qdq.plan import ActivationRange, QuantPlan, WeightScales


def plan(target: str) -> QuantPlan:
    return QuantPlan(
        target,
        activations={"x": ActivationRange(low=-1.0, high=3.0, limit=3.0)},
        weights={"w": WeightScales(axis=0, scales=(0.01, 0.02))},
    )


def test_ranges_are_those_of_the_target():
    asymmetric, weight = tensor_ranges(plan("onnxruntime"), "int8")
    symmetric, _ = tensor_ranges(plan("tensorrt"), "int8")
    assert (asymmetric.low, asymmetric.high) == (-1.0, 3.0)
    assert (symmetric.low, symmetric.high) == (-3.0, 3.0)
    assert (weight.kind, weight.high, weight.bits) == ("weight", pytest.approx(2.54), 8)
