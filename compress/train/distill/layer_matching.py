"""Match layers of the student with layers of the teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.errors import TrainingError, UnknownNameError
from compress.train.distill.feature_hooks import Feature, Survey, Tap
from compress.train.losses import Layers, Needs

NECKS = 3  # sizes at which dense predictions are compared, the smallest ones


@dataclass(frozen=True)
class LayerPair:
    """One place in the student and the place in the teacher that it is compared with."""

    student: Tap
    teacher: Tap
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # without the batch

    def __str__(self) -> str:
        """Return the pair as people read it."""
        if self.shapes is None:
            return f"input of {self.student.layer} - input of {self.teacher.layer}"
        mine, theirs = ("x".join(map(str, shape)) for shape in self.shapes)
        return f"{self.student.layer} ({mine}) - {self.teacher.layer} ({theirs})"


def pair_layers(
    student: Survey, teacher: Survey, layers: Layers, needs: Needs, loss: str
) -> tuple[LayerPair, ...]:
    """Return the pairs of layers that a loss compares, shallow to deep.

    "auto" pairs stages: the last module at each spatial size. Stages of equal size belong together;
    where input sizes differ, or no sizes agree, they are paired from the deepest backwards.

    Args:
        student: What the student computes.
        teacher: What the teacher computes.
        layers: "auto", names that both have, or {student: teacher}.
        needs: What the loss compares where ``layers`` is "auto".
        loss: Its name, for messages.

    Raises:
        UnknownNameError: a named layer is not there.
        TrainingError: nothing can be paired.
    """
    if layers != "auto":
        return tuple(_named(student, teacher, *names) for names in _names(layers, loss))
    if needs == "embedding" and student.head is not None and teacher.head is not None:
        return (LayerPair(student.head, teacher.head),)
    pairs = _paired_stages(student, teacher, enlarged=needs == "necks")
    if not pairs:
        raise TrainingError(
            "no features of student and teacher can be paired",
            where=f"loss {loss!r}",
            fix="Name them: layers: {student layer: teacher layer}",
        )
    if needs == "necks":
        return pairs[-NECKS:]
    return pairs if needs == "stages" else pairs[-1:]


def stages(seen: Survey, *, enlarged: bool = False) -> tuple[Feature, ...]:
    """Return one feature for each spatial size, shallow to deep; vectors are left out.

    It is the last one at that size, of the outermost modules that end there, so that blocks count
    and not the layers inside the next block. Maps that were enlarged are left out, unless
    ``enlarged``.
    """
    chosen: dict[tuple[int, ...], Feature] = {}
    smallest = math.inf
    for feature in seen.features:
        size = feature.shape[2:]
        if len(size) != 2 or max(size) <= 1 or (max(size) > smallest and not enlarged):
            continue  # a vector, or a map that was enlarged
        smallest = min(smallest, max(size))
        before = chosen.get(size)
        if before is None or feature.layer.count(".") <= before.layer.count("."):
            chosen[size] = feature
    return tuple(sorted(chosen.values(), key=lambda feature: -max(feature.shape[2:])))


def _paired_stages(student: Survey, teacher: Survey, *, enlarged: bool) -> tuple[LayerPair, ...]:
    mine, theirs = stages(student, enlarged=enlarged), stages(teacher, enlarged=enlarged)
    by_size = {feature.shape[2:]: feature for feature in theirs}
    equal = [(f, by_size[f.shape[2:]]) for f in mine if f.shape[2:] in by_size]
    if student.image_size == teacher.image_size and equal:
        chosen = equal
    else:
        chosen = list(zip(mine[::-1], theirs[::-1], strict=False))[::-1]
    return tuple(_pair(a, b) for a, b in chosen)


def _names(layers: object, loss: str) -> list[tuple[str, str]]:
    """Return the names of student and teacher layers, as a recipe writes them, pair by pair."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(layers, Mapping):
        pairs = list(layers.items())
    elif isinstance(layers, Sequence) and not isinstance(layers, str):
        pairs = [(name, name) for name in layers]
    if not pairs or not all(isinstance(name, str) for pair in pairs for name in pair):
        raise TrainingError(
            f"layers: {layers!r} names no layers",
            where=f"loss {loss!r}",
            expected='"auto", a list of names, or {student: teacher}',
        )
    return pairs


def _named(student: Survey, teacher: Survey, mine: str, theirs: str) -> LayerPair:
    return _pair(
        _find(student.features, mine, "the student"), _find(teacher.features, theirs, "the teacher")
    )


def _find(features: Sequence[Feature], name: str, place: str) -> Feature:
    for feature in features:
        if feature.layer == name:
            return feature
    known = [feature.layer for feature in features]
    raise UnknownNameError("layer that returns one tensor", name, known, where=place)


def _pair(mine: Feature, theirs: Feature) -> LayerPair:
    return LayerPair(Tap(mine.layer), Tap(theirs.layer), (mine.shape[1:], theirs.shape[1:]))
