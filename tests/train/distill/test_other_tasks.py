"""Distillation of networks that do not tell one class an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_detectors
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.data import Dataset
from compress.data._images import MemoryImages
from compress.data._targets import Boxes
from compress.errors import TrainingError
from compress.models.cifar import unet
from compress.models.detector import detector
from compress.modules.outputs import logits_of
from compress.recipe.settings import DistillSettings
from compress.tasks import load_task
from compress.train import distill, train
from compress.train.distill.build import check_loss
from compress.train.losses import Taps
from compress.train.losses.cwd import Cwd
from compress.train.losses.kd import Kd
from compress.train.losses.mse import Mse

SIZE = (32, 48)


def pixels(count: int = 12) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, *SIZE), generator=draw, dtype=torch.uint8)


def dataset(labels: Any, target: str) -> Dataset:
    images = MemoryImages(pixels(), labels)
    splits = dict.fromkeys(("train", "validation", "calibration", "test"), images)
    return Dataset("made", ("a", "b"), (0.5,) * 3, (0.25,) * 3, splits, target=target)


def boxes() -> Dataset:
    box = np.array([[4, 4, 20, 20]], np.float32)
    of_all = Boxes((box,) * 12, (np.array([1]),) * 12, (np.array([False]),) * 12)
    return dataset(of_all, "boxes")


def masks() -> Dataset:
    return dataset(pixels()[:, 0].numpy() // 128, "mask")


def distilled(student: nn.Module, teacher: nn.Module, data: Dataset, name: str, **more: Any) -> Any:
    settings = DistillSettings(epochs=12, batch_size=6, lr=0.02, precision="fp32", **more)
    task = load_task(name, classes=("a", "b"))
    objective = distill.build_objective(student, teacher, data, settings, task=task)
    train(student, data, settings, objective=objective, task=task)
    return objective


def distance(student: nn.Module, teacher: nn.Module) -> float:
    images = pixels() / 64.0 - 2
    with torch.no_grad():
        a, b = (logits_of(each.eval()(images)) for each in (student, teacher))
    return float((a.softmax(1) - b.softmax(1)).abs().mean())


def test_a_segmentation_student_comes_nearer_to_its_teacher() -> None:
    torch.manual_seed(0)
    teacher, student = unet(2, 4), unet(2, 4)
    before = distance(student, teacher)
    objective = distilled(student, teacher, masks(), "segmentation", hard=0.0)
    assert [term.name for term in objective.terms] == ["kd", "cwd"]
    assert distance(student, teacher) < before / 2
    assert objective.teacher_value is not None


def test_a_detector_that_returns_its_losses_learns_features() -> None:
    torch.manual_seed(0)
    teacher, student = detector(2, 4), detector(2, 4)
    objective = distilled(student, teacher, boxes(), "detection", hard=0.0)
    assert [term.name for term in objective.terms] == ["cwd"]
    assert "fine (16x4x6) - fine (16x4x6)" in "; ".join(objective.pairing())
    hooks = [len(m._forward_hooks) for net in (teacher, student) for m in net.modules()]
    assert not any(hooks)


def test_features_of_regions_within_images_are_left_out() -> None:
    torch.manual_seed(0)
    teacher, student = tiny_detectors.fasterrcnn(2), tiny_detectors.fasterrcnn(2)
    objective = distilled(student, teacher, boxes(), "detection")  # it trains on other regions
    assert "backbone" in (pairs := "; ".join(objective.pairing()))
    assert "roi_heads" not in pairs


def test_losses_on_outputs_are_refused_where_there_are_none_in_training() -> None:
    with pytest.raises(TrainingError, match=r"loss 'mse': .* in training this network returns its"):
        distilled(detector(2, 4), detector(2, 4), boxes(), "detection", losses=("mse",))


@pytest.mark.parametrize(("name", "loss"), [("segmentation", "dkd"), ("restoration", "kd")])
def test_losses_on_classes_are_refused_for_other_outputs(name: str, loss: str) -> None:
    with pytest.raises(TrainingError, match=f"loss '{loss}': it compares the probabilities of one"):
        distilled(unet(2, 4), unet(2, 4), masks(), name, losses=(loss,))


def test_kd_of_maps_is_the_mean_over_pixels() -> None:
    a, b = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    found = Kd()(Taps(a), Taps(b), torch.zeros(2))
    each = [
        Kd()(Taps(a[:, :, y, x]), Taps(b[:, :, y, x]), torch.zeros(2))
        for y in range(3)
        for x in range(4)
    ]
    torch.testing.assert_close(found, torch.stack(each).mean())


def test_cwd_is_the_divergence_between_places() -> None:
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    loss = Cwd(temperature=2.0)
    loss.prepare(Taps(a, (a,)), Taps(b, (b,)), torch.zeros(0))
    nn.init.dirac_(loss.maps[0].weight)  # type: ignore[arg-type]
    nn.init.zeros_(loss.maps[0].bias)  # type: ignore[arg-type]
    found = loss(Taps(a, (a,)), Taps(b, (b,)), torch.zeros(2))
    p, q = ((each / 2).flatten(2).softmax(2) for each in (b, a))
    torch.testing.assert_close(found, 4 * (p * (p / q).log()).sum(2).mean())


def test_mse_of_the_best_constant_is_one() -> None:
    wanted = torch.randn(64, 7)
    constant = torch.full_like(wanted, float(wanted.mean()))
    assert float(Mse()(Taps(constant), Taps(wanted), torch.zeros(64))) == pytest.approx(1.0)
    assert float(Mse()(Taps(wanted), Taps(wanted), torch.zeros(64))) == 0
    assert F.mse_loss(constant, wanted) > 0


def test_the_losses_that_fit_a_task_are_named() -> None:
    for name, fits in (("segmentation", True), ("multilabel", False)):
        with pytest.raises(TrainingError) as caught:
            check_loss("dkd", load_task(name))
        assert ("kd" in str(caught.value).split("one of: ")[1].rstrip(".").split(", ")) is fits
