"""The loss that gradients are taken of: the caller's, or the one that fits outputs and targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.errors import DataError, UsageError
from compress.modules.outputs import logits_of

Loss = Callable[[Any, Any], Tensor]  # of what the network returns, and the targets
Kind = Literal["cross-entropy", "soft cross-entropy", "binary cross-entropy", "squared error"]
_IGNORED = 255  # the label of pixels that belong to no class, as in Pascal VOC and Cityscapes
_FIX = "Pass loss=, a function of outputs and targets, or use a criterion without labels (fisher)"


class FittingLoss:
    """The loss that the first batch asks for, of all batches.

    Whole numbers are classes (B,) or maps of classes (B, H, W): cross-entropy. Numbers of the
    output's shape are probabilities over the classes where they add up to one (cross-entropy),
    independent labels where all are 0 or 1 (binary cross-entropy of logits), and values to predict
    (squared error) where they leave [0, 1] or are maps. Others could be two of these: they are
    refused.
    """

    def __init__(self) -> None:
        self.kind: Kind | None = None
        self._whole: Tensor | None = None

    def see(self, target: Any) -> None:
        """Look at the targets of a whole batch before parts of it are computed.

        Raises:
            DataError: there are none, or they are no tensor.
        """
        if not isinstance(target, Tensor):
            raise DataError(
                "the batches hold images without targets"
                if target is None
                else f"the targets of a batch are a {type(target).__name__}",
                where="batches",
                expected="(images, targets), with one tensor of targets",
                fix=_FIX,
            )
        self._whole = target

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        """Return the mean loss, a scalar.

        Raises:
            DataError: output and targets do not go together, or ask for no loss in particular.
        """
        logits = logits_of(output)
        whole = target if self._whole is None else self._whole
        kind = _kind(logits, whole)
        if self.kind not in (None, kind):
            raise DataError(
                f"one batch has targets for {self.kind}, another for {kind}",
                expected="the same kind of targets in all batches",
                fix=_FIX,
            )
        self.kind = kind
        return _computed(kind, logits, target)


def checked(loss: Loss, output: Any, target: Any) -> Tensor:
    """Return the value of the caller's ``loss``.

    Raises:
        UsageError: it is no scalar that depends on the network, or not finite.
    """
    value = loss(output, target)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        kind = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value)
        raise UsageError(
            f"loss returns {kind}, without gradient"
            if isinstance(value, Tensor) and not value.requires_grad
            else f"loss returns {kind}",
            expected="a scalar tensor computed from the network's outputs",
        )
    if not torch.isfinite(value):
        raise UsageError(f"loss returns {float(value)}", fix="Check the loss, weights and targets")
    return value.reshape(())


def _kind(logits: Tensor, target: Tensor) -> Kind:
    classes = logits.shape[1] if logits.ndim > 1 else 1
    low, high = float(target.min()), float(target.max())
    alike = target.shape[1:].numel() == logits.shape[1:].numel() and _tails(target, logits)
    if not target.is_floating_point():
        if alike and low >= 0 and high <= 1:
            return "binary cross-entropy"
        used = target[target != _IGNORED]
        fits = not used.numel() or int(used.max()) < classes
        if classes > 1 and fits and _without_one(target) == (*logits.shape[2:],):
            return "cross-entropy"
        raise DataError(
            f"the network's output {tuple(logits.shape)} does not fit labels "
            f"{tuple(target.shape)} up to {int(high)}",
            expected="logits (B, K) and labels (B,), or maps (B, K, H, W) and (B, H, W), below K",
            fix=_FIX,
        )
    if not alike:
        raise DataError(
            f"the network's output {tuple(logits.shape)} does not fit targets "
            f"{tuple(target.shape)}",
            expected="targets of the output's shape, or whole numbers for classes",
            fix=_FIX,
        )
    if classes > 1 and low >= 0 and _adds_up(target):
        return "soft cross-entropy"
    if bool(((target == 0) | (target == 1)).all()):
        return "binary cross-entropy"
    if low < 0 or high > 1 or logits.ndim > 2:
        return "squared error"
    raise DataError(
        f"targets {tuple(target.shape)} between 0 and 1 may be probabilities of labels or values "
        "to predict: they do not tell the loss",
        expected="classes, 0 and 1, rows that add up to 1, or values beyond [0, 1]",
        fix=_FIX,
    )


def _computed(kind: Kind, logits: Tensor, target: Tensor) -> Tensor:
    if kind == "cross-entropy":
        shape = (len(logits), *logits.shape[2:])
        labels = target.reshape(shape).long()
        ignored = _IGNORED if logits.shape[1] <= _IGNORED else -100
        return F.cross_entropy(logits, torch.where(labels == ignored, -100, labels))
    target = target.reshape(logits.shape).to(logits.dtype)
    if kind == "soft cross-entropy":
        return F.cross_entropy(logits, target)
    if kind == "binary cross-entropy":
        return F.binary_cross_entropy_with_logits(logits, target)
    return F.mse_loss(logits, target)


def _tails(target: Tensor, logits: Tensor) -> bool:
    """Say whether the shapes agree but for the batch, which may be a part, and sizes of one."""
    ours = [n for n in logits.shape[1:] if n != 1]
    return [n for n in target.shape[1:] if n != 1] == ours


def _without_one(target: Tensor) -> tuple[int, ...]:
    """Return the shape of one image's labels, without a channel of size one: (B, 1, H, W)."""
    shape = tuple(target.shape[1:])
    return shape[1:] if len(shape) in (1, 3) and shape[0] == 1 else shape


def _adds_up(target: Tensor) -> bool:
    sums = target.float().sum(1)
    return bool(torch.isclose(sums, torch.ones_like(sums), atol=1e-3).all())
