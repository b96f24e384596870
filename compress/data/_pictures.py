"""Options that all kinds of data read from picture files have in common."""

from __future__ import annotations

from dataclasses import dataclass

from compress.data._resize import Fit, ImageSize, Interpolation, Rule, sides

DEFAULT_SIZE = 224
ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures in files, fitted to one size while they are read.

    Options: ``image_size`` (side, or height and width; 224 if absent), ``channels`` (3, or 1 for
    grey), ``resize`` ("short side", "squash" or "letterbox"), ``interpolation``, ``crop`` (share
    of the resized picture that is kept) and ``workers`` (threads that decode).
    """

    image_size: ImageSize | None = None
    channels: int | None = None
    workers: int = 0
    resize: Rule | None = None
    interpolation: Interpolation | None = None
    crop: float | None = None

    @property
    def fit(self) -> Fit:
        """How pictures are fitted to the network's input."""
        return Fit(
            sides(self.image_size or DEFAULT_SIZE),
            self.resize or "short side",
            self.interpolation or "bilinear",
            self.crop,
        )
