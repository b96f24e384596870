"""Saliency statistics for data-driven criteria: gradients, curvature and activations."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from compress.errors import CompressError, DataError, UsageError
from compress.groups import Group, Network, Slice
from compress.modules import evaluating, with_gradients
from compress.modules.detectors import on_batch
from compress.modules.inputs import Inputs, read_batches
from compress.prune.answers import AS_SEEN, Reading, SampledAnswers
from compress.prune.criteria import Evidence, Need
from compress.prune.loss import FittingLoss, Loss, checked

Batches = Iterable[Any]  # each as ``compress.modules.inputs.read_batch`` reads it
Place = tuple[str, int]  # a parameter and one of its dimensions

LABELLED = ("gradients", "hessian")
WATCHED = ("activations", "correlations")  # without gradients, in batches as they come
PLACES = 16  # of each image that correlations are taken at


@dataclass(frozen=True)
class Sampling:
    """How gradients are sampled.

    Args:
        images_per_gradient: Images that one gradient, or one curvature sample, is taken over.
        temperature: Divides the logits that "answers" are drawn from.
        seed: Seed of the answers drawn, and of the random signs behind the curvature.
    """

    images_per_gradient: int = 16
    temperature: float = 1.0
    seed: int = 0


AS_USUAL = Sampling()


@with_gradients()
def evidence(
    model: nn.Module,
    network: Network,
    need: Need,
    batches: Batches,
    sampling: Sampling = AS_USUAL,
    *,
    loss: Loss | None = None,
    reading: Reading = AS_SEEN,
) -> Evidence:
    """Return the saliency statistics that a criterion ``need``s, of ``batches`` through ``model``.

    The model is run in eval mode and is left as it was: parameters, gradients, statistics, modes.

    Args:
        model: The network to be pruned.
        network: What ``trace`` returned for it.
        need: "gradients", "answers", "hessian", "activations" or "correlations".
        batches: Images, float32 (B, C, H, W), alone or with their targets, as ``read_batch`` reads
            them; "gradients" and "hessian" need targets, as ``FittingLoss`` takes them.
        sampling: How many images a gradient is taken over, and what is drawn at random.
        loss: Of what the network returns and the targets, a scalar; by default the one that fits.
        reading: Which outputs "answers" are drawn from, and what they are.

    Raises:
        UsageError: there is not one batch.
        DataError: the model's output and the labels do not go together.
    """
    device = next(model.parameters()).device
    drawn = SampledAnswers(reading, sampling.temperature, sampling.seed)
    fitting = FittingLoss()
    of = fitting if loss is None else functools.partial(checked, loss)
    size = None if need in WATCHED else sampling.images_per_gradient
    is_labelled = need in LABELLED
    chunks = (
        chunk.to(device)
        for batch in read_batches(batches)
        for chunk in _chunks(batch, size, fitting if loss is None and is_labelled else None)
    )
    with evaluating(model):
        if need == "activations":
            found = _activations(model, network, chunks)
        elif need == "correlations":
            found = _correlations(model, network, chunks, sampling.seed)
        elif need == "hessian":
            found = _curvatures(model, network, chunks, sampling.seed, of)
        elif need == "answers":
            found = _products(model, network, chunks, drawn)
        else:
            found = _products(model, network, chunks, of)
    if found is None:
        raise UsageError("batches holds no images", fix="Give at least one batch")
    return found


def _chunks(batch: Inputs, size: int | None, fitting: FittingLoss | None) -> Iterator[Inputs]:
    if fitting is not None:
        fitting.see(batch.target)
    yield from [batch] if size is None else batch.split(size)


def _run(model: nn.Module, inputs: Inputs, weights: dict[str, Tensor] | None = None) -> Any:
    """Return what ``model`` answers a batch, with other weights if they are given.

    Raises:
        DataError: it does not run on it.
    """
    try:
        model = on_batch(model, inputs.args, inputs.kwargs)
        return torch.func.functional_call(model, weights or {}, inputs.args, dict(inputs.kwargs))
    except CompressError:
        raise
    except Exception as error:
        raise DataError(
            f"the network does not run on a batch: {type(error).__name__}: {error}",
            where="batches",
            expected="inputs of the type and shape of the example, such as float32 (B, C, H, W)",
        ) from error


def _places(network: Network) -> dict[str, list[int]]:
    """Return the dimensions of each parameter along which groups cut."""
    found: dict[str, set[int]] = defaultdict(set)
    for group in network.groups:
        for piece in group.slices:
            if piece.tensor in network.parameters:
                found[piece.tensor].add(piece.dim)
    return {tensor: sorted(dims) for tensor, dims in found.items()}


def _products(
    model: nn.Module, network: Network, chunks: Iterable[Inputs], loss_of: Loss
) -> Evidence | None:
    places = _places(network)
    rows: dict[Place, list[Tensor]] = defaultdict(list)
    for inputs in chunks:
        weights, output = _outputs(model, places, inputs)
        loss = loss_of(output, inputs.target)
        gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            product = (weight * gradient).detach()
            for dim in places[name]:
                rows[name, dim].append(_summed(product, dim).cpu())
    return Evidence(products={key: torch.stack(row) for key, row in rows.items()}) if rows else None


def _curvatures(
    model: nn.Module,
    network: Network,
    chunks: Iterable[Inputs],
    seed: int,
    loss_of: Loss,
) -> Evidence | None:
    places = _places(network)
    generator = torch.Generator().manual_seed(seed)
    totals: dict[Place, Tensor] = {}
    samples = 0
    for inputs in chunks:
        weights, output = _outputs(model, places, inputs)
        loss = loss_of(output, inputs.target)
        values = list(weights.values())
        signs = [(torch.randint(0, 2, v.shape, generator=generator) * 2 - 1).to(v) for v in values]
        first = torch.autograd.grad(loss, values, create_graph=True, materialize_grads=True)
        along = torch.stack([(g * z).sum() for g, z in zip(first, signs, strict=True)]).sum()
        second = torch.autograd.grad(along, values, materialize_grads=True)
        for (name, weight), z, hz in zip(weights.items(), signs, second, strict=True):
            cost = (0.5 * weight.square() * z * hz).detach()
            for dim in places[name]:
                summed = _summed(cost, dim).cpu()
                totals[name, dim] = totals[name, dim] + summed if samples else summed
        samples += 1
    if not samples:
        return None
    return Evidence(curvatures={key: total / samples for key, total in totals.items()})


def _outputs(
    model: nn.Module, names: Iterable[str], inputs: Inputs
) -> tuple[dict[str, Tensor], Any]:
    """Return parameters that share the model's memory but not its gradients, and the output."""
    known = dict(model.named_parameters(remove_duplicate=False))
    weights = {name: _leaf(known[name]) for name in names}
    return weights, _run(model, inputs, weights)


def _leaf(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    return (value.clone() if value.is_inference() else value).requires_grad_()


def _summed(tensor: Tensor, dim: int) -> Tensor:
    """Return the sum over all dimensions but ``dim``: (D,)."""
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1).sum(1)


class _InputStatistics:
    """Running sums over the values that enter one layer, channel by channel."""

    def __init__(self, length: int, channel_dim: int) -> None:
        self.length, self.channel_dim = length, channel_dim
        self.count = 0
        self.sums = {key: torch.zeros(length) for key in ("mean_abs", "mean_square", "nonzero")}

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add one batch; the channels of grouped layers are averaged over their groups."""
        values = inputs[0].detach().movedim(self.channel_dim, 0)
        if values.shape[0] % self.length:
            return
        values = values.reshape(-1, self.length, values[0].numel()).transpose(0, 1).flatten(1)
        self.count += values.shape[1]
        self.sums["mean_abs"] += values.abs().sum(1).cpu()
        self.sums["mean_square"] += values.square().sum(1).cpu()
        self.sums["nonzero"] += (values != 0).sum(1).cpu()


class _Mixing:
    """Running sum of products between the channels of one group, as they enter one layer."""

    def __init__(self, piece: Slice, seed: int) -> None:
        self.index = torch.as_tensor(piece.index)  # (C, k)
        self.draw = np.random.default_rng(seed)
        self.count = 0
        self.sum = torch.zeros(len(self.index), len(self.index))

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add one batch, at places drawn for this call."""
        x, index = inputs[0].detach(), self.index.to(inputs[0].device)
        if isinstance(module, nn.Linear):
            rows = x.flatten(0, -2)
            rows = rows[self._some(len(rows), PLACES * len(x))]
            values = rows[:, index[:, self._some(index.shape[1], PLACES)]].transpose(1, 2)
        else:
            maps = x.flatten(2)
            values = maps[:, :, self._some(maps.shape[2], PLACES)][:, index].movedim(1, -1)
        values = values.reshape(-1, len(index)).float()
        self.count += len(values)
        self.sum += (values.T @ values).cpu()

    def _some(self, size: int, count: int) -> Tensor:
        chosen = self.draw.choice(size, min(size, count), replace=False)
        return torch.from_numpy(np.sort(chosen))


def _readers(model: nn.Module, network: Network) -> Iterator[tuple[Group, Slice, nn.Module]]:
    """Yield the layers that read a group, and where."""
    modules = dict(model.named_modules())
    for group in network.groups:
        for piece in group.slices:
            owner = modules.get(piece.tensor.rpartition(".")[0])
            if piece.role == "input" and isinstance(owner, _ConvNd | nn.Linear):
                yield group, piece, owner


def _watched(
    model: nn.Module,
    chunks: Iterable[Inputs],
    watches: Iterable[tuple[nn.Module, Callable[..., None]]],
) -> bool:
    """Run ``model`` while ``watches`` see what enters their modules; say whether it ever ran."""
    removals = [owner.register_forward_pre_hook(watch).remove for owner, watch in watches]
    seen = False
    try:
        with torch.no_grad():
            for inputs in chunks:
                _run(model, inputs)
                seen = True
    finally:
        for remove in removals:
            remove()
    return seen


def _activations(model: nn.Module, network: Network, chunks: Iterable[Inputs]) -> Evidence | None:
    watches: dict[str, tuple[nn.Module, _InputStatistics]] = {}
    for _, piece, owner in _readers(model, network):
        dim = -1 if isinstance(owner, nn.Linear) else 1
        watch = _InputStatistics(network.shapes[piece.tensor][piece.dim], dim)
        watches.setdefault(piece.tensor, (owner, watch))
    if not _watched(model, chunks, watches.values()):
        return None
    statistics = {
        tensor: {key: total / watch.count for key, total in watch.sums.items()}
        for tensor, (_, watch) in watches.items()
        if watch.count
    }
    return Evidence(activations=statistics)


def _correlations(
    model: nn.Module, network: Network, chunks: Iterable[Inputs], seed: int
) -> Evidence | None:
    watches: dict[tuple[str, str], tuple[nn.Module, _Mixing]] = {
        (piece.tensor, group.name): (owner, _Mixing(piece, seed))
        for group, piece, owner in _readers(model, network)
        # A grouped layer's position means another channel in each of its groups.
        if getattr(owner, "groups", 1) == 1
    }
    if not _watched(model, chunks, watches.values()):
        return None
    found = {
        key: (watch.index[:, 0], watch.sum / watch.count)
        for key, (_, watch) in watches.items()
        if watch.count
    }
    return Evidence(correlations=found)
