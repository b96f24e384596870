"""Data of Hugging Face's ``datasets``, saved to disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.data import Source
from compress.data._items import ItemPictures, source_of_items
from compress.errors import DataError, UsageError, absence, boundary
from compress.packages import require


@dataclass(frozen=True)
class Huggingface(ItemPictures):
    """A data set of Hugging Face's ``datasets``, as its save_to_disk left it on disk.

    ``image`` and ``label`` name its columns; if absent, the column of pictures, and the column of
    class labels, or one called label. A set without a test or validation split has ``test`` held
    back, by seed.

    Args:
        image: Column of the pictures.
        label: Column of the labels.
    """

    image: str | None = None
    label: str | None = None

    def load(self) -> Source:
        """Return the images.

        Raises:
            DataError: the folder holds no saved data set, or no pictures with labels.
            MissingPackageError: ``datasets`` is not installed.
        """
        hub = require("datasets", extra="huggingface", purpose="data 'huggingface'")
        if not Path(self.root).is_dir():
            raise DataError(
                absence(self.root, "folder"), where=self.root, expected="what save_to_disk wrote"
            )
        with boundary(DataError, "is no saved data set", where=self.root):
            found = hub.load_from_disk(self.root)
        parts = dict(found) if isinstance(found, dict) else {"train": found}
        image, label, names = self._columns(next(iter(parts.values())).features)
        chosen = self if names is None or self.classes else replace(self, classes=names)
        split = {"valid": "validation", "val": "validation", "dev": "validation"}
        return source_of_items(
            chosen,
            {split.get(name, name): _Rows(part, image, label) for name, part in parts.items()},
        )

    def _columns(self, features: Any) -> tuple[str, str, tuple[str, ...] | None]:
        kinds = {name: type(each).__name__ for name, each in features.items()}
        image = self.image or next((name for name, kind in kinds.items() if kind == "Image"), None)
        labelled = [name for name, kind in kinds.items() if kind == "ClassLabel"]
        usual = [name for name in ("label", "labels", "class") if name in kinds]
        label = self.label or next(iter([*labelled, *usual]), None)
        for what, column in (("image", image), ("label", label)):
            if column not in kinds:
                raise UsageError(
                    f"no column {column!r} of {what}s" if column else f"no column of {what}s",
                    where=self.root,
                    expected=f"one of: {', '.join(kinds)}",
                    fix=f"Say it: data: {{huggingface: {{root: {self.root}, {what}: COLUMN}}}}",
                )
        names = getattr(features[label], "names", None)
        return str(image), str(label), None if names is None else tuple(names)


@dataclass(frozen=True)
class _Rows:
    """Rows of a table as pairs of picture and label."""

    table: Any
    image: str
    label: str

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self.table[int(index)]
        return row[self.image], row[self.label]

    @property
    def targets(self) -> list[Any]:
        """Every label, without decoding a picture."""
        return list(self.table[self.label])
