"""Data from a Python file of the user's: a torch Dataset, or a function that returns one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress import plugins
from compress.data import Source
from compress.data._items import ItemPictures, Items, source_of_items
from compress.errors import DataError, UnknownNameError, UsageError

SPLITS = ("train", "validation", "test")
EXPECTED = "the data as a torch Dataset, or a function that returns one for each split"


@dataclass(frozen=True)
class Dataset(ItemPictures):
    """A torch Dataset of your own: path/file.py:NAME, as data or behind dataset:.

    NAME is a Dataset, a function of the split ("train", "validation" or "test"; None where there is
    none), a function with the argument ``train``, or one without that returns a Dataset, or a
    mapping of splits to them. ``arguments`` are further arguments of the function. Of one Dataset
    ``test`` is held back, by seed.

    An item is a picture (PIL, uint8 array or tensor, or floats in [0, 1]: before normalization,
    which ``data.mean`` and ``data.std`` are for) and its target: a class, a name, zeros and ones of
    several classes, a mask (H, W), or a picture to give back. Classes are called as the Dataset's
    ``classes`` say.

    Args:
        arguments: Further arguments of the function.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Source:
        """Return the images.

        Raises:
            UsageError: there is no such file or name in it, or it is no data.
            DataError: an item is not a picture with its target.
        """
        file, _, name = self.root.rpartition(":")
        module = plugins.import_file(Path(file), EXPECTED)
        found = getattr(module, name, None)
        if found is None:
            known = [key for key in vars(module) if not key.startswith("_")]
            raise UnknownNameError("data", name, known, where=file)
        if isinstance(found, type) and hasattr(found, "load"):  # a kind of data of their own
            source: Source = self._call(found).load()
            return source
        parts = {split: part for split, part in self._parts(found).items() if part is not None}
        return source_of_items(self, {name: self._sized(part) for name, part in parts.items()})

    def _parts(self, found: Any) -> dict[str, Any]:
        """Return what the user's function, or object, gives for each split."""
        if not callable(found) or isinstance(found, Mapping):
            return _split_up(found, self.root)
        parameters = inspect.signature(found).parameters
        required = [
            name for name, each in parameters.items()
            if each.default is each.empty and each.kind in {
                each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD
            } and name not in self.arguments
        ]  # fmt: skip
        if "split" in parameters or required[:1] not in ([], ["train"]):
            key = "split" if "split" in parameters else required[0]
            return {split: self._call(found, **{key: split}) for split in SPLITS}
        if "train" in parameters:
            return {"train": self._call(found, train=True), "test": self._call(found, train=False)}
        return _split_up(self._call(found), self.root)

    def _call(self, function: Callable[..., Any], **given: Any) -> Any:
        try:
            return function(**self.arguments, **given)
        except Exception as error:
            told = ", ".join(f"{key}={value!r}" for key, value in given.items())
            raise UsageError(
                f"calling it with ({told}) fails: {error!r}", where=self.root
            ) from error

    def _sized(self, part: Any) -> Items:
        """Return ``part``, a Dataset, or that of a DataLoader."""
        part = part.dataset if hasattr(part, "batch_sampler") else part
        if not hasattr(part, "__len__") or not hasattr(part, "__getitem__"):
            raise DataError(
                f"gives a {type(part).__name__}",
                where=self.root,
                expected="a Dataset with a length and items by number",
            )
        return part


def _split_up(found: Any, where: str) -> dict[str, Any]:
    if isinstance(found, Mapping):
        unknown = sorted(set(map(str, found)) - {*SPLITS, "val"})
        if unknown or "train" not in found:
            raise DataError(
                f"has the splits {', '.join(map(str, found))}",
                where=where,
                expected="train, and validation, test or both",
            )
        return {("validation" if key == "val" else str(key)): part for key, part in found.items()}
    if isinstance(found, tuple | list) and len(found) in {2, 3}:
        names = ("train", "test") if len(found) == 2 else SPLITS
        return dict(zip(names, found, strict=True))
    return {"train": found}
