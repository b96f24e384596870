"""A restored image for each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from compress.errors import DataError
from compress.graph.metadata import CHANNELS
from compress.modules.outputs import logits_of
from compress.tasks import (
    Form,
    Kind,
    OutputTask,
    Prediction,
    Target,
    channels_first,
    main_output,
    numeric,
)

AMPLIFIED = 8.0  # how much a difference is made visible
LARGEST_PSNR_DB = 100.0  # of two equal images, where the ratio is infinite


@dataclass(frozen=True)
class Restoration(OutputTask):
    """An image from an image (super-resolution, denoising, generators): PSNR and SSIM.

    Images are compared in [0, ``peak``], RGB, without cutting borders.
    """

    peak: float = 1.0
    criterion: Literal["l1", "l2"] = "l1"
    classes: Sequence[str] = ()

    kinds: ClassVar[Mapping[str, Kind]] = {
        "psnr": Kind("dB", title="PSNR"),
        "ssim": Kind("", title="SSIM"),
    }
    primary: ClassVar[str] = "psnr"
    agreement_unit: ClassVar[str] = "dB"
    legend: ClassVar[str] = f"The difference is {AMPLIFIED:g} times amplified: black is none."
    target: ClassVar[str] = "image"
    form: ClassVar[Form] = "image"

    def output_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean distance to the wanted images (B, C, H, W), a scalar."""
        output = logits_of(outputs).float()
        distance = F.l1_loss if self.criterion == "l1" else F.mse_loss
        return distance(output, targets.float())

    def predict(self, outputs: Mapping[str, Any]) -> list[Prediction]:
        """Return "image" (C, H, W) in [0, peak] for each image; outputs may be (B, H, W, C)."""
        images = main_output(outputs, 4, "image", "restoration")
        if images.shape[1] not in CHANNELS:
            images = channels_first(images, 3 if images.shape[3] == 3 else 1)
        return [{"image": np.clip(row, 0, self.peak).astype(np.float32)} for row in images]

    def score(self, prediction: Prediction, target: Target) -> dict[str, float]:
        """Return PSNR in dB and SSIM of one image."""
        from torchmetrics.functional.image import structural_similarity_index_measure

        found, wanted = prediction["image"], numeric(target).astype(np.float32)
        if found.shape != wanted.shape:
            raise DataError(
                f"the network returns an image of shape {found.shape} for a target of shape "
                f"{wanted.shape}",
                expected="equal shapes",
                fix="Check the scale factor of the network against that of the data",
            )
        pair = (torch.from_numpy(found)[None], torch.from_numpy(wanted)[None])
        ssim = structural_similarity_index_measure(*pair, data_range=self.peak)
        return {"psnr": self._psnr(found, wanted), "ssim": float(numeric(ssim))}

    def agreement(self, reference: Prediction, candidate: Prediction) -> float:
        """Return the PSNR between two images, dB; 100 where they are equal."""
        return self._psnr(candidate["image"], reference["image"])

    def draw(self, image: Any, prediction: Prediction) -> Any:
        """Return the restored image, (H, W, 3) uint8."""
        restored = np.round(255 * prediction["image"] / self.peak).astype(np.uint8)
        return np.broadcast_to(restored, (3, *restored.shape[1:])).transpose(1, 2, 0)

    def draw_change(self, image: Any, reference: Prediction, candidate: Prediction) -> Any:
        """Return the mean difference over channels, ``AMPLIFIED`` times, grey."""
        difference = np.abs(reference["image"] - candidate["image"]).mean(0) / self.peak
        grey = np.round(255 * np.clip(AMPLIFIED * difference, 0, 1)).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)

    def truth(self, target: Target) -> Prediction:
        """Return the wanted image."""
        return {"image": np.clip(numeric(target), 0, self.peak).astype(np.float32)}

    def _psnr(self, found: Any, wanted: Any) -> float:
        error = float(np.mean((found.astype(np.float64) - wanted) ** 2))
        least = self.peak**2 * 10 ** (-LARGEST_PSNR_DB / 10)
        return float(10 * np.log10(self.peak**2 / max(error, least)))
