"""Feature maps of student and teacher: surveyed, read by forward hooks, matched with each other."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.errors import TrainingError, UnknownNameError
from compress.modules import evaluating, full_copy
from compress.modules.inputs import copied
from compress.modules.outputs import logits_of
from compress.train.losses import Layers, Needs
from compress.train.optimizers import check_layer

NECKS = 3  # sizes at which dense predictions are compared, the smallest ones


@dataclass(frozen=True)
class Tap:
    """One place in a network: what a layer returns, or what it is given."""

    layer: str
    side: Literal["output", "input"] = "output"


@dataclass(frozen=True)
class Feature:
    """A tensor that a layer returned in a dry run."""

    layer: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Survey:
    """What a network computes for one image."""

    features: tuple[Feature, ...]  # in the order of execution; layers called once only
    classes: int
    head: Tap | None  # what the classifier is given
    image_size: tuple[int, int]


@contextlib.contextmanager
def tapped(model: nn.Module, taps: Iterable[Tap]) -> Iterator[dict[Tap, Tensor]]:
    """Collect what passes at ``taps`` while the block runs; the last call of a layer counts.

    Raises:
        UnknownNameError: a tap names a layer that is not there.
    """
    seen: dict[Tap, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for tap in taps:
            check_layer(model, tap.layer, type(model).__name__)
            hooks.enter_context(_hook(model.get_submodule(tap.layer), tap, seen))
        yield seen


def survey(model: nn.Module, example: Tensor) -> Survey:
    """Run ``model`` on an image, (1, C, H, W) on its device, and return what its layers compute.

    A copy of the network runs: the network itself is left as found.
    """
    model = full_copy(model)
    calls: list[tuple[str, tuple[int, ...], int]] = []
    alive: list[Any] = []  # so that no identity is used twice

    def record(name: str, _module: nn.Module, _given: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            alive.append(output)
            calls.append((name, tuple(output.shape), id(output)))

    for name, layer in model.named_modules():
        if name:
            layer.register_forward_hook(functools.partial(record, name))
    with evaluating(model), torch.no_grad():
        logits = logits_of(model(copied(example)))
    names = [name for name, *_ in calls]
    features = tuple(
        Feature(name, shape)
        for name, shape, _ in calls
        if names.count(name) == 1 and shape[:1] == example.shape[:1]
    )  # Not those of regions within images: training looks at other regions, and more of them.
    heads = [name for name, _, identity in calls if identity == id(logits)]
    if not heads:  # pooled or reshaped after the classifier
        layers = dict(model.named_modules())
        heads = [
            feature.layer
            for feature in reversed(features)
            if isinstance(layers[feature.layer], (nn.Linear, nn.Conv2d))
            and feature.shape[1] == logits.shape[1]
        ]
    head = Tap(heads[0], "input") if heads else None  # the innermost is called first
    size = (int(example.shape[2]), int(example.shape[3]))
    return Survey(features, logits.shape[1], head, size)


def _hook(layer: nn.Module, tap: Tap, seen: dict[Tap, Tensor]) -> Any:
    if tap.side == "input":
        return layer.register_forward_pre_hook(lambda _, given: seen.update({tap: given[0]}))
    return layer.register_forward_hook(lambda _module, _, output: seen.update({tap: output}))


@dataclass(frozen=True)
class LayerPair:
    """One place in the student and the place in the teacher that it is compared with."""

    student: Tap
    teacher: Tap
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # without the batch

    def __str__(self) -> str:
        if self.shapes is None:
            return f"input of {self.student.layer} - input of {self.teacher.layer}"
        mine, theirs = ("x".join(map(str, shape)) for shape in self.shapes)
        return f"{self.student.layer} ({mine}) - {self.teacher.layer} ({theirs})"


def pair_layers(
    student: Survey, teacher: Survey, layers: Layers, needs: Needs, loss: str
) -> tuple[LayerPair, ...]:
    """Return the pairs of layers that a loss compares, shallow to deep.

    "auto" pairs stages, by what the loss ``needs``: the last module at each spatial size. Stages of
    equal size belong together; where input sizes differ, or no sizes agree, they are paired from
    the deepest backwards. Other ``layers`` are names that both have, or {student: teacher}.

    Raises:
        UnknownNameError: a named layer is not there.
        TrainingError: nothing can be paired; the message names the loss.
    """
    if layers != "auto":
        return tuple(
            _pair(
                _find(student.features, mine, "the student"),
                _find(teacher.features, theirs, "the teacher"),
            )
            for mine, theirs in _names(layers, loss)
        )
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


def _names(layers: Sequence[str] | Mapping[str, str], loss: str) -> list[tuple[str, str]]:
    """Return the names of student and teacher layers, as a recipe writes them, pair by pair."""
    pairs = dict(layers) if isinstance(layers, Mapping) else {name: name for name in layers}
    if not pairs:
        raise TrainingError(
            f"layers: {layers!r} names no layers",
            where=f"loss {loss!r}",
            expected='"auto", a list of names, or {student: teacher}',
        )
    return list(pairs.items())


def _find(features: Sequence[Feature], name: str, place: str) -> Feature:
    found = {feature.layer: feature for feature in features}
    if name not in found:
        raise UnknownNameError("layer that returns one tensor", name, list(found), where=place)
    return found[name]


def _pair(mine: Feature, theirs: Feature) -> LayerPair:
    return LayerPair(Tap(mine.layer), Tap(theirs.layer), (mine.shape[1:], theirs.shape[1:]))
