"""The loss that gradients are taken of: the caller's, one that fits the targets, or of own answers.

The gradients of the last are samples of the Fisher information of a network's outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.errors import DataError, PlanError, UsageError
from compress.modules.outputs import chosen_outputs, logits_of, named_tensors

Loss = Callable[[Any, Any], Tensor]  # of what the network returns, and the targets
Answers = Literal["auto", "classes", "numbers"]
Kind = Literal["cross-entropy", "soft cross-entropy", "binary cross-entropy", "squared error"]
LEAST_VARIANCE = 1e-8  # as a share of its mean square; a channel below it is constant
_IGNORED = 255  # the label of pixels that belong to no class, as in Pascal VOC and Cityscapes
_FIX = "Pass loss=, a function of outputs and targets, or use a criterion without labels (fisher)"


class FittingLoss:
    """The loss that the first batch asks for, of all batches.

    Whole numbers are classes (B,) or maps of classes (B, H, W): cross-entropy, of logits resized to
    the map, as many segmentation networks end at a part of its size. Numbers of the output's shape
    are probabilities over the classes where they add up to one (cross-entropy),
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
    value, expected = loss(output, target), "a scalar tensor computed from the network's outputs"
    if not isinstance(value, Tensor):
        raise UsageError(f"loss returns {type(value)}", expected=expected)
    if value.numel() != 1 or not value.requires_grad:
        without = "" if value.requires_grad else ", without gradient"
        raise UsageError(f"loss returns of shape {tuple(value.shape)}{without}", expected=expected)
    if not torch.isfinite(value):
        raise UsageError(f"loss returns {float(value)}", fix="Check the loss, weights and targets")
    return value.reshape(())


def _kind(logits: Tensor, target: Tensor) -> Kind:
    classes = logits.shape[1] if logits.ndim > 1 else 1
    low, high = float(target.min()), float(target.max())
    # Alike but for the batch, which may be a part, and sizes of one.
    alike = [n for n in target.shape[1:] if n != 1] == [n for n in logits.shape[1:] if n != 1]
    if not target.is_floating_point():
        if alike and low >= 0 and high <= 1:
            return "binary cross-entropy"
        used = target[target != _IGNORED]
        fits = not used.numel() or int(used.max()) < classes
        shape, size = _without_channel(target).shape[1:], logits.shape[2:]
        are_maps = len(shape) == len(size) == 2 and min(size) > 1
        if classes > 1 and fits and (shape == size or are_maps):
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
    if classes > 1 and low >= 0:
        sums = target.float().sum(1)
        if torch.isclose(sums, torch.ones_like(sums), atol=1e-3).all():
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


def _without_channel(labels: Tensor) -> Tensor:
    """Return (B, 1) labels or (B, 1, H, W) maps of them as (B,) or (B, H, W)."""
    return labels[:, 0] if labels.ndim in (2, 4) and labels.shape[1] == 1 else labels


def _computed(kind: Kind, logits: Tensor, target: Tensor) -> Tensor:
    if kind == "cross-entropy":
        labels = _without_channel(target).long()
        if labels.shape[1:] != logits.shape[2:]:
            logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear")
        ignored = _IGNORED if logits.shape[1] <= _IGNORED else -100
        return F.cross_entropy(logits, torch.where(labels == ignored, -100, labels))
    target = target.reshape(logits.shape).to(logits.dtype)
    if kind == "soft cross-entropy":
        return F.cross_entropy(logits, target)
    if kind == "binary cross-entropy":
        return F.binary_cross_entropy_with_logits(logits, target)
    return F.mse_loss(logits, target)


@dataclass
class SampledAnswers:
    """The negative log-likelihood of answers drawn from the network's own; no labels are used.

    Classes are drawn from softened logits. Other outputs are taken as means of Gaussians whose
    variance is that of the output over the batch, channel by channel for maps: the gradient of a
    random projection of them is a sample of the Gauss-Newton matrix, and several outputs add up.

    Args:
        kind: "classes" (the main output holds logits), "numbers", or "auto": classes where the
            main output is (B, K) or (B, K, H, W), K at least 2, and no more are named.
        outputs: Places of the outputs that count; all, or the main one of classes, if None.
        temperature: Divides the logits.
        seed: Of the draws.
    """

    kind: Answers = "auto"
    outputs: tuple[str, ...] | None = None
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Start drawing."""
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, output: Any, _target: Any) -> Tensor:
        """Return a scalar whose gradients are one sample.

        Raises:
            DataError: the outputs are not of this kind.
            PlanError: they are not finite.
        """
        found = [
            tensor
            for _, tensor in chosen_outputs(named_tensors(output), self.outputs)
            if tensor.is_floating_point() and tensor.requires_grad and tensor.numel()
        ]
        if not found:
            raise DataError(
                "no output of the network depends on its weights",
                expected="floating-point outputs",
                fix="Name others in outputs, or use a criterion without gradients: l2, activation",
            )
        main, kind = found[0], self.kind
        is_alone = len(found) == 1 or self.outputs is None
        are_logits = is_alone and main.ndim in (2, 4) and main.shape[1] > 1
        if kind == "classes" or (kind == "auto" and are_logits):
            return self._of_classes(logits_of(main))
        return torch.stack([self._projected(each) for each in found]).sum()

    def _of_classes(self, logits: Tensor) -> Tensor:
        if logits.ndim < 2 or logits.shape[1] < 2:
            raise DataError(
                f"the network's output {tuple(logits.shape)} holds no logits of classes",
                expected="logits (B, K) or (B, K, H, W), K at least 2",
            )
        rows = logits.movedim(1, -1).flatten(0, -2) / self.temperature  # (positions, K)
        # Drawn on the CPU, so that the same seed draws alike on every device.
        chances = _finite(rows.detach().float().softmax(1).cpu())
        drawn = torch.multinomial(chances, 1, generator=self.generator)[:, 0]
        return F.cross_entropy(rows, drawn.to(rows.device))

    def _projected(self, output: Tensor) -> Tensor:
        """Return the output times random signs, a scalar: its mean square is 1 per image."""
        values = _finite(output.detach().float())
        over = [dim for dim in range(values.ndim) if dim != 1 or values.ndim < 3]
        variance = values.var(over, keepdim=True, correction=0) if values.numel() > 1 else None
        weights = torch.ones_like(values)
        if variance is not None:  # of each channel: scores up to 1 may stand beside boxes in pixels
            alive = variance > LEAST_VARIANCE * values.square().mean(over, keepdim=True)
            if alive.any():
                weights = torch.where(alive, variance.clamp_min(1e-30).rsqrt(), 0.0) * weights
        signs = torch.randint(0, 2, tuple(values.shape), generator=self.generator) * 2.0 - 1.0
        each_image = max(1, values[0].numel()) if values.ndim else 1
        scale = len(values) * each_image**0.5 if values.ndim else 1.0
        return (output * (weights * signs.to(weights)).to(output.dtype)).sum() / scale


AS_SEEN = SampledAnswers()


def _finite(values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise PlanError(
            "the network returns numbers that are not finite",
            fix="Check the weights and the images for NaN or infinity",
        )
    return values
