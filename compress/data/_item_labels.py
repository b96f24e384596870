"""Targets of a user's data set as labels: classes, several classes, masks, pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from compress.data._images import LabelledImages, MemoryImages
from compress.data._item import Items, eight_bit, picture, picture_and_target, shape_of
from compress.data._resize import Fit
from compress.data._targets import VOID, PictureTargets, mask_classes
from compress.errors import DataError

Parts = Mapping[str, Sequence[Any]]  # targets of each item, by place: "FILE:NAME, train"
Labels = tuple[tuple[str, ...], dict[str, Any], str]  # names of the classes, labels by place, form


def all_targets(items: Items, where: str) -> list[Any]:
    """Return every target; a list that the data set keeps saves reading all pictures.

    Raises:
        DataError: an item cannot be read, or its target is of another form than the first one's.
    """
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
    """Return names of the classes, labels by place, and their form.

    Args:
        targets: What ``all_targets`` returned, by place.
        names: Of the classes; those that occur if None.
        fit: How the pictures are fitted; masks are fitted alike.

    Raises:
        DataError: a target is of no known form or holds a value that has no meaning; the message
            names the item.
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
        return (
            (),
            {name: PictureTargets(_wanted(each, name)) for name, each in targets.items()},
            "image",
        )
    raise DataError(
        f"has targets such as {first!r}"[:200],
        where=where,
        expected="a class, zeros and ones of several classes, a mask (H, W) or a picture",
        fix="Boxes are read by the kinds of data voc, coco and yolo",
    )


def _each(targets: Parts) -> Iterator[tuple[str, Any]]:
    """Yield where each target is from, and the target."""
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
    """Return pictures that a network is to give back."""
    pixels = [
        eight_bit(torch.from_numpy(np.asarray(each)), f"{where}, target of item {index}")
        for index, each in enumerate(targets)
    ]
    stacked = torch.stack(pixels)
    if stacked.shape[1] not in {1, 3} and stacked.shape[3] in {1, 3}:
        stacked = stacked.permute(0, 3, 1, 2)
    return MemoryImages(stacked, np.zeros(len(stacked), np.int64))
