"""Pruning and distillation inside somebody else's training loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import compress
from compress.errors import TrainingError, UsageError
from compress.groups.proof import prove
from compress.models.cifar import resnet8, unet
from compress.models.detector import detector

EXAMPLE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def images(count: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_prune_cuts_fits_and_leaves_the_network_alone() -> None:
    torch.manual_seed(0)
    model = resnet8(4, width=8).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small, plan = compress.prune(model, EXAMPLE, batches=[images()], keep_macs=0.5)
    assert plan.macs_after <= 0.5 * plan.macs_before
    assert prove(model, plan, EXAMPLE) < 1e-4
    cut = compress.apply_pruning(model, plan)
    with torch.no_grad():
        wanted = model(images())
        fitted, plain = ((net.eval()(images()) - wanted).norm() for net in (small, cut))
    assert fitted < plain
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_prune_needs_no_images() -> None:
    small, plan = compress.prune(resnet8(4, width=8), EXAMPLE, keep_params=0.6)
    assert plan.about["criterion"] == {"l2": plan.about["criterion"]["l2"]}
    assert small(EXAMPLE).shape == (1, 4)
    with pytest.raises(UsageError, match="training_batches without batches"):
        compress.prune(resnet8(4), EXAMPLE, keep_params=0.6, training_batches=[images()])


def test_prune_and_evaluate_are_modules_as_well_as_functions() -> None:
    from compress import evaluate, prune

    assert prune.plan_pruning is compress.plan_pruning and callable(prune) and callable(evaluate)
    assert compress.prune is prune and compress.evaluate is evaluate


def test_a_plain_loop_is_pulled_to_the_teacher() -> None:
    torch.manual_seed(0)
    teacher, student = resnet8(4, width=8).eval(), resnet8(4, width=4)
    losses = [{"kd": {"weight": 0.5}}, {"mgd": {"layers": "auto"}}]
    with compress.distiller(student, teacher, losses, example=EXAMPLE) as told:
        parameters = [*student.parameters(), *told.parameters()]
        assert len(parameters) > len(list(student.parameters()))
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        values = []
        for _ in range(20):
            student.train()
            loss = told.loss(images())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(float(loss.detach()))
    assert values[-1] < values[0] / 2
    assert not hooks(student) and not hooks(teacher) and not teacher.training


def test_the_forward_pass_of_the_trainer_is_used_again() -> None:
    teacher, student = unet(2, 4).eval(), unet(2, 4).train()
    calls: list[int] = []
    handle = student.register_forward_hook(lambda *_: calls.append(1))
    with compress.distiller(student, teacher, ["cwd"]) as told:
        with pytest.raises(UsageError, match="call loss\\(images\\) once before"):
            list(told.parameters())
        told.loss(images(4))  # runs it by itself, and looks for layers before
        calls.clear()
        own = student(images(4)).mean()
        (own + told.loss(images(4))).backward()
        assert len(calls) == 1
        told.loss(images(4))  # what was seen is used once
        assert len(calls) == 2
    handle.remove()
    assert hooks(student) == 0


def test_outputs_are_asked_for_where_the_trainer_only_saw_losses() -> None:
    student = detector(2, 4).train()
    pictures = torch.randn(2, 3, 32, 32)
    target = [{"boxes": torch.tensor([[4.0, 4, 20, 20]]), "labels": torch.tensor([1])}] * 2
    with compress.distiller(student, detector(2, 4), ["mse", "cwd"], example=pictures) as told:
        sum(student(pictures, target).values())  # its losses
        assert told.loss(pictures).requires_grad


class OnlyLosses(nn.Module):
    """A network that returns a scalar in training, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = unet(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits in eval mode, their mean in training."""
        logits = self.inner(x)
        return logits.mean() if self.training else logits


def test_losses_on_outputs_need_outputs() -> None:
    told = compress.distiller(OnlyLosses().train(), OnlyLosses().eval(), ["mse"], EXAMPLE)
    with told, pytest.raises(TrainingError, match=r"in training this network returns its losses"):
        told.loss(images(2))
