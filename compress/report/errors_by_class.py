"""Errors by class for display: classes, confusions, flipped images and subgroups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compress.report import numbers
from compress.report.pictures import png
from compress.report.schema import ClassScores, Confusion, Details, Report
from compress.report.tables import Cell, Column, Table

GRID_CLASSES = 20  # a confusion matrix of more classes is drawn as a picture
MANY_CLASSES = 100  # of more, the table of classes is about the last variant only
PAIRS = 10  # confusions listed
PICTURE_SIDE = 250  # pixels of a drawn confusion matrix, at most
INK = (11, 102, 195)  # the accent colour, in light and dark alike


def flipped(report: Report) -> int:
    """Return how many images were right before and are wrong now; not all of them are recorded."""
    flips = report.details.flips
    told = {(flip.variant, flip.runtime) for flip in flips}
    name, runtime = next(iter(told)) if len(told) == 1 else (None, None)
    variant = report.variant(name or "")
    for result in variant.results if variant else ():
        if result.runtime == runtime and result.flip_pct is not None and result.images:
            return max(len(flips), round(result.flip_pct * result.images / 100))
    return len(flips)


def class_tables(details: Details) -> list[Table]:
    """Return precision, recall and F1 of each class, the original beside each other variant."""
    if len(details.class_scores) < 2:
        return [_class_table(details, scores) for scores in details.class_scores]
    before, *others = details.class_scores
    chosen = others if len(details.classes) <= MANY_CLASSES else others[-1:]
    return [_class_table(details, before, after) for after in chosen]


def class_metric_table(details: Details) -> Table | None:
    """Return the metric of each class for each variant, the largest loss of the last one first."""
    if not details.class_metrics:
        return None
    first, last = details.class_metrics[0], details.class_metrics[-1]
    columns = [Column("Class", is_number=False), Column("Change", "points")]
    columns += [Column(each.variant, f"{each.metric}, %") for each in details.class_metrics]
    rows = []
    for k, name in enumerate(first.classes):
        change = _change(first.values[k], last.values[k])
        cells = [Cell.of(each.values[k], "percent", each.ci95[k]) for each in details.class_metrics]
        rows.append((Cell(name), Cell.of(change, "points"), *cells))
    rows.sort(key=lambda row: (row[1].sort is None, row[1].sort or 0.0))
    title = f"{first.metric} of each class, {last.variant} against {first.variant}"
    return Table("class-metrics", title, tuple(columns), tuple(rows))


_SCORES = {"Precision": "precision_pct", "Recall": "recall_pct", "F1": "f1_pct"}


def _class_table(details: Details, *forms: ClassScores) -> Table:
    """Return the scores of one variant, or of two side by side, the largest loss first."""
    whens = (" before", " after") if len(forms) > 1 else ("",)
    columns = [Column("Class", is_number=False), Column("Images")]
    columns += [Column("Recall change", "points")] if len(forms) > 1 else []
    columns += [Column(f"{name}{when}", "%") for name in _SCORES for when in whens]
    rows = []
    for position, images in enumerate(forms[-1].images):
        scores = [getattr(each, field)[position] for field in _SCORES.values() for each in forms]
        row = [Cell(class_name(details, position)), Cell(f"{images:,}", images)]
        if len(forms) > 1:
            change = _change(scores[2], scores[3])
            row.append(Cell.of(change, "points"))
        rows.append((*row, *(Cell.of(score, "percent") for score in scores)))
    if len(forms) > 1:
        rows.sort(key=lambda row: (row[2].sort is None, row[2].sort or 0.0))
    title = " and ".join(each.variant for each in forms)
    return Table(f"classes-{forms[-1].variant}", title, tuple(columns), tuple(rows))


def _change(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def class_name(details: Details, position: int) -> str:
    """Return the name of a class, or its number where there is none."""
    known = 0 <= position < len(details.classes)
    return details.classes[position] if known else str(position)


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix for display: rows of (count, share of its row), or a picture."""

    title: str
    rows: tuple[tuple[tuple[int, float], ...], ...]
    picture: str | None


def matrix(details: Details, confusion: Confusion) -> Matrix:
    """Return a confusion matrix as numbers, or as a picture if the classes are many."""
    rows, columns, counts = np.array(confusion.cells, dtype=np.int64).reshape(-1, 3).T
    size = max(len(details.classes), int(max(rows.max(initial=0), columns.max(initial=0))) + 1)
    totals = np.bincount(rows, weights=counts, minlength=size)
    shares = counts / np.maximum(totals[rows], 1)
    title = " on ".join(part for part in (confusion.variant, confusion.runtime) if part)
    if size > GRID_CLASSES:
        return Matrix(title, (), _picture(rows, columns, shares, size))
    grid = [[(0, 0.0)] * size for _ in range(size)]
    for row, column, count, share in zip(rows, columns, counts, shares, strict=True):
        grid[row][column] = (int(count), round(float(share), 3))
    return Matrix(title, tuple(map(tuple, grid)), None)


def _picture(
    rows: NDArray[np.int64], columns: NDArray[np.int64], shares: NDArray[np.float64], size: int
) -> str:
    """Draw cells as a picture in which each pixel is the largest share it stands for."""
    step = -(-size // PICTURE_SIDE)
    pooled = np.zeros((-(-size // step),) * 2)
    np.maximum.at(pooled, (rows // step, columns // step), shares)
    image = np.zeros((*pooled.shape, 4), dtype=np.uint8)
    image[..., :3] = INK
    image[..., 3] = np.round(255 * np.sqrt(np.clip(pooled, 0, 1)))
    picture = Image.fromarray(image)
    zoom = max(1, PICTURE_SIDE // len(pooled))
    return png(picture.resize((zoom * len(pooled),) * 2, Image.Resampling.NEAREST))


def grown_confusions(details: Details) -> Table | None:
    """Return the pairs of classes confused more often by the last variant than by the original."""
    if len(details.confusions) < 2:
        return None
    before, after = (
        {(a, b): n for a, b, n in confusion.cells if a != b}
        for confusion in (details.confusions[0], details.confusions[-1])
    )
    grown = sorted(after, key=lambda pair: (before.get(pair, 0) - after[pair], pair))
    rows = tuple(
        (
            Cell(class_name(details, pair[0])),
            Cell(class_name(details, pair[1])),
            Cell(str(old := before.get(pair, 0)), old),
            Cell(str(after[pair]), after[pair]),
            Cell(f"+{after[pair] - old}", after[pair] - old),
        )
        for pair in grown[:PAIRS]
        if after[pair] > before.get(pair, 0)
    )
    columns = (
        Column("Is", is_number=False),
        Column("Taken for", is_number=False),
        Column("Before", "images"),
        Column("After", "images"),
        Column("Change", "images"),
    )
    return Table("confused", "Confused more often than before", columns, rows) if rows else None


def subgroup_table(details: Details) -> Table | None:
    """Return top-1 of each subgroup for each variant that was measured on it."""
    if not details.subgroups:
        return None
    variants = list(dict.fromkeys(row.variant for row in details.subgroups))
    found = {(row.column, row.value, row.variant): row for row in details.subgroups}
    keys = list(dict.fromkeys((row.column, row.value) for row in details.subgroups))
    columns = (
        Column("Column", is_number=False),
        Column("Value", is_number=False),
        Column("Images"),
        *(Column(variant, "top-1, %") for variant in variants),
    )
    rows = []
    for key in keys:
        groups = [found.get((*key, variant)) for variant in variants]
        images = max(group.images for group in groups if group)
        cells = [
            Cell(numbers.ABSENT, reason="this variant was not measured on it")
            if group is None
            else Cell.of(group.top1_pct, "percent", group.top1_ci95)
            for group in groups
        ]
        rows.append((Cell(key[0]), Cell(key[1]), Cell(f"{images:,}", images), *cells))
    return Table("subgroups", "Subgroups", columns, tuple(rows))


def similarity_table(details: Details) -> Table | None:
    """Return how alike the maps of each variant and method are to the original's."""
    columns = (
        Column("Variant", is_number=False),
        Column("Method", is_number=False),
        Column("Similarity", "−1 to 1", "1 is the same, 0 is unrelated"),
        Column("Images"),
    )
    rows = tuple(
        (
            Cell(part.variant),
            Cell(part.method, remark=part.measure),
            Cell.of(part.mean, bounds=part.ci95),
            Cell(str(part.images), part.images),
        )
        for part in details.similarities
    )
    return Table("similarity", "Similarity of attribution maps", columns, rows) if rows else None


def within_budget(pictures: Sequence[Sequence[str | None]], limit: int) -> int:
    """Return how many of the first items fit into ``limit`` characters of pictures."""
    spent = 0
    for position, item in enumerate(pictures):
        spent += sum(len(picture) for picture in item if picture)
        if spent > limit:
            return position
    return len(pictures)
