"""Parts of the report that are made from plans and from what the stages recorded."""

from __future__ import annotations

import pytest

from compress import pipeline
from compress.pipeline.reporting import notes_of, tensor_ranges
from compress.qdq.plan import ActivationRange, QuantPlan, WeightScales
from compress.recipe.loading import validate_recipe


def test_what_several_int8_forms_share_is_told_once() -> None:
    shared = "judged on 16 images: an SQNR may be some dB off; give 64 or more"
    notes = {
        "int8-onnxruntime": ("mse ranges: 30.0 dB", shared, "a stays in float: slow"),
        "int8-openvino": ("mse ranges: 31.0 dB", "a stays in float: slow", shared),
        "int8-tensorrt": ("a stays in float: slow", "b stays in float: slow"),
    }
    assert list(notes_of(notes.items())) == [
        "int8-onnxruntime: mse ranges: 30.0 dB",
        f"int8-onnxruntime, int8-openvino: {shared}",
        "int8-onnxruntime, int8-openvino: a stays in float: slow",
        "int8-openvino: mse ranges: 31.0 dB",
        "int8-tensorrt: a and b stay in float: slow",
    ]


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


def test_a_run_tells_of_its_own_cuts_and_not_of_those_its_original_came_with(tmp_path):
    small = "compress.models.cifar:resnet8"
    recipe = {
        "model": {"name": small, "options": {"in_channels": 1, "width": 4}},
        "data": {"name": "digits", "calibration": 16},
        "stages": [{"prune": {"criterion": "l1", "keep_macs": 0.6}}],
        "targets": [{"runtime": "onnxruntime", "precision": "fp32"}],
        "measure": {"rounds": 3, "round_ms": 2, "test_images": 16},
    }
    cut = pipeline.run(validate_recipe(recipe, where="r"), tmp_path / "cut")
    again = recipe | {"model": {"name": str(tmp_path / "cut")}, "stages": []}
    uncut = pipeline.run(validate_recipe(again, where="r"), tmp_path / "again")
    assert cut.details.channels and not uncut.details.channels
    assert uncut.details.skipped["channels"] == "nothing was pruned"
    assert uncut.details.skipped["flips"] == "there is no other network to compare with"
