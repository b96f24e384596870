"""Saliency statistics for data-driven criteria: gradients, curvature and activations."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from compress.errors import CompressError, DataError
from compress.groups import Group, Network, Slice
from compress.modules import evaluating, with_gradients
from compress.modules.detectors import on_batch
from compress.modules.inputs import Inputs, read_batches
from compress.prune.criteria import Evidence, Need
from compress.prune.loss import AS_SEEN, FittingLoss, Loss, Reading, SampledAnswers, checked

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
    loss_of: Loss = SampledAnswers(reading, sampling.temperature, sampling.seed)
    if need in LABELLED:
        loss_of = functools.partial(checked, loss) if loss is not None else FittingLoss()
    size = None if need in WATCHED else sampling.images_per_gradient
    chunks = _chunks(model, batches, size, loss_of)
    with evaluating(model):
        if need == "activations":
            return _activations(model, network, chunks)
        if need == "correlations":
            return _correlations(model, network, chunks, sampling.seed)
        if need == "hessian":
            return _curvatures(model, network, chunks, sampling.seed, loss_of)
        return _products(model, network, chunks, loss_of)


def _chunks(
    model: nn.Module, batches: Batches, size: int | None, loss_of: Loss
) -> Iterator[Inputs]:
    """Yield parts of ``size`` images beside the model; a loss that fits sees whole batches."""
    device = next(model.parameters()).device
    for batch in read_batches(batches):
        if isinstance(loss_of, FittingLoss):
            loss_of.see(batch.target)
        for chunk in [batch] if size is None else batch.split(size):
            yield chunk.to(device)


def _run(model: nn.Module, inputs: Inputs, weights: dict[str, Tensor] | None = None) -> Any:
    """Return what ``model`` answers a batch, with other weights if they are given."""
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
    found: dict[str, list[int]] = defaultdict(list)
    for tensor, dim in network.owned:
        if tensor in network.parameters:
            found[tensor].append(dim)
    return found


def _products(
    model: nn.Module, network: Network, chunks: Iterable[Inputs], loss_of: Loss
) -> Evidence:
    places = _places(network)
    rows: dict[Place, list[Tensor]] = defaultdict(list)
    for inputs in chunks:
        weights, output = run_on_leaves(model, places, inputs)
        loss = loss_of(output, inputs.target)
        gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            product = (weight * gradient).detach()
            for dim in places[name]:
                rows[name, dim].append(_summed(product, dim).cpu())
    return Evidence(products={key: torch.stack(row) for key, row in rows.items()})


def _curvatures(
    model: nn.Module, network: Network, chunks: Iterable[Inputs], seed: int, loss_of: Loss
) -> Evidence:
    places = _places(network)
    generator = torch.Generator().manual_seed(seed)
    totals: dict[Place, Any] = defaultdict(float)
    samples = 0
    for inputs in chunks:
        samples += 1
        weights, output = run_on_leaves(model, places, inputs)
        loss = loss_of(output, inputs.target)
        values = list(weights.values())
        signs = [(torch.randint(0, 2, v.shape, generator=generator) * 2 - 1).to(v) for v in values]
        first = torch.autograd.grad(loss, values, create_graph=True, materialize_grads=True)
        along = torch.stack([(g * z).sum() for g, z in zip(first, signs, strict=True)]).sum()
        second = torch.autograd.grad(along, values, materialize_grads=True)
        for (name, weight), z, hz in zip(weights.items(), signs, second, strict=True):
            cost = (0.5 * weight.square() * z * hz).detach()
            for dim in places[name]:
                totals[name, dim] += _summed(cost, dim).cpu()
    return Evidence(curvatures={key: total / samples for key, total in totals.items()})


def run_on_leaves(
    model: nn.Module, names: Iterable[str], inputs: Inputs
) -> tuple[dict[str, Tensor], Any]:
    """Return parameters that share the model's memory but not its gradients, and the output."""
    known = dict(model.named_parameters(remove_duplicate=False))
    values = {name: known[name].detach() for name in names}
    weights = {
        name: (value.clone() if value.is_inference() else value).requires_grad_()
        for name, value in values.items()
    }
    return weights, _run(model, inputs, weights)


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


def _watch(
    model: nn.Module,
    chunks: Iterable[Inputs],
    watches: Iterable[tuple[nn.Module, Callable[..., None]]],
) -> None:
    """Run ``model`` while ``watches`` see what enters their modules."""
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for owner, watch in watches:
            hooks.enter_context(owner.register_forward_pre_hook(watch))
        for inputs in chunks:
            _run(model, inputs)


def _activations(model: nn.Module, network: Network, chunks: Iterable[Inputs]) -> Evidence:
    watches = {}
    for _, piece, owner in _readers(model, network):
        channels = -1 if isinstance(owner, nn.Linear) else 1
        statistics = _InputStatistics(network.shapes[piece.tensor][piece.dim], channels)
        watches[piece.tensor] = (owner, statistics)
    _watch(model, chunks, watches.values())
    found = {
        tensor: {key: total / watch.count for key, total in watch.sums.items()}
        for tensor, (_, watch) in watches.items()
        if watch.count
    }
    return Evidence(activations=found)


def _correlations(
    model: nn.Module, network: Network, chunks: Iterable[Inputs], seed: int
) -> Evidence:
    watches = {
        (piece.tensor, group.name): (owner, _Mixing(piece, seed))
        for group, piece, owner in _readers(model, network)
        # A grouped layer's position means another channel in each of its groups.
        if getattr(owner, "groups", 1) == 1
    }
    _watch(model, chunks, watches.values())
    found = {
        key: (watch.index[:, 0], watch.sum / watch.count)
        for key, (_, watch) in watches.items()
        if watch.count
    }
    return Evidence(correlations=found)
