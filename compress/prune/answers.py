"""Fisher information of a network's outputs: losses whose gradients are samples of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.errors import DataError, PlanError
from compress.modules.outputs import chosen_outputs, logits_of, named_tensors

Answers = Literal["auto", "classes", "numbers"]
LEAST_VARIANCE = 1e-8  # as a share of its mean square; a channel below it is constant


@dataclass(frozen=True)
class Reading:
    """What of a network's outputs counts, and what it is.

    Args:
        kind: "classes" (the main output holds logits), "numbers", or "auto": classes where the
            main output is (B, K) or (B, K, H, W), K at least 2, and no more are named.
        outputs: Places of the outputs that count; all, or the main one of classes, if None.
    """

    kind: Answers = "auto"
    outputs: tuple[str, ...] | None = None


AS_SEEN = Reading()


class SampledAnswers:
    """The negative log-likelihood of answers drawn from the network's own; no labels are used.

    Classes are drawn from softened logits. Other outputs are taken as means of Gaussians whose
    variance is that of the output over the batch, channel by channel for maps: the gradient of a
    random projection of them is a sample of the Gauss-Newton matrix, and several outputs add up.

    Args:
        reading: Which outputs count, and what they are.
        temperature: Divides the logits.
        seed: Of the draws.
    """

    def __init__(self, reading: Reading, temperature: float, seed: int) -> None:
        self.reading, self.temperature = reading, temperature
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, output: Any, _target: Any) -> Tensor:
        """Return a scalar whose gradients are one sample.

        Raises:
            DataError: the outputs are not of this kind.
            PlanError: they are not finite.
        """
        found = [
            tensor
            for _, tensor in chosen_outputs(named_tensors(output), self.reading.outputs)
            if tensor.is_floating_point() and tensor.requires_grad and tensor.numel()
        ]
        if not found:
            raise DataError(
                "no output of the network depends on its weights",
                expected="floating-point outputs",
                fix="Name others in outputs, or use a criterion without gradients: l2, activation",
            )
        if self._are_classes(found):
            return self._of_classes(logits_of(found[0]))
        return torch.stack([self._projected(each) for each in found]).sum()

    def _are_classes(self, found: Sequence[Tensor]) -> bool:
        main = found[0]
        if self.reading.kind != "auto":
            return self.reading.kind == "classes"
        is_alone = len(found) == 1 or self.reading.outputs is None
        return is_alone and main.ndim in (2, 4) and main.shape[1] > 1

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


def _finite(values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise PlanError(
            "the network returns numbers that are not finite",
            fix="Check the weights and the images for NaN or infinity",
        )
    return values
