"""Fit the weights that are left, so that every layer answers again as it did before the cut."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import UsageError
from compress.progress import track
from compress.prune.evidence import evaluating
from compress.surgery import PrunePlan

RIDGE = 1e-2  # pull towards the weights that are there, as a share of the inputs' mean square
ROWS_PER_FEATURE = 24  # samples of a layer's output, for each weight of one of its filters
LEAST_ROWS_PER_FEATURE = 4  # with fewer a layer is left alone

Batches = Iterable[tuple[Tensor, Tensor]]


def refit(pruned: nn.Module, original: nn.Module, plan: PrunePlan, batches: Batches) -> nn.Module:
    """Fit the weights of ``pruned`` layer by layer to the answers of ``original``, in place.

    For every convolution and linear layer, in the order of execution, the weights W minimize
    |X W - Y|^2 + r |W - W0|^2: X is what the layer sees in the pruned network, whose earlier layers
    are fitted already, Y what the same layer answered in the original, W0 the weights it has. What
    the lost channels did is taken over by those that correlate with them. Needs no labels; a few
    hundred images do. BatchNorm should be recalibrated afterwards.

    A layer that several calls share is fitted to all of them. Transposed convolutions, and layers
    that see fewer than four samples for each weight of a filter, stay as they are.

    Args:
        pruned: What ``apply_pruning(original, plan)`` returned. Its weights are replaced.
        original: The network before the cut. Not modified.
        plan: The cut between the two.
        batches: Images, float32 (B, C, H, W), with or without anything after them.

    Returns:
        ``pruned``.

    Raises:
        UsageError: there is not one batch.

    Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017,
    https://arxiv.org/abs/1707.06168, section 3.1, equation 4; the pull towards the weights, and
    fitting to inputs of the network that is fitted already, are differences from it.
    """
    device = next(pruned.parameters()).device
    images = [batch[0].to(device) for batch in batches]
    if not images:
        raise UsageError("batches holds no images", fix="Give at least one batch")
    before = dict(original.named_modules())
    with evaluating(pruned), evaluating(original), torch.no_grad():
        for name, layer, calls in track(_layers(pruned, images[0][:1]), "refit"):
            kept = plan.tensors.get(f"{name}.weight", {}).get(0)
            _fit(_Pair(layer, before[name], kept, calls), pruned, original, images)
    return pruned


Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


class _EnoughSeen(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """The layer in question has run."""


@dataclass
class _Pair:
    """One layer in both networks, and the normal equations collected so far."""

    layer: Layer
    before: nn.Module
    kept: Any  # positions of the layer's outputs that are left, None = all
    calls: int  # how often it runs in one forward
    inputs: list[Tensor] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)
    squares: Tensor | float = 0.0  # X'X by group: (G, F, F)
    products: Tensor | float = 0.0  # X'Y by group: (G, F, O)
    rows: int = 0

    def add(self, positions: np.random.Generator, most: int) -> None:
        """Add what one batch has shown, ``most`` rows of it at most."""
        for x, y in zip(self.inputs, self.answers, strict=True):
            seen, wanted = _samples(self.layer, x, y, self.kept, positions, most)
            self.squares = self.squares + (seen.mT @ seen).double()
            self.products = self.products + (seen.mT @ wanted).double()
            self.rows += seen.shape[1]
        self.inputs.clear()
        self.answers.clear()


def _layers(model: nn.Module, image: Tensor) -> list[tuple[str, Layer, int]]:
    """Return the layers that can be fitted, in the order in which they first run, and how often."""
    modules = dict(model.named_modules())
    calls: Counter[str] = Counter()
    removals = []
    for name, module in modules.items():
        # Only plain classes: a subclass may compute something else with its weight.
        if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) and not hasattr(
            module, "parametrizations"
        ):
            hook = module.register_forward_hook(
                lambda _module, _inputs, _output, name=name: calls.update([name])
            )
            removals.append(hook)
    try:
        model(image)
    finally:
        for hook in removals:
            hook.remove()
    return [(name, modules[name], count) for name, count in calls.items()]


def _fit(pair: _Pair, pruned: nn.Module, original: nn.Module, images: Sequence[Tensor]) -> None:
    weight = pair.layer.weight
    features = weight[0].numel() + (pair.layer.bias is not None)
    most = -(-ROWS_PER_FEATURE * features // len(images))
    draw = np.random.default_rng(0)
    for batch in images:
        _run_until(pruned, pair.layer, batch, pair.inputs, takes_input=True, calls=pair.calls)
        _run_until(original, pair.before, batch, pair.answers, takes_input=False, calls=pair.calls)
        pair.add(draw, most)
    if pair.rows >= LEAST_ROWS_PER_FEATURE * features:
        _solve(pair)


def _run_until(
    model: nn.Module,
    layer: nn.Module,
    images: Tensor,
    into: list[Tensor],
    *,
    takes_input: bool,
    calls: int,
) -> None:
    """Run ``model`` until ``layer`` has run ``calls`` times; list what it saw, or answered."""

    def note(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        into.append(inputs[0] if takes_input else output)
        if len(into) == calls:
            raise _EnoughSeen

    hook = layer.register_forward_hook(note)
    try:
        with contextlib.suppress(_EnoughSeen):
            model(images)
    finally:
        hook.remove()


def _samples(
    layer: Layer, x: Tensor, y: Tensor, kept: Any, draw: np.random.Generator, most: int
) -> tuple[Tensor, Tensor]:
    """Return rows of inputs, (G, rows, F), and of wanted answers, (G, rows, O), by group."""
    if isinstance(layer, nn.Linear):
        seen, wanted = x.flatten(0, -2), y.flatten(0, -2)
        seen, wanted, groups = seen.unsqueeze(0), wanted, 1
    else:
        size = y.shape[2:]
        places = int(np.prod(size))
        count = min(places, max(1, -(-most // len(x))))
        chosen = np.sort(draw.choice(places, count, replace=False))
        seen = _windows(layer, x, np.unravel_index(chosen, size))
        groups = layer.groups
        wanted = y.flatten(2)[:, :, torch.as_tensor(chosen, device=y.device)]
        wanted = wanted.transpose(1, 2).flatten(0, 1)
    if kept is not None:
        wanted = wanted[:, torch.as_tensor(np.asarray(kept), device=wanted.device)]
    wanted = wanted.reshape(len(wanted), groups, -1).transpose(0, 1)
    if layer.bias is not None:
        seen = torch.cat([seen, seen.new_ones(*seen.shape[:2], 1)], dim=2)
    return seen, wanted


def _windows(layer: Any, x: Tensor, places: tuple[Any, ...]) -> Tensor:
    """Return what a convolution sees at some places of its output: (G, B * places, F)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    dimensions = len(places)
    index: list[Any] = [slice(None), slice(None)]
    for axis, place in enumerate(places):
        offsets = np.arange(layer.kernel_size[axis]) * layer.dilation[axis]
        shape = [len(place)] + [1] * dimensions
        shape[1 + axis] = len(offsets)
        index.append(
            torch.as_tensor(
                (place[:, None] * layer.stride[axis] + offsets).reshape(shape), device=x.device
            )
        )
    window = padded[tuple(index)]  # (B, C, places, kernel...)
    batch, channels, count = window.shape[:3]
    window = window.reshape(batch, layer.groups, channels // layer.groups, count, -1)
    return window.permute(1, 0, 3, 2, 4).reshape(layer.groups, batch * count, -1)


def _solve(pair: _Pair) -> None:
    """Solve the normal equations and write the weights."""
    layer = pair.layer
    squares, products = torch.as_tensor(pair.squares), torch.as_tensor(pair.products)
    groups, features = squares.shape[:2]
    now = layer.weight.reshape(groups, -1, layer.weight[0].numel()).double()  # (G, O, F)
    if layer.bias is not None:
        now = torch.cat([now, layer.bias.reshape(groups, -1, 1).double()], dim=2)
    pull = RIDGE * squares.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    eye = torch.eye(features, dtype=squares.dtype, device=squares.device)
    ridge = pull[:, None, None] * eye
    fitted = torch.linalg.solve(squares + ridge, products + ridge @ now.mT).mT  # (G, O, F)
    if not torch.isfinite(fitted).all():
        return
    if layer.bias is not None:
        layer.bias.copy_(fitted[:, :, -1].reshape(layer.bias.shape))
        fitted = fitted[:, :, :-1]
    layer.weight.copy_(fitted.reshape(layer.weight.shape))
