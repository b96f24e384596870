"""Items of a user's data set: pictures of one size with their targets as labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.data import Source, usual
from compress.data._images import (
    TEST,
    Hash,
    Indices,
    LabelledImages,
    MemoryImages,
    Subset,
    held_out,
    in_memory,
    in_parallel,
    with_channels,
)
from compress.data._pictures import DEFAULT_SIZE, Fit, Pictures, sides
from compress.data._targets import VOID, PictureTargets, mask_classes
from compress.errors import DataError

SAMPLED = 8  # items whose pictures are looked at for a common size
PICTURE_KEYS = ("image", "img", "picture", "pixel_values", "jpg", "png")
Items = Any  # a torch Dataset, or what else has a length and items by number
TARGET_KEYS = ("label", "labels", "target", "fine_label", "mask", "cls", "class")


def picture_and_target(items: Items, index: int, where: str) -> tuple[Any, Any]:
    """Return picture and target of one item: a pair, or a dictionary with usual names."""
    try:
        item = items[index]
    except (Exception, SystemExit) as error:  # of the user's code
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


def picture(items: Items, index: int, where: str) -> Any:
    """Return the picture of an item: PIL's, or a tensor (C, H, W)."""
    found, _ = picture_and_target(items, index, where)
    if hasattr(found, "convert"):
        return found
    array = found if isinstance(found, Tensor) else np.asarray(found)
    if isinstance(array, np.ndarray) and array.dtype.kind in "buif":
        array = torch.from_numpy(np.ascontiguousarray(array))
    if not isinstance(array, Tensor) or array.is_complex():
        told = f"a picture that is {type(found).__name__}, not of real numbers"
    elif array.ndim == 2 and array.numel():
        return array[None]
    elif array.ndim == 3 and array.numel() and array.shape[0] in {1, 3}:
        return array
    elif array.ndim == 3 and array.numel() and array.shape[2] in {1, 3}:
        return array.permute(2, 0, 1)
    else:
        told = f"a picture of shape {tuple(array.shape)}"
    raise DataError(
        f"has {told}",
        where=f"{where}, item {index}",
        expected="PIL's, or (H, W), (H, W, C) or (C, H, W) with 1 or 3 channels",
    )


def shape_of(picture: Any) -> tuple[int, int, int]:
    """Return channels, height and width of what ``picture`` returned."""
    if isinstance(picture, Tensor):
        channels, height, width = picture.shape
        return channels, height, width
    return (1 if picture.mode in {"L", "1"} else 3), picture.height, picture.width


def eight_bit(pixels: Tensor, where: str) -> Tensor:
    """Return pixels 0..255 of uint8, or of floats in [0, 1], as uint8."""
    if pixels.dtype == torch.uint8:
        return pixels
    low, high = float(pixels.min()), float(pixels.max())  # NaN if any is
    if pixels.is_floating_point() and 0 <= low <= high <= 1:
        return pixels.mul(255).round().to(torch.uint8)
    if not np.isfinite([low, high]).all():
        raise DataError(
            "has pixels that are not finite numbers",
            where=where,
            expected="uint8, or floats in [0, 1]",
        )
    raise DataError(
        f"has pixels of {str(pixels.dtype).removeprefix('torch.')} from {low:g} to {high:g}",
        where=where,
        expected="uint8, or floats in [0, 1]: pictures before normalization",
        fix="Leave Normalize out of the data's transforms, and give data.mean and data.std",
    )


Parts = Mapping[str, Sequence[Any]]  # targets of each item, by place: "FILE:NAME, train"
Labels = tuple[tuple[str, ...], dict[str, Any], str]  # names of the classes, labels by place, form


def all_targets(items: Items, where: str) -> list[Any]:
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


def labels_of(targets: Parts, names: tuple[str, ...] | None, fit: Fit) -> Labels:
    """Return names of the classes, those that occur if None, labels by place, and their form.

    ``targets`` are what ``all_targets`` returned, by place; masks are fitted as the pictures are.
    """
    where, part = next(iter(targets.items()))
    first = part[0]
    if isinstance(first, str | int):
        return _classes(targets, names)
    array = np.asarray(first)
    if array.ndim == 1 and array.dtype != object:
        return _several(targets, names)
    if array.ndim == 2:
        return _masks(targets, names, fit)
    if array.ndim == 3:
        wanted = {name: PictureTargets(_wanted(each, name)) for name, each in targets.items()}
        return (), wanted, "image"
    raise DataError(
        f"has targets such as {first!r}"[:200],
        where=where,
        expected="a class, zeros and ones of several classes, a mask (H, W) or a picture",
        fix="Boxes are read by the kinds of data voc, coco and yolo",
    )


def _each(targets: Parts) -> Iterator[tuple[str, Any]]:
    for where, part in targets.items():
        for index, target in enumerate(part):
            yield f"{where}, item {index}", target


def _target(items: Items, index: int, where: str) -> Any:
    """Return the target of one item; a mask is of its picture's size."""
    target = _plain(picture_and_target(items, index, where)[1])
    if isinstance(target, np.ndarray) and target.ndim == 2:
        size = shape_of(picture(items, index, where))[1:]
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
    array = target.numpy() if isinstance(target, torch.Tensor) else target
    return array.item() if isinstance(array, np.ndarray | np.generic) and not array.ndim else array


def _classes(targets: Parts, names: tuple[str, ...] | None) -> Labels:
    seen = sorted({each for part in targets.values() for each in part})
    by_name = isinstance(seen[0], str)
    known = names or (tuple(seen) if by_name else tuple(map(str, range(int(seen[-1]) + 1))))
    number: Callable[[Any], int] = known.index if by_name else int
    for where, each in _each(targets):
        if each not in known if by_name else not 0 <= each < len(known):
            raise DataError(
                f"has the class {each!r}",
                where=where,
                expected=f"one of the {len(known)} classes {', '.join(known[:5])}",
            )
    labels = {name: np.array([number(each) for each in part]) for name, part in targets.items()}
    return known, labels, "class"


def _several(targets: Parts, names: tuple[str, ...] | None) -> Labels:
    for where, each in _each(targets):
        if not np.isin(each, (0, 1)).all():
            raise DataError(
                f"has the target {np.asarray(each).tolist()!r}"[:200],
                where=where,
                expected="0 or 1 for each class: whether it is in the picture",
            )
    hot = {name: np.stack(part).astype(np.int64) for name, part in targets.items()}
    count = next(iter(hot.values())).shape[1]
    return names or tuple(map(str, range(count))), hot, "classes"


def _masks(targets: Parts, names: tuple[str, ...] | None, fit: Fit) -> Labels:
    first: dict[int, str] = {}  # where each value occurs first
    classes = VOID if names is None else len(names)
    for where, mask in _each(targets):
        values = np.unique(mask)
        wrong = [each for each in values.tolist() if each not in (*range(classes), -1, VOID)]
        if wrong:
            raise DataError(
                f"has a mask with the values {', '.join(f'{each:g}' for each in wrong[:5])}",
                where=where,
                expected=f"classes 0 to {classes - 1}, or {VOID} (or -1) where nothing counts",
            )
        for value in values.tolist():
            first.setdefault(int(value), where)
    known = names or mask_classes({k: where for k, where in first.items() if 0 <= k < VOID})
    masks = {name: np.stack([_mask(fit, m) for m in part]) for name, part in targets.items()}
    return known, masks, "mask"


def _mask(fit: Fit, mask: Any) -> NDArray[np.uint8]:
    from PIL import Image

    values = np.asarray(mask)
    fitted = Image.fromarray(np.where(values == -1, VOID, values).astype(np.uint8))
    nearest = replace(fit, interpolation="nearest")
    return np.array(nearest.image(fitted, fill=VOID), dtype=np.uint8)


def _wanted(targets: Sequence[Any], where: str) -> LabelledImages:
    pixels = [
        eight_bit(torch.from_numpy(np.asarray(each)), f"{where}, target of item {index}")
        for index, each in enumerate(targets)
    ]
    stacked = torch.stack(pixels)
    if stacked.shape[1] not in {1, 3} and stacked.shape[3] in {1, 3}:
        stacked = stacked.permute(0, 3, 1, 2)
    return MemoryImages(stacked, np.zeros(len(stacked), np.int64))


@dataclass(frozen=True, kw_only=True)
class ItemPictures(Pictures):
    """Options of a kind of data made of items: those of pictures, names, what is held back.

    Args:
        classes: Their names, in order; the data's if absent.
        test: Share of the images that is held back to test on, where none are set apart.
        seed: Of what is held back.
    """

    root: str
    classes: tuple[str, ...] | None = None
    test: float = TEST
    seed: int = 0


@dataclass(frozen=True)
class ItemImages:
    """Images of a data set that are made anew each time they are asked for."""

    items: Items
    labels: Any
    reader: Reader

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.reader.channels, *self.reader.fit.size

    def __len__(self) -> int:
        return len(self.items)

    def take(self, indices: Indices) -> Tensor:
        return in_parallel(lambda i: self.reader.pixels(self.items, i), indices, 1)

    def update_hash(self, digest: Hash) -> None:
        digest.update(self.take(range(min(len(self), 64))).numpy().tobytes())
        digest.update(str(len(self)).encode())


@dataclass(frozen=True)
class Reader:
    """How a picture of an item becomes pixels of the network's input."""

    fit: Fit  # how pictures get the size of the input
    channels: int  # 1 or 3
    where: str  # the data set, for errors
    # That of every tensor, (C, H, W), where nobody asked for a size; None: any is fitted
    shape: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, kind: ItemPictures, items: Items, where: str) -> Reader:
        """Return the reader for ``items``, in their own size where they have one."""
        if not len(items):
            raise DataError("holds no items", where=where)
        first = [picture(items, i, where) for i in range(min(SAMPLED, len(items)))]
        shapes = {shape_of(each) for each in first}
        channels = kind.channels or (1 if all(shape[0] == 1 for shape in shapes) else 3)
        own = {shape[1:] for shape in shapes}
        fit = kind.fit
        if kind.image_size is None and len(own) == 1:
            fit = Fit(next(iter(own)), "squash")
        elif kind.image_size is not None and own == {sides(kind.image_size)}:
            fit = replace(fit, rule="squash", crop=None)
        elif kind.image_size is None:
            fit = replace(fit, size=(DEFAULT_SIZE, DEFAULT_SIZE))
        is_tensor = all(isinstance(each, Tensor) for each in first)
        free = len(shapes) > 1 or kind.image_size is not None or kind.channels is not None
        return cls(fit, channels, where, None if free or not is_tensor else next(iter(shapes)))

    def pixels(self, items: Items, index: int) -> Tensor:
        """Return the picture of one item, (C, H, W) uint8."""
        found = picture(items, index, self.where)
        if isinstance(found, Tensor) and self.shape not in (None, tuple(found.shape)):
            raise DataError(
                f"has a picture of shape {tuple(found.shape)}",
                where=f"{self.where}, item {index}",
                expected=f"{self.shape}, as the first items have",
                fix="Correct it, or set image_size and channels: pictures are fitted to them",
            )
        if not isinstance(found, Tensor):
            return self.fit.pixels(found.convert("L" if self.channels == 1 else "RGB"))
        fitted = self.fit.tensor(eight_bit(found, f"{self.where}, item {index}")[None])
        return with_channels(fitted, self.channels)[0]


def source_of_items(kind: ItemPictures, parts: Mapping[str, Items]) -> Source:
    """Return data sets by split as a Source; a part of train is the test set if there is none."""
    if "train" not in parts:
        raise DataError(
            f"has the splits {', '.join(parts) or 'none'}", where=kind.root, expected="train"
        )
    train = parts["train"]
    places = {name: f"{kind.root}, {name}" for name in parts}
    reader = Reader.of(kind, train, places["train"])
    _check_repeatable(train, reader)
    targets = {places[name]: all_targets(part, places[name]) for name, part in parts.items()}
    named = kind.classes or getattr(train, "classes", None)
    classes, labels, form = labels_of(targets, None if named is None else tuple(named), reader.fit)
    images = {
        name: in_memory(ItemImages(part, labels[places[name]], replace(reader, where=places[name])))
        for name, part in parts.items()
    }
    test = images.get("test", images.get("validation"))
    learned: LabelledImages = images["train"]
    if test is None:
        kept, drawn = held_out(labels[places["train"]], kind.test, kind.seed)
        learned, test = Subset(images["train"], kept), Subset(images["train"], drawn)
    return Source(
        learned,
        test,
        classes,
        *usual(reader.channels),
        validation=images.get("validation") if "test" in images else None,
        target=form,
    )


def _check_repeatable(items: Items, reader: Reader) -> None:
    last = len(items) - 1
    if not torch.equal(reader.pixels(items, last), reader.pixels(items, last)):
        raise DataError(
            f"item {last} returns a different picture each time it is read",
            where=reader.where,
            fix="Leave random transforms out of the data: a recipe's augment does that",
        )
