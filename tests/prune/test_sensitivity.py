"""Sensitivity finds the group that matters, and its result is a budget and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import PlanError, UsageError
from compress.prune.sensitivity import PruneSensitivity, plot_sensitivity, prune_sensitivity

EXAMPLE = torch.zeros(1, 3, 8, 8)


class TwoBranches(nn.Module):
    """``vital`` decides the answer, ``idle`` is multiplied by nearly nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.vital = nn.Conv2d(3, 8, 3)
        self.idle = nn.Conv2d(3, 8, 3)
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        important = self.left(self.vital(x).tanh()).std((2, 3))
        return important + 1e-6 * self.right(torch.relu(self.idle(x))).mean((2, 3))


@pytest.fixture(scope="module")
def found() -> PruneSensitivity:
    torch.manual_seed(0)
    model = TwoBranches().eval()
    images = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        labels = model(images).argmax(1)

    def evaluate(candidate: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((candidate(images).argmax(1) == labels).float().mean())

    return prune_sensitivity(model, EXAMPLE, evaluate, shares=(0.5, 0.25))


def test_the_group_that_matters_loses_accuracy(found: PruneSensitivity) -> None:
    curves = {curve.group: curve for curve in found.curves}
    assert found.baseline == 100
    assert [point.kept for point in curves["vital"].points] == [4, 2]
    assert min(point.value for point in curves["vital"].points) < 90
    assert all(point.value == 100 for point in curves["idle"].points)
    least = min(found.curves, key=lambda curve: min(point.value for point in curve.points))
    assert least.group == "vital"
    assert curves["idle"].layers == ("idle",)


def test_macs_left_are_those_of_the_cut_network(found: PruneSensitivity) -> None:
    model = TwoBranches()
    for curve in found.curves:
        for point in curve.points:
            plan = compress.plan_pruning(
                model, EXAMPLE, keep_channels={curve.group: point.keep_channels}
            )
            assert point.macs_share == pytest.approx(plan.macs_after / plan.macs_before, abs=1e-6)


def test_it_is_a_budget(found: PruneSensitivity) -> None:
    shares = found.keep_channels(max_drop=1.0)
    assert shares == {"vital": 1.0, "idle": 0.25}
    plan = compress.plan_pruning(TwoBranches(), EXAMPLE, keep_channels=shares)
    assert {name: len(units) for name, units in plan.groups.items() if len(units) < 8} == {
        "idle": 2
    }


def test_it_survives_json(found: PruneSensitivity) -> None:
    assert PruneSensitivity.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture_is_written(found: PruneSensitivity, tmp_path: Path, suffix: str) -> None:
    path = plot_sensitivity(found, tmp_path / f"picture{suffix}")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") or b"<svg" in content
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_bad_input_is_refused() -> None:
    with pytest.raises(UsageError, match=r"shares holds 1\.5"):
        prune_sensitivity(TwoBranches(), EXAMPLE, lambda _: 0.0, shares=(1.5,))
    with pytest.raises(PlanError, match="this is no sensitivity to pruning"):
        PruneSensitivity.from_json({"curves": [{}]})
