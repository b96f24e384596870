"""Scores of all units by a criterion; what it needs of images: gradients, activations."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from compress.errors import CompressError, DataError, PlanError, UsageError
from compress.groups import Group, Network, Slice
from compress.modules import evaluating, with_gradients
from compress.modules.detectors import on_batch
from compress.modules.inputs import Inputs, read_batches
from compress.prune.criteria import ChannelGroup, Criterion, Evidence, Need
from compress.prune.loss import AS_SEEN, FittingLoss, Loss, SampledAnswers, checked
from compress.prune.selection import Floats

Batches = Iterable[Any]  # each as ``compress.modules.inputs.read_batch`` reads it
Place = tuple[str, int]  # a parameter and one of its dimensions

LABELLED = ("gradients", "hessian")
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
GRADIENTS = 128  # at least: of few images each has fewer, and its answers are drawn several times
IMAGES_PER_GRADIENT = 16
PLACES = 16  # of each image that correlations are taken at


def scores(
    model: nn.Module,
    network: Network,
    criterion: Criterion,
    batches: Batches | None = None,
    loss: Loss | None = None,
    answers: SampledAnswers = AS_SEEN,
) -> list[Floats]:
    """Return the importance of the units of every group, (C,) each, higher = keep.

    The seed of ``answers``, which says how the network's own are drawn, is that of all random
    choices; ``loss`` is of what the network returns and the targets, by default the one that fits.

    Raises:
        UsageError: the criterion needs images and ``batches`` is None or empty, or takes no loss.
        PlanError: it gives something else than one finite number for each unit, or the same to all.
    """
    name, needs = criterion_name(criterion), getattr(criterion, "needs", ())
    wanted = cast("tuple[Need, ...]", (needs,) if isinstance(needs, str) else needs)
    if loss is not None and not takes_targets(criterion):
        raise UsageError(
            f"criterion {name!r} takes no gradients of a loss, but loss= is given",
            fix="Leave loss out, or use taylor or hessian",
        )
    if wanted and batches is None:
        raise UsageError(
            f"criterion {name!r} needs {' and '.join(wanted)} on images, and no images are given",
            expected="batches of images (B, C, H, W) and labels (B,)",
            fix="Pass batches=, or use a criterion that needs none, such as l2",
        )
    shown = list(batches or ())
    answers = replace(answers, temperature=getattr(criterion, "temperature", 1.0))
    given = functools.partial(checked, loss) if loss is not None else None
    seen = _all_evidence(model, network, criterion, wanted, shown, answers, given)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    scales = frozenset(f"{n}.weight" for n, m in model.named_modules() if isinstance(m, NORMS))
    norms: dict[tuple[str, int, int], Tensor] = {}
    with torch.no_grad():
        rows = [
            _finite(criterion(ChannelGroup(group, tensors, scales, seen, norms)), group)
            for group in network.groups
        ]
    values = np.concatenate(rows)
    if len(values) > 1 and (values == values[0]).all():
        because = (
            ": outputs of an untrained network may not depend on its images; or use the criterion "
            "l1; from Python, give batches and a loss= whose gradient reaches it"
        )
        raise PlanError(
            f"the criterion {name!r} gives every channel the same score, "
            f"{values[0]:g}: it does not say which to keep",
            fix=f"Give trained weights{because if wanted else ', or use the criterion random'}",
        )
    return rows


def _all_evidence(
    model: nn.Module,
    network: Network,
    criterion: Criterion,
    needs: Iterable[Need],
    batches: Sequence[Any],
    answers: SampledAnswers,
    loss: Loss | None,
) -> Evidence:
    """Return the evidence for each need; of few images answers are drawn several times."""
    images = getattr(criterion, "images_per_gradient", IMAGES_PER_GRADIENT)
    found = Evidence()
    for need in needs:
        shown, of, size = batches, loss, images
        if need == "answers":  # not of losses of targets, which may be of several images
            count = sum(map(len, read_batches(batches)))
            shown, of = [*batches] * max(1, GRADIENTS // max(1, count)), answers
            size = min(images, max(1, count // GRADIENTS))
        new = evidence(model, network, need, shown, of, size, answers.seed)
        found = replace(found, **{field: value for field, value in vars(new).items() if value})
    return found


def takes_targets(criterion: Criterion | type[Any]) -> bool:
    """Return whether a criterion, or one of this class, takes gradients of a loss of targets."""
    needs = getattr(criterion, "needs", ())
    return not {*LABELLED}.isdisjoint((needs,) if isinstance(needs, str) else needs)


def _finite(found: Tensor, group: Group) -> Floats:
    if tuple(found.shape) != (group.size,):
        raise PlanError(
            f"the criterion gives scores of shape {tuple(found.shape)}",
            where=group.name,
            expected=f"one for each of its {group.size} channels",
        )
    values = found.double().cpu().numpy()
    if not np.isfinite(values).all():
        raise PlanError(
            "the criterion gives scores that are not finite",
            where=group.name,
            fix="Check the weights for NaN or infinity",
        )
    return values


def criterion_name(criterion: Criterion) -> str:
    """Return the name of a criterion as users write it."""
    module = type(criterion).__module__
    is_plugin = module.startswith("compress.prune.criteria.")
    return module.rpartition(".")[2] if is_plugin else type(criterion).__name__


@with_gradients()
def evidence(
    model: nn.Module,
    network: Network,
    need: Need,
    batches: Batches,
    loss: Loss | None = None,
    images_per_gradient: int = IMAGES_PER_GRADIENT,
    seed: int = 0,
) -> Evidence:
    """Return the saliency statistics that a criterion ``need``s, of ``batches`` through ``model``.

    The model is run in eval mode and is left as it was: parameters, gradients, statistics, modes.

    Batches are read as ``read_batch`` does; "gradients" and "hessian" need targets, as
    ``FittingLoss`` takes them. The default ``loss`` is ``SampledAnswers`` for "answers", else the
    one that fits. One gradient, or one curvature sample, is taken over ``images_per_gradient``.

    Raises:
        UsageError: there is not one batch.
        DataError: the model's output and the labels do not go together.
    """
    if loss is None:
        loss = SampledAnswers(seed=seed) if need == "answers" else FittingLoss()
    is_watched = need in ("activations", "correlations")  # without gradients, batches as they come
    size, see = None if is_watched else images_per_gradient, getattr(loss, "see", None)
    chunks = _chunks(model, batches, size, see if need in LABELLED else None)
    with evaluating(model):
        if is_watched:
            return _watched(model, network, need, chunks, seed)
        if need == "hessian":
            return _curvatures(model, network, chunks, seed, loss)
        return _products(model, network, chunks, loss)


def _chunks(
    model: nn.Module, batches: Batches, size: int | None, see: Callable[[Any], None] | None
) -> Iterator[Inputs]:
    """Yield parts of ``size`` images beside the model; ``see`` is shown whole batches' targets."""
    device = next(model.parameters()).device
    for batch in read_batches(batches):
        if see is not None:
            see(batch.target)
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
                rows[name, dim].append(summed_along(product, dim).cpu())
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
                totals[name, dim] += summed_along(cost, dim).cpu()
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


def summed_along(tensor: Tensor, dim: int) -> Tensor:
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

    def found(self) -> dict[str, Tensor]:
        """Return the means, (D,) each."""
        return {key: total / self.count for key, total in self.sums.items()}


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

    def found(self) -> tuple[Tensor, Tensor]:
        """Return the first position of each unit, (C,), and the mean products, (C, C)."""
        return self.index[:, 0], self.sum / self.count

    def _some(self, size: int, count: int) -> Tensor:
        chosen = self.draw.choice(size, min(size, count), replace=False)
        return torch.from_numpy(np.sort(chosen))


def _watched(
    model: nn.Module, network: Network, need: Need, chunks: Iterable[Inputs], seed: int
) -> Evidence:
    """Run ``model`` and return what enters the layers that read channels."""
    watches: dict[Any, tuple[nn.Module, Any]] = {}
    modules = dict(model.named_modules())
    pieces = [(group, piece) for group in network.groups for piece in group.slices]
    for group, piece in pieces:
        owner = modules.get(piece.tensor.rpartition(".")[0])
        if piece.role != "input" or not isinstance(owner, _ConvNd | nn.Linear):
            continue
        if need == "activations":
            channels = -1 if isinstance(owner, nn.Linear) else 1
            statistics = _InputStatistics(network.shapes[piece.tensor][piece.dim], channels)
            watches[piece.tensor] = owner, statistics
        # A grouped layer's position means another channel in each of its groups.
        elif getattr(owner, "groups", 1) == 1:
            watches[piece.tensor, group.name] = owner, _Mixing(piece, seed)
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for owner, watch in watches.values():
            hooks.enter_context(owner.register_forward_pre_hook(watch))
        for inputs in chunks:
            _run(model, inputs)
    return Evidence(**{need: {key: w.found() for key, (_, w) in watches.items() if w.count}})
