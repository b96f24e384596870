"""Parts of the report made from plans, fusion checks and answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.evaluate import Predictions, accuracy
from compress.pipeline.records import calibration, coverage, ranges, samples
from compress.qdq.plan import ActivationRange, QuantPlan, WeightScales
from compress.runtimes._fusion import FloatLayer, Fusion


def plan(target: str) -> QuantPlan:
    return QuantPlan(
        target,
        activations={"x": ActivationRange(low=-1.0, high=3.0, limit=3.0)},
        weights={"w": WeightScales(axis=0, scales=(0.01, 0.02))},
    )


def test_ranges_are_those_of_the_target():
    asymmetric, weight = ranges(plan("onnxruntime"), "int8")
    symmetric, _ = ranges(plan("tensorrt"), "int8")
    assert (asymmetric.low, asymmetric.high) == (-1.0, 3.0)
    assert (symmetric.low, symmetric.high) == (-3.0, 3.0)
    assert (weight.kind, weight.high, weight.bits) == ("weight", pytest.approx(2.54), 8)


def test_coverage_names_islands_and_float_layers_once():
    fusion = Fusion(
        runtime="onnxruntime",
        macs=1000,
        int8_macs=900,
        kernels=5,
        float_layers=(
            FloatLayer("conv", "Conv", 80, "fp32", "no int8 kernel"),
            FloatLayer("fc", "Gemm", 20, "fp32", "a float bias"),
        ),
        islands=(("conv", "relu"),),
        reformats=("cast",),
        unfused_adds=(),
        adds=0,
    )
    found = coverage(fusion, "int8")
    assert found.int8_macs_pct == pytest.approx(90)
    assert [(part.nodes, part.macs) for part in found.islands] == [
        (("conv", "relu"), 80),
        (("fc",), 20),
    ]
    assert found.islands[1].reason == "a float bias"


def predictions(answers, labels, size: float = 2.0) -> Predictions:
    logits = np.zeros((len(answers), 3), np.float32)
    logits[np.arange(len(answers)), answers] = size
    return Predictions(logits, np.array(labels))


def test_calibration_of_equal_confidence_is_its_distance_from_the_accuracy():
    sure = float(np.exp(2) / (np.exp(2) + 2))
    judged = accuracy(predictions([0, 1, 2, 0], [0, 1, 2, 1]))
    found = calibration(judged, "int8", "onnxruntime")
    assert found.ece_pct == pytest.approx(100 * abs(sure - 0.75))
    assert found.confidence_pct == pytest.approx([100 * sure])
    assert found.accuracy_pct == (75.0,)
    assert found.images == (4,)


class Sixteen:
    """A dataset of sixteen test images whose first pixel is their index."""

    def __init__(self) -> None:
        self.splits = {"test": self}

    def take(self, indices):
        images = torch.zeros(len(indices), 1, 2, 2, dtype=torch.uint8)
        images[:, 0, 0, 0] = torch.as_tensor(np.asarray(indices), dtype=torch.uint8)
        return images

    def normalize(self, images):
        return images.float() / 255


def test_samples_are_flipped_images_first_and_others_spread_over_the_rest():
    before = predictions([0] * 16, [0] * 16)
    after = predictions([0] * 14 + [1, 1], [0] * 16)
    chosen = samples(Sixteen(), before, after, 8)
    assert list(chosen.indices[:2]) == [14, 15]
    assert len(set(chosen.indices)) == 8
    assert min(chosen.indices) == 0
    np.testing.assert_array_equal(chosen.pictures[:, 0, 0, 0], chosen.indices)
    assert chosen.images.shape == (8, 1, 2, 2)


def test_at_most_half_of_the_samples_are_flipped_ones():
    before, after = predictions([0] * 16, [0] * 16), predictions([1] * 16, [0] * 16)
    assert len(samples(Sixteen(), before, after, 6).indices) == 6
    same = samples(Sixteen(), before, before, 99)
    assert list(same.indices) == list(range(16))
