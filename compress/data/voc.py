"""Folders laid out like Pascal VOC."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from compress.data import Source
from compress.data._annotated import Annotation, BoxedPictures, read_list
from compress.data.masks import masked_source
from compress.errors import DataError, absence, boundary

ENDINGS = (".jpg", ".jpeg", ".png")
LAYOUT = "ImageSets/Main/train.txt beside Annotations and JPEGImages"


@dataclass(frozen=True)
class Voc(BoxedPictures):
    """Folders laid out like Pascal VOC: Annotations, JPEGImages, ImageSets/Main.

    ``labels`` says what is read: "boxes" (detection), "classes" (which classes are in an image) or
    "masks" (SegmentationClass, with the lists of ImageSets/Segmentation). The lists train, val and
    test are the splits; objects marked difficult need not be found. The images of ``split``
    (train, or trainval) are trained on.

    Args:
        split: List of the images that are trained on: train or trainval.
        labels: What is read: boxes, classes (which are in an image) or masks.
    """

    root: str
    split: str = "train"

    known_labels: ClassVar[tuple[str, ...]] = ("boxes", "classes", "masks")

    def load(self) -> Source:
        """Return the images.

        Raises:
            DataError: a folder, list, image or annotation is missing or damaged, or a box is
                invalid; the message names file and line.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(absence(root, "folder"), where=str(root), expected=LAYOUT)
        lists = root / "ImageSets" / ("Segmentation" if self.labels == "masks" else "Main")
        if not (lists / f"{self.split}.txt").is_file():
            raise DataError(
                f"has no list of images for {self.split!r}",
                where=str(lists / f"{self.split}.txt"),
                expected=LAYOUT,
            )
        if self.labels == "masks":
            parts = [
                [(each.image, root / "SegmentationClass" / f"{each.image.stem}.png") for each in
                 read_list(lists / f"{name}.txt", lambda stem: Annotation(_image(root, stem), ""))]
                for name in (self.split, "val", "test")
            ]  # fmt: skip
            return masked_source(self, *parts, classes=self.classes)
        train, validation, test = (
            read_list(lists / f"{name}.txt", lambda stem: _annotation(root, stem))
            for name in (self.split, "val", "test")
        )
        if self.split == "trainval":
            validation = []
        return self.source(train, validation, test)


def _image(root: Path, stem: str) -> Path:
    files = (root / "JPEGImages" / f"{stem}{ending}" for ending in ENDINGS)
    return next((file for file in files if file.is_file()), root / "JPEGImages" / f"{stem}.jpg")


def _annotation(root: Path, stem: str) -> Annotation:
    file = root / "Annotations" / f"{stem}.xml"
    with boundary(DataError, "is not a readable annotation", where=str(file)):
        text = file.read_text(encoding="utf-8")
        tree = ElementTree.fromstring(text)
    starts = [text.count("\n", 0, m.start()) + 1 for m in re.finditer(r"<object\b", text)]
    found = Annotation(_image(root, stem), str(file))
    for line, each in zip(starts, tree.iter("object"), strict=True):
        box = each.find("bndbox")
        corners = [box.findtext(key) if box is not None else None for key in _CORNERS]
        try:
            x1, y1, x2, y2 = (float(str(value)) for value in corners)
        except ValueError:
            raise DataError(
                f"the object has the corners {corners}",
                where=f"{file}, line {line}",
                expected=f"numbers {', '.join(_CORNERS)} in bndbox",
            ) from None
        found.boxes.append((x1, y1, x2, y2))
        found.names.append((each.findtext("name") or "").strip())
        found.ignored.append((each.findtext("difficult") or "0").strip() == "1")
        found.lines.append(f"line {line}")
    return found


_CORNERS = ("xmin", "ymin", "xmax", "ymax")
