"""Feature maps of a network, read by forward hooks that are removed afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.errors import UnknownNameError
from compress.modules import evaluating
from compress.modules.copying import full_copy
from compress.modules.outputs import logits_of


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
    handles: list[Any] = []
    try:
        for tap in taps:
            layer = layer_of(model, tap.layer)
            handles.append(_hook(layer, tap, seen))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """Return a layer by name.

    Raises:
        UnknownNameError: it is not there; the message lists the known ones.
    """
    layers: dict[str, nn.Module] = dict(model.named_modules())
    if not name or name not in layers:
        known = [layer for layer in layers if layer]
        raise UnknownNameError("layer", name, known, where=type(model).__name__)
    return layers[name]


def device_of(model: nn.Module) -> torch.device:
    """Return where a network computes: the device of its first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def survey(model: nn.Module, example: Tensor) -> Survey:
    """Run ``model`` on one image and return what its layers compute.

    A copy of the network runs: the network itself is left as found.

    Args:
        model: Any network of images.
        example: (1, C, H, W), on the network's device.
    """
    model = full_copy(model)
    calls: list[tuple[str, tuple[int, ...], int]] = []
    alive: list[Any] = []  # so that no identity is used twice

    def record(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                alive.append(output)
                calls.append((name, tuple(output.shape), id(output)))

        return hook

    handles = [
        layer.register_forward_hook(record(name)) for name, layer in model.named_modules() if name
    ]
    try:
        with evaluating(model), torch.no_grad():
            logits = logits_of(model(example))
    finally:
        for handle in handles:
            handle.remove()
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

        def take_input(_: nn.Module, given: tuple[Any, ...]) -> None:
            seen[tap] = given[0]

        return layer.register_forward_pre_hook(take_input)

    def take_output(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        seen[tap] = output

    return layer.register_forward_hook(take_output)
