"""Items of a user's data set as images of one size with their labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.data import IMAGENET_MEAN, IMAGENET_STD, Source
from compress.data._held_out import held_out
from compress.data._images import Hash, Images, Indices, MemoryImages, Subset, in_parallel
from compress.data._pictures import DEFAULT_SIZE
from compress.data._resize import Fit, ImageSize, sides
from compress.data._targets import VOID, PictureTargets
from compress.errors import DataError

LARGEST_IN_MEMORY_BYTES = 1 << 30
SAMPLED = 8  # items whose pictures are looked at for a common size
PICTURE_KEYS = ("image", "img", "picture", "pixel_values", "jpg", "png")
TARGET_KEYS = ("label", "labels", "target", "fine_label", "mask", "cls", "class")


class Items(Protocol):
    """What a torch Dataset offers, whatever it is made of."""

    def __len__(self) -> int:
        """Return how many items there are."""
        ...

    def __getitem__(self, index: int) -> Any:
        """Return the item of that number."""
        ...


class Held(Protocol):
    """Options of a kind of data made of items: those of pictures, names, what is held back."""

    @property
    def root(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...] | None: ...
    @property
    def test(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def image_size(self) -> ImageSize | None: ...
    @property
    def channels(self) -> int | None: ...
    @property
    def fit(self) -> Fit: ...


@dataclass(frozen=True)
class ItemImages:
    """Images of a data set that are made anew each time they are asked for."""

    items: Items
    labels: Any
    reader: Reader

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        return self.reader.channels, *self.reader.fit.size

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.items)

    def take(self, indices: Indices) -> Tensor:
        """Return the images at ``indices``, (B, C, H, W) uint8."""
        return in_parallel(lambda i: self.reader.pixels(self.items, i), indices, 1)

    def update_hash(self, digest: Hash) -> None:
        """Add the first images and the number of all to ``digest``."""
        digest.update(self.take(range(min(len(self), 64))).numpy().tobytes())
        digest.update(str(len(self)).encode())


@dataclass(frozen=True)
class Reader:
    """How a picture of an item becomes pixels of the network's input."""

    fit: Fit
    channels: int
    where: str

    @classmethod
    def of(cls, kind: Held, items: Items, where: str) -> Reader:
        """Return the reader for ``items``, in their own size where they have one."""
        if not len(items):
            raise DataError("holds no items", where=where)
        first = [_picture(items, i, where) for i in range(min(SAMPLED, len(items)))]
        shapes = {_shape(each) for each in first}
        channels = kind.channels or (1 if all(shape[0] == 1 for shape in shapes) else 3)
        own = {shape[1:] for shape in shapes}
        fit = kind.fit
        if kind.image_size is None and len(own) == 1:
            fit = Fit(next(iter(own)), "squash")
        elif kind.image_size is not None and own == {sides(kind.image_size)}:
            fit = replace(fit, rule="squash", crop=None)
        elif kind.image_size is None:
            fit = replace(fit, size=(DEFAULT_SIZE, DEFAULT_SIZE))
        return cls(fit, channels, where)

    def pixels(self, items: Items, index: int) -> Tensor:
        """Return the picture of one item, (C, H, W) uint8."""
        picture = _picture(items, index, self.where)
        if not isinstance(picture, Tensor):
            return self.fit.pixels(picture.convert("L" if self.channels == 1 else "RGB"))
        fitted = self.fit.tensor(_uint8(picture, f"{self.where}, item {index}")[None])[0]
        if fitted.shape[0] == self.channels:
            return fitted
        if fitted.shape[0] == 1:
            return fitted.expand(self.channels, -1, -1).contiguous()
        luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        return (fitted * luma).sum(0, keepdim=True).round().to(torch.uint8)


def source_of(kind: Held, parts: Mapping[str, Items]) -> Source:
    """Return data sets by split as a Source; a part of train is the test set if there is none.

    Raises:
        DataError: an item is not a picture with its target, or changes when asked for again.
    """
    train = parts["train"] if "train" in parts else next(iter(parts.values()))
    reader = Reader.of(kind, train, kind.root)
    _check_repeatable(train, reader)
    targets = {name: _targets(part, f"{kind.root}, {name}") for name, part in parts.items()}
    classes, labels, form = _labels(
        targets, kind.classes or getattr(train, "classes", None), reader
    )
    images = {name: _images(part, labels[name], reader) for name, part in parts.items()}
    test = images.get("test", images.get("validation"))
    learned: Images = images["train"]
    if test is None:
        kept, drawn = held_out(labels["train"], kind.test, kind.seed)
        learned, test = Subset(images["train"], kept), Subset(images["train"], drawn)
    is_grey = reader.channels == 1
    return Source(
        learned,
        test,
        classes,
        (0.5,) if is_grey else IMAGENET_MEAN,
        (0.5,) if is_grey else IMAGENET_STD,
        validation=images.get("validation") if "test" in images else None,
        target=form,
    )


def _images(items: Items, labels: Any, reader: Reader) -> Images:
    images = ItemImages(items, labels, reader)
    if len(images) * int(np.prod(images.shape)) > LARGEST_IN_MEMORY_BYTES:
        return images
    return MemoryImages(images.take(range(len(images))), labels)


def _check_repeatable(items: Items, reader: Reader) -> None:
    last = len(items) - 1
    if not torch.equal(reader.pixels(items, last), reader.pixels(items, last)):
        raise DataError(
            f"item {last} returns a different picture each time it is read",
            where=reader.where,
            fix="Leave random transforms out of the data: a recipe's augment does that",
        )


def _pair(items: Items, index: int, where: str) -> tuple[Any, Any]:
    """Return picture and target of one item: a pair, or a dictionary with usual names."""
    try:
        item = items[index]
    except Exception as error:  # of the user's code
        raise DataError(f"raises {error!r}", where=f"{where}, item {index}") from error
    if isinstance(item, Mapping):
        picture = next((item[key] for key in PICTURE_KEYS if key in item), None)
        target = next((item[key] for key in TARGET_KEYS if key in item), None)
        if picture is not None and target is not None:
            return picture, target
        told = f"a dictionary with the keys {', '.join(map(str, item))}"
    elif isinstance(item, Sequence) and len(item) >= 2:
        return item[0], item[1]
    else:
        told = f"a {type(item).__name__}"
    raise DataError(
        f"is {told}", where=f"{where}, item {index}", expected="a picture and its target"
    )


def _picture(items: Items, index: int, where: str) -> Any:
    """Return the picture of an item: PIL's, or a tensor (C, H, W)."""
    picture, _ = _pair(items, index, where)
    if hasattr(picture, "convert"):
        return picture
    tensor = torch.as_tensor(np.asarray(picture)) if not isinstance(picture, Tensor) else picture
    if tensor.ndim == 2:
        return tensor[None]
    if tensor.ndim == 3 and tensor.shape[0] in {1, 3}:
        return tensor
    if tensor.ndim == 3 and tensor.shape[2] in {1, 3}:
        return tensor.permute(2, 0, 1)
    raise DataError(
        f"has a picture of shape {tuple(tensor.shape)}",
        where=f"{where}, item {index}",
        expected="(H, W), (H, W, C) or (C, H, W) with 1 or 3 channels",
    )


def _shape(picture: Any) -> tuple[int, int, int]:
    if isinstance(picture, Tensor):
        channels, height, width = picture.shape
        return channels, height, width
    return (1 if picture.mode in {"L", "1"} else 3), picture.height, picture.width


def _uint8(pixels: Tensor, where: str) -> Tensor:
    """Return pixels 0..255 of uint8, or of floats in [0, 1]."""
    if pixels.dtype == torch.uint8:
        return pixels
    low, high = float(pixels.min()), float(pixels.max())
    if not pixels.is_floating_point() or low < 0 or high > 1:
        raise DataError(
            f"has pixels of {str(pixels.dtype).removeprefix('torch.')} from {low:g} to {high:g}",
            where=where,
            expected="uint8, or floats in [0, 1]: pictures before normalization",
            fix="Leave Normalize out of the data's transforms, and give data.mean and data.std",
        )
    return pixels.mul(255).round().to(torch.uint8)


def _targets(items: Items, where: str) -> list[Any]:
    """Return every target; a list that the data set keeps saves reading all pictures."""
    kept = getattr(items, "targets", None)
    if kept is not None and len(kept) == len(items):
        found = [_plain(each) for each in kept]
    else:
        found = [_target(items, i, where) for i in range(len(items))]
    forms = [_form(each) for each in found]
    for index, form in enumerate(forms):
        if form != forms[0]:
            raise DataError(
                f"has {form} as its target",
                where=f"{where}, item {index}",
                expected=f"{forms[0]}, as item 0 has",
            )
    return found


def _target(items: Items, index: int, where: str) -> Any:
    """Return the target of one item; a mask is of its picture's size."""
    target = _plain(_pair(items, index, where)[1])
    if isinstance(target, np.ndarray) and target.ndim == 2:
        size = _shape(_picture(items, index, where))[1:]
        if target.shape != size:
            raise DataError(
                f"has a mask of {target.shape[0]} x {target.shape[1]} pixels and a picture of "
                f"{size[0]} x {size[1]}",
                where=f"{where}, item {index}",
                expected="a mask of its picture's size",
            )
    return target


def _form(target: Any) -> str:
    """Return what all targets of a data set have in common, in words."""
    if isinstance(target, str):
        return "a name"
    array = np.asarray(target)
    if array.ndim == 0:
        return f"one {type(target).__name__}"
    if array.ndim == 2:
        return "a mask"
    return f"an array of shape {array.shape}"


def _plain(target: Any) -> Any:
    """Return a target as a number, a text or an array."""
    if hasattr(target, "convert"):  # a mask as a picture
        return np.array(target)
    array = target.numpy() if isinstance(target, Tensor) else target
    return array.item() if isinstance(array, np.ndarray | np.generic) and not array.ndim else array


def _labels(
    targets: Mapping[str, list[Any]], given: Any, reader: Reader
) -> tuple[tuple[str, ...], dict[str, Any], str]:
    """Return the names of the classes, the labels of each split, and their form."""
    first = next(iter(targets.values()))[0]
    names = None if given is None else tuple(map(str, given))
    if isinstance(first, str | int):
        return _classes(targets, names, reader.where)
    array = np.asarray(first)
    if array.ndim == 1 and array.dtype != object:
        hot = {name: np.stack(each).astype(np.int64) for name, each in targets.items()}
        count = array.shape[0]
        return names or tuple(map(str, range(count))), hot, "classes"
    if array.ndim == 2:
        nearest = replace(reader.fit, interpolation="nearest")
        masks = {
            name: np.stack([_mask(nearest, m) for m in each]) for name, each in targets.items()
        }
        largest = max(int(each[each != 255].max(initial=0)) for each in masks.values())
        if names is not None and largest >= len(names):
            _refuse_values(targets, len(names), reader.where)
        return names or tuple(map(str, range(largest + 1))), masks, "mask"
    if array.ndim == 3:
        wanted = {
            name: PictureTargets(_wanted(each, f"{reader.where}, {name}"))
            for name, each in targets.items()
        }
        return (), wanted, "image"
    raise DataError(
        f"has targets such as {first!r}"[:200],
        where=reader.where,
        expected="a class, zeros and ones of several classes, a mask (H, W) or a picture",
        fix="Boxes are read by the kinds of data voc, coco and yolo",
    )


def _wanted(targets: Sequence[Any], where: str) -> Images:
    """Return pictures that a network is to give back."""
    stacked = torch.from_numpy(np.stack(targets))
    if stacked.shape[1] not in {1, 3} and stacked.shape[3] in {1, 3}:
        stacked = stacked.permute(0, 3, 1, 2)
    return MemoryImages(_uint8(stacked, where), np.zeros(len(stacked), np.int64))


def _refuse_values(targets: Mapping[str, list[Any]], classes: int, where: str) -> None:
    """Raise DataError for the first mask with a value that is no class."""
    for name, part in targets.items():
        for index, mask in enumerate(part):
            wrong = [int(v) for v in np.unique(mask) if v >= classes and v != VOID]
            if wrong:
                raise DataError(
                    f"has a mask with the values {', '.join(map(str, wrong))}",
                    where=f"{where}, {name}, item {index}",
                    expected=f"classes 0 to {classes - 1}, or {VOID} where nothing counts",
                )


def _classes(
    targets: Mapping[str, list[Any]], names: tuple[str, ...] | None, where: str
) -> tuple[tuple[str, ...], dict[str, NDArray[Any]], str]:
    seen = sorted({each for part in targets.values() for each in part})
    by_name = isinstance(seen[0], str)
    known = names or (tuple(seen) if by_name else tuple(map(str, range(int(seen[-1]) + 1))))
    number: Callable[[Any], int] = known.index if by_name else int
    wrong = [
        each for each in seen if (each not in known if by_name else not 0 <= each < len(known))
    ]
    if wrong:
        raise DataError(
            f"has the class {wrong[0]!r}",
            where=where,
            expected=f"one of the {len(known)} classes {', '.join(known[:5])}",
        )
    labels = {name: np.array([number(each) for each in part]) for name, part in targets.items()}
    return known, labels, "class"


def _mask(fit: Fit, mask: Any) -> NDArray[np.uint8]:
    from PIL import Image

    picture = Image.fromarray(np.asarray(mask).astype(np.uint8))
    return np.array(fit.image(picture, fill=255), dtype=np.uint8)
