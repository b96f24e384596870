"""ImageNet-1k as a folder of images."""

from __future__ import annotations

from dataclasses import dataclass

from compress.data.imagefolder import Imagefolder


@dataclass(frozen=True)
class Imagenet(Imagefolder):
    """ImageNet-1k: train/WNID/*.JPEG and val/WNID/*.JPEG.

    Classes are the sorted WordNet ids, which is the order of the outputs of torchvision's networks.

    Source: Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015.
    """
