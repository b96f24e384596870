"""Images and a COCO annotation file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data import Source
from compress.data._annotated import Annotation, BoxedPictures
from compress.errors import DataError, absence, boundary

KEYS = "images (id, file_name), annotations (image_id, category_id, bbox), categories (id, name)"


@dataclass(frozen=True)
class Coco(BoxedPictures):
    """Images and a COCO annotation file: images, annotations and categories as JSON.

    ``images`` is the folder of the images; if absent they are beside the file, in a folder images
    there or one level up, or in ../PART of annotations/instances_PART.json. ``test`` and
    ``validation`` are further annotation files; without a test file a tenth of the images is held
    back. Crowds need not be found.

    Args:
        images: Folder of the images; looked for if absent.
        validation: Annotation file of the validation images.
        test: Annotation file of the test images; a tenth is held back if absent.
    """

    root: str
    images: str | None = None
    validation: str | None = None
    test: str | None = None

    def load(self) -> Source:
        """Return the images.

        Raises:
            DataError: a file is missing or damaged, or a box is invalid; the message names the
                file and the annotation's id.
        """
        file = Path(self.root)
        train, names = self._read(file)
        validation, test = (
            self._read(Path(other))[0] if other else [] for other in (self.validation, self.test)
        )
        return self.source(train, validation, test, names)

    def _read(self, file: Path) -> tuple[list[Annotation], list[str]]:
        content = _content(file)
        with boundary(DataError, "is no COCO annotation file", where=str(file), expected=KEYS):
            names = {int(each["id"]): str(each["name"]) for each in content["categories"]}
            found = {
                int(each["id"]): Annotation(self._image(file, str(each["file_name"])), str(file))
                for each in content["images"]
            }
            for each in content["annotations"]:
                self._add(found, names, each, file)
        return [found[key] for key in sorted(found)], [names[key] for key in sorted(names)]

    @staticmethod
    def _add(
        found: dict[int, Annotation], names: dict[int, str], each: dict[str, Any], file: Path
    ) -> None:
        place = f"annotation {each.get('id', '?')}"
        image = found.get(int(each["image_id"]))
        if image is None:
            raise DataError(f"no image has the id {each['image_id']}", where=f"{file}, {place}")
        x, y, width, height = (float(value) for value in each["bbox"])
        category = int(each["category_id"])
        image.boxes.append((x, y, x + width, y + height))
        image.names.append(names.get(category, str(category)))
        image.ignored.append(bool(each.get("iscrowd", 0)))
        image.lines.append(place)

    def _image(self, file: Path, name: str) -> Path:
        if self.images is not None:
            return Path(self.images) / name
        above, part = file.parent.parent, file.stem.rpartition("_")[2]
        folders = (file.parent, file.parent / "images", above / "images", above / part)
        found = (folder / name for folder in folders if (folder / name).is_file())
        return next(found, file.parent / name)


def _content(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise DataError(absence(file), where=str(file), expected="annotations as COCO has them")
    with boundary(DataError, "is no readable JSON", where=str(file)):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise DataError(f"holds {type(content).__name__}", where=str(file), expected="an object")
    return content
