"""Images and text files as Ultralytics' YOLO is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compress.data import Source
from compress.data._annotated import Annotation, BoxedPictures
from compress.data._images import files_below
from compress.data._pictures import ENDINGS
from compress.errors import DataError, absence, boundary


@dataclass(frozen=True)
class Yolo(BoxedPictures):
    """Images and text files as Ultralytics' YOLO is trained on, found by a data.yaml.

    The file has ``names`` and the folders (or lists of files) ``train``, ``val`` and ``test``, from
    ``path`` on. The boxes of images/NAME.jpg are in labels/NAME.txt: class number, centre and size
    as shares of the image, one object a line; an image without such a file has none.
    """

    root: str

    def load(self) -> Source:
        """Return the images.

        Raises:
            DataError: a file is missing or damaged, or a box is invalid; the message names file
                and line.
        """
        file = Path(self.root)
        if not file.is_file():
            raise DataError(absence(file), where=str(file), expected="a data.yaml of YOLO")
        with boundary(DataError, "is no readable YAML", where=str(file)):
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not {"names", "train"} <= content.keys():
            raise DataError("lacks names or train", where=str(file), expected="a data.yaml of YOLO")
        given = content["names"]
        names = [str(given[k]) for k in sorted(given)] if isinstance(given, dict) else list(given)
        base = file.parent / Path(str(content.get("path") or "."))
        train, validation, test = (
            [_annotation(image, names) for image in _files(base, content.get(part), file)]
            for part in ("train", "val", "test")
        )
        return self.source(train, validation, test, names=names)


def _files(base: Path, given: Any, where: Path) -> list[Path]:
    """Return the images of a folder, of a list of files, or of several of them."""
    if not given:
        return []
    if isinstance(given, list):
        return [file for each in given for file in _files(base, each, where)]
    place = base / str(given)
    if place.is_dir():
        return sorted(map(Path, files_below(place, ENDINGS)))
    if place.is_file():
        lines = place.read_text(encoding="utf-8").split("\n")
        return [place.parent / line.strip() for line in lines if line.strip()]
    raise DataError(
        absence(place, "file or folder"),
        where=str(place),
        expected="a folder or a list of images",
        fix=f"Correct {where}",
    )


def _annotation(image: Path, names: list[str]) -> Annotation:
    parts = list(image.parts)
    at = len(parts) - 1 - parts[::-1].index("images") if "images" in parts else None
    if at is not None:
        parts[at] = "labels"
    file = Path(*parts).with_suffix(".txt")
    found = Annotation(image, str(file), relative=True)
    with boundary(DataError, "is no readable text", where=str(file)):
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            label, x, y, width, height = (float(value) for value in line.split())
            k = int(label)
        except (ValueError, OverflowError):
            raise DataError(
                f"{line!r} is no object",
                where=f"{file}, line {number}",
                expected="five numbers: class, centre x, centre y, width, height",
            ) from None
        found.boxes.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
        found.names.append(names[k] if 0 <= k < len(names) and k == label else f"{label:g}")
        found.ignored.append(False)
        found.lines.append(f"line {number}")
    return found
