"""What is told of predictions, by numpy alone: bundles take this file along.

It runs from Python 3.8 on, and imports nothing of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from compress.data._plain_pictures import PicturePlacement

CONFIDENT = 0.3  # boxes below it are not told, nor do they count for agreement
NEAREST = 5  # images that are told of each
UNSEEN = -1  # in a class map: pixels of the picture that the network was not shown


def classes_told(chances: Any, present: Any, name_of: Callable[[int], str]) -> list[dict[str, Any]]:
    """Return the classes that are present, at least one, the likeliest first; (K,) of each."""
    order = np.argsort(-chances, kind="stable")[: max(1, int(present.sum()))]
    return [
        {"class": name_of(int(k)), "probability": float(chances[k]), "present": bool(present[k])}
        for k in order
    ]


def sized(class_map: Any, shape: Sequence[int]) -> Any:
    """Return a class map at another size, by the nearest pixel."""
    if class_map.shape == tuple(shape):
        return class_map
    rows, columns = (
        np.minimum((np.arange(want) + 0.5) * have / want, have - 1).astype(np.int64)
        for want, have in zip(shape, class_map.shape)  # noqa: B905 - 3.8
    )
    return class_map[rows[:, None], columns]


def map_in_picture(
    class_map: Any, size: Sequence[int], place: PicturePlacement, shape: Sequence[int]
) -> Any:
    """Return the class of each pixel of a picture; UNSEEN where the network's input was cropped.

    The picture has ``shape``, height and width, and lies at ``place`` in an input of ``size``.
    """
    whole = sized(class_map, size)
    rows, columns = (
        np.floor((np.arange(length) + 0.5) * scale + first).astype(np.int64)
        for length, scale, first in zip(shape, place.scale, (place.top, place.left))  # noqa: B905
    )
    seen = [(rows >= 0) & (rows < size[0]), (columns >= 0) & (columns < size[1])]
    found = np.full(shape, UNSEEN, np.int32)
    found[np.ix_(*seen)] = whole[np.ix_(rows[seen[0]], columns[seen[1]])]
    return found


def map_told(class_map: Any, name_of: Callable[[int], str]) -> list[dict[str, Any]]:
    """Return the classes of a map with their share of the pixels, the largest first."""
    found, pixels = np.unique(class_map[class_map != UNSEEN], return_counts=True)
    return [
        {"class": name_of(int(found[k])), "pixels_pct": 100 * float(pixels[k] / pixels.sum())}
        for k in np.argsort(-pixels, kind="stable")
    ]


def best_boxes(boxes: Any, scores: Any, labels: Any, least: float, most: int) -> dict[str, Any]:
    """Return at most so many boxes of a score above ``least``, best first."""
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > least][:most]
    return {
        "boxes": boxes[order].astype(np.float32).reshape(-1, 4),
        "scores": scores[order].astype(np.float32),
        "labels": labels[order].astype(np.int64),
    }


def boxes_in_picture(boxes: Any, place: PicturePlacement, shape: Sequence[int]) -> Any:
    """Return boxes in the network's input as boxes in the picture, ``shape`` high and wide."""
    moved = boxes - (place.left, place.top) * 2
    back = moved / ((place.scale[1], place.scale[0]) * 2)
    return np.clip(back, 0, (shape[1], shape[0]) * 2)


def confident(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """Return the boxes of a score of 0.3 or more; those without an area overlap nothing."""
    has_area = (prediction["boxes"][:, 2:] > prediction["boxes"][:, :2]).all(1)
    kept = has_area & (prediction["scores"] >= CONFIDENT)
    return {name: value[kept] for name, value in prediction.items()}


def boxes_told(
    prediction: Mapping[str, Any], name_of: Callable[[int], str]
) -> list[dict[str, Any]]:
    """Return class, score and corners of each box."""
    columns = (prediction[name] for name in ("labels", "scores", "boxes"))
    return [
        {
            "class": name_of(int(k)),
            "score": float(score),
            **dict(zip(("x1", "y1", "x2", "y2"), map(float, box))),  # noqa: B905 - 3.8
        }
        for k, score, box in zip(*columns)  # noqa: B905 - 3.8
    ]


def nearest_told(vectors: Any, images: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Return the nearest five of the other images of each, by the cosine of vectors (N, D)."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, : min(NEAREST, len(images) - 1)]
    return [
        [{"nearest": images[other], "cosine": float(cosines[row, other])} for other in others]
        for row, others in enumerate(order)
    ]


def arrays_told(arrays: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return shape and range of each array, (nothing,) of an empty one."""
    found = {name: np.asarray(value) for name, value in arrays.items()}
    return [
        {
            "output": name,
            "shape": "x".join(map(str, each.shape)) or "a number",
            "lowest": float(each.min()) if each.size else None,
            "mean": float(each.mean()) if each.size else None,
            "highest": float(each.max()) if each.size else None,
        }
        for name, each in found.items()
    ]
