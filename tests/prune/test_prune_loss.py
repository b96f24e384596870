"""The loss of data-driven criteria: told from outputs and targets, or the caller's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compress
from compress import plugins
from compress.errors import CompressError, DataError, PlanError, UsageError
from compress.groups import trace
from compress.prune.loss import FittingLoss
from compress.prune.saliency import scores

DRAW = torch.Generator().manual_seed(5)
IMAGES = torch.randn(12, 3, 8, 8, generator=DRAW)
ROWS = torch.randn(12, 4, generator=DRAW)
MAPS = torch.randn(12, 4, 8, 8, generator=DRAW)
ONE = torch.randn(12, 1, generator=DRAW)
BITS = (torch.rand(12, 4, generator=DRAW) > 0.5).float()
CLASSES = torch.arange(12) % 4
PIXELS = torch.randint(0, 4, (12, 8, 8), generator=DRAW)


def binary(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target)


FITTING: dict[str, tuple[Tensor, Tensor, Tensor]] = {  # output, target, expected loss
    "classes": (ROWS, CLASSES, F.cross_entropy(ROWS, CLASSES)),
    "classes of 32 bits": (ROWS, CLASSES.int(), F.cross_entropy(ROWS, CLASSES)),
    "classes in a column": (ROWS, CLASSES[:, None], F.cross_entropy(ROWS, CLASSES)),
    "maps of classes": (MAPS, PIXELS, F.cross_entropy(MAPS, PIXELS)),
    "masks with a channel": (MAPS, PIXELS[:, None], F.cross_entropy(MAPS, PIXELS)),
    "ignored pixels": (
        MAPS,
        PIXELS.masked_fill(PIXELS == 3, 255),
        F.cross_entropy(MAPS, PIXELS, ignore_index=3),
    ),
    "maps smaller than the classes": (
        MAPS[:, :, ::4, ::2],
        PIXELS,
        F.cross_entropy(F.interpolate(MAPS[:, :, ::4, ::2], (8, 8), mode="bilinear"), PIXELS),
    ),
    "probabilities": (ROWS, ROWS.softmax(1), F.cross_entropy(ROWS, ROWS.softmax(1))),
    "one hot": (ROWS, F.one_hot(CLASSES, 4).float(), F.cross_entropy(ROWS, CLASSES)),
    "labels": (ROWS, BITS, binary(ROWS, BITS)),
    "labels as whole numbers": (ROWS, BITS.long(), binary(ROWS, BITS)),
    "labels as truth values": (ROWS, BITS.bool(), binary(ROWS, BITS)),
    "one label": (ONE, BITS[:, 0], binary(ONE, BITS[:, :1])),
    "one label as a class": (ONE, CLASSES % 2, binary(ONE[:, 0], (CLASSES % 2).float())),
    "mask": (MAPS[:, :1], (PIXELS > 1).float(), binary(MAPS[:, 0], (PIXELS > 1).float())),
    "values": (ROWS, ROWS * 3, F.mse_loss(ROWS, ROWS * 3)),
    "one value": (ONE, ONE[:, 0] * 9, F.mse_loss(ONE, ONE * 9)),
    "images": (MAPS, MAPS.sigmoid(), F.mse_loss(MAPS, MAPS.sigmoid())),
}


@pytest.mark.parametrize("name", FITTING)
def test_the_loss_is_told_from_outputs_and_targets(name: str) -> None:
    output, target, expected = FITTING[name]
    loss = FittingLoss()
    loss.see(target)
    torch.testing.assert_close(loss({"logits": output}, target), expected)
    half = loss(output[:6], target[:6]) + loss(output[6:], target[6:])
    if name != "ignored pixels":
        torch.testing.assert_close(half / 2, expected)


@pytest.mark.parametrize(
    ("output", "target", "message"),
    [
        (ONE, torch.rand(12, 1), "do not tell the loss.*loss="),
        (ROWS, torch.rand(12, 4) * 0.2, "do not tell the loss"),
        (ROWS, CLASSES + 1, "does not fit labels.*up to 4"),
        (ONE, CLASSES, "does not fit labels"),
        (MAPS, CLASSES, "does not fit labels"),
        (ROWS, torch.rand(12, 3), "does not fit targets"),
        (MAPS, torch.rand(12, 4, 16, 16), "does not fit targets"),
    ],
)
def test_targets_that_do_not_tell_are_refused(output: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        FittingLoss()(output, target)


def test_batches_of_two_kinds_are_refused() -> None:
    loss = FittingLoss()
    loss.see(BITS)
    loss(ROWS, BITS)
    loss.see(ROWS.softmax(1))
    with pytest.raises(DataError, match="binary cross-entropy, another for soft cross-entropy"):
        loss(ROWS, ROWS.softmax(1))


def net(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, outputs),
    ).eval()  # fmt: skip


def plan(model: nn.Module, target: Any, **options: Any) -> compress.PrunePlan:
    return compress.plan_pruning(
        model, IMAGES[:1], keep_macs=0.5, batches=[(IMAGES, target)], **options
    )


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_a_single_output_with_targets_below_one_has_no_loss_but_the_callers(criterion: str) -> None:
    targets = torch.rand(12, 1, generator=DRAW)
    with pytest.raises(DataError, match="do not tell the loss"):
        plan(net(1), targets, criterion=criterion)
    model = net(1)
    network = trace(model, IMAGES[:1])
    scorer = plugins.create("criteria", criterion)
    found = scores(model, network, scorer, [(IMAGES, targets)], F.mse_loss)
    assert all((row > 0).any() and len(set(row.tolist())) > 1 for row in found)
    assert plan(model, targets, criterion=criterion, loss=F.mse_loss).macs_after > 0


def test_the_callers_loss_is_given_what_the_network_returns() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net(4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": self.body(x), "twice": 2 * self.body(x)}

    seen = []

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        seen.append((sorted(outputs), tuple(targets.shape)))
        return F.cross_entropy(outputs["scores"], targets)

    own = plan(Both().eval(), CLASSES, criterion="taylor", loss=loss)
    assert own.groups.keys() == {"body.0", "body.2"}
    assert seen[0] == (["scores", "twice"], (8,))
    told = plan(Both().eval(), CLASSES, criterion="taylor")
    assert own.to_json()["groups"] == told.to_json()["groups"]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda o, t: o, r"loss returns of shape \(8, 4\)"),
        (lambda o, t: 1.0, "loss returns .*float"),
        (lambda o, t: o.detach().mean(), "without gradient"),
        (lambda o, t: o.mean() * float("nan"), "loss returns nan"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(net(4), CLASSES, criterion="taylor", loss=loss)


def test_a_loss_that_nobody_takes_is_refused() -> None:
    with pytest.raises(UsageError, match="'l2' takes no gradients"):
        plan(net(4), CLASSES, criterion="l2", loss=F.cross_entropy)


def test_equal_scores_are_refused() -> None:
    with pytest.raises(PlanError, match=r"'taylor' gives every channel the same score, 0.*loss="):
        plan(net(4), CLASSES, criterion="taylor", loss=lambda o, t: (o * 0).sum())
    model = net(4)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(CompressError, match="'l1' gives every channel the same score"):
        plan(model, CLASSES, criterion="l1")
