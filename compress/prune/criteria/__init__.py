"""How much a channel matters: one file for each criterion, and what a criterion is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args, get_origin, get_type_hints, runtime_checkable

import torch
from torch import Tensor

from compress.groups import Group, Slice

Need = Literal["gradients", "answers", "hessian", "activations", "correlations"]
Reduction = Literal["mean", "sum", "max", "min", "product"]
Weights = Literal["filters", "columns", "both"]
_CACHED = 1 << 18  # elements that stay in a processor's cache


@dataclass(frozen=True)
class Evidence:
    """Saliency statistics of a network on images; only what the criterion ``needs`` is filled.

    Everything is kept per position along one dimension of one parameter (D positions), so that it
    stays small whatever the network.
    """

    # Sum of weight x gradient over all other dimensions, batch by batch: (batches, D).
    products: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    # Half the sum of curvature x weight squared over all other dimensions: (D,).
    curvatures: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    # Of the channels entering a layer, by its weight: "mean_abs", "mean_square" and "nonzero" (the
    # share of values that are not zero); each (D,).
    activations: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    # Mean products of the values of a group's channels at one place, as they enter a layer, by its
    # weight and the group's name: the first position of each unit, (C,), and the matrix, (C, C).
    correlations: Mapping[tuple[str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the C channels of a group, as far as they can replace each other there."""

    correlations: Tensor  # (C, C), mean products of their values
    weights: Tensor  # (C, fan_out), what reads each
    changes: Tensor  # (batches, C), first-order change of the loss without each, in this layer


class ChannelGroup:
    """The C units of one group and every parameter entry they own, as a criterion sees them.

    ``tensors`` are the parameters by name, detached, ``norm_scales`` the names of those that scale
    a normalized channel (BatchNorm's weight); ``norms`` found so far are shared by the groups of
    one network, which share tensors.
    """

    def __init__(
        self,
        group: Group,
        tensors: Mapping[str, Tensor],
        norm_scales: frozenset[str] = frozenset(),
        evidence: Evidence | None = None,
        norms: dict[tuple[str, int, int], Tensor] | None = None,
    ) -> None:
        self.name: str = group.name
        self.size: int = group.size
        self.evidence = evidence or Evidence()
        self._tensors = tensors
        self._norm_scales = norm_scales
        self._norms = {} if norms is None else norms
        self._slices = [piece for piece in group.slices if piece.tensor in tensors]

    def filters(self) -> list[Tensor]:
        """Return the weights that produce the channels: (C, fan_in) for each producing layer."""
        return [self._values(piece) for piece in self._of("output")]

    def columns(self) -> list[Tensor]:
        """Return the weights that read the channels: (C, fan_out) for each consuming layer."""
        return [self._values(piece) for piece in self._of("input")]

    def scales(self) -> list[Tensor]:
        """Return the scales of the norms over the channels: (C, k), k = 1 almost always."""
        return [
            self._values(piece)
            for piece in self._of("channel")
            if piece.tensor in self._norm_scales
        ]

    def norms(self, which: Weights, power: int) -> list[Tensor]:
        """Return the L1 or L2 norm of the weights of each channel: (C,) for each layer.

        They are of filters, columns or both; of filters where nothing reads the channels. The same
        as ``vector_norm(w, power, dim=1)`` without copies: weights are reduced to one number for
        each position first.
        """
        inputs = [] if which == "filters" else self._of("input")
        outputs = self._of("output") if which != "columns" or not inputs else []
        return [self._norm(piece, power) for piece in inputs + outputs]

    def loss_changes(self) -> Tensor:
        """Return the first-order change of the loss without each channel: (batches, C).

        It is the sum of weight x gradient over the weights that read the channel. Where no weight
        reads it, it is the sum over its producers and their norms.
        """
        found = (self._seen(self.evidence.products, r) for r in ("input", "channel", "output"))
        return torch.stack(next(filter(None, found), [])).sum(0)

    def curvatures(self) -> list[Tensor]:
        """Return half the sum of curvature x weight squared: (C,) for each layer."""
        table = self.evidence.curvatures
        return self._seen(table, "output") + self._seen(table, "input")

    def activations(self, statistic: str) -> list[Tensor]:
        """Return a statistic of the channels as they enter each consuming layer: (C, k) each."""
        return [
            self.evidence.activations[piece.tensor][statistic][torch.as_tensor(piece.index)]
            for piece in self._consumers()
        ]

    def contributions(self) -> list[Tensor]:
        """Return, for each consumer, the size of what the channels add to its output: (C,).

        The root of the mean square of each value times the squared norm of the weights reading it.
        """
        sizes = []
        for piece in self._consumers():
            weight = self._tensors[piece.tensor].movedim(piece.dim, 0).flatten(1)  # (D, fan)
            squares = self.evidence.activations[piece.tensor]["mean_square"]  # (D,)
            sizes.append(self._gathered(squares * weight.square().sum(1), piece).sqrt())
        return sizes

    def readers(self) -> list[Consumer]:
        """Return the layers that read the channels and were watched while they did."""
        found = []
        for piece in self._of("input"):
            seen = self.evidence.correlations.get((piece.tensor, self.name))
            products = self.evidence.products.get((piece.tensor, piece.dim))
            if seen is None or products is None:
                continue
            positions, matrix = seen
            order = positions.argsort()
            first = torch.as_tensor(piece.index[:, 0].copy())
            rows = order[torch.searchsorted(positions[order], first)]
            changes = self._gathered(products, piece)
            found.append(Consumer(matrix[rows][:, rows], self._values(piece), changes))
        return found

    def _seen(self, table: Mapping[tuple[str, int], Tensor], role: str) -> list[Tensor]:
        """Return what ``table`` holds for each slice of a role, unit by unit."""
        return [
            self._gathered(table[piece.tensor, piece.dim], piece)
            for piece in self._of(role)
            if (piece.tensor, piece.dim) in table
        ]

    def _consumers(self) -> list[Slice]:
        """Return the consuming slices whose inputs were seen."""
        return [p for p in self._of("input") if p.tensor in self.evidence.activations]

    def _of(self, role: str) -> list[Slice]:
        return [piece for piece in self._slices if piece.role == role]

    def _values(self, piece: Slice) -> Tensor:
        """Return the entries of one slice, unit by unit: (C, entries)."""
        tensor = self._tensors[piece.tensor].movedim(piece.dim, 0)
        index = torch.as_tensor(piece.index)
        if torch.equal(index, torch.arange(tensor.shape[0])[:, None]):  # all, in their order
            return tensor.reshape(self.size, -1)
        return tensor[index.to(tensor.device)].reshape(self.size, -1)

    def _norm(self, piece: Slice, power: int) -> Tensor:
        key = (piece.tensor, piece.dim, power)
        if key not in self._norms:
            self._norms[key] = norms_along(self._tensors[piece.tensor], piece.dim, power)
        found = self._norms[key][torch.as_tensor(piece.index, device=self._norms[key].device)]
        combined: Tensor = torch.linalg.vector_norm(found, power, dim=1)
        return combined

    def _gathered(self, per_position: Tensor, piece: Slice) -> Tensor:
        """Sum (..., D) over the positions that each unit owns: (..., C)."""
        return per_position[..., torch.as_tensor(piece.index)].sum(-1)


@runtime_checkable
class Criterion(Protocol):
    """A measure of importance.

    A data-driven one also says what it ``needs: ClassVar[Need]``, or several in a tuple:
    "gradients" of the loss on the labels, or of that on "answers" drawn from the network's own,
    softened by its ``temperature: float``; the "hessian" of the loss; "activations", or the
    "correlations" between them. It may say from how many images each gradient
    is taken: ``images_per_gradient: int``. ``estimates_loss = True`` says that its scores are
    changes of the loss, and therefore compare across groups as they are.
    """

    def __call__(self, group: ChannelGroup) -> Tensor:
        """Return the importance of each channel, (C,), finite, higher = keep."""


def norms_along(tensor: Tensor, dim: int, power: int) -> Tensor:
    """Return the L1 or L2 norm of the entries at each position of one dimension, (D,).

    Over dimension 1 of a large weight a plain reduction strides through memory and takes ten times
    as long; the sum over rows is a product with ones here, a few rows at a time.
    """
    others = [other for other in range(tensor.ndim) if other != dim]
    if not others:
        return tensor.abs()
    is_large = tensor.numel() > 4 * _CACHED
    if dim != 1 or not is_large or not tensor.is_contiguous() or not tensor.is_floating_point():
        found: Tensor = torch.linalg.vector_norm(tensor, power, dim=others)
        return found
    rows = tensor.flatten(1)
    total = rows.new_zeros(rows.shape[1])
    for part in torch.split(rows, max(1, _CACHED // rows.shape[1])):
        values = part.square() if power == 2 else part.abs()
        total.addmv_(values.T, total.new_ones(len(part)))
    total = total.reshape(tensor.shape[1], -1).sum(1)
    return total.sqrt() if power == 2 else total


def reduced(scores: list[Tensor], how: Reduction) -> Tensor:
    """Combine the scores that several layers give the same channels, each (C,), into one (C,)."""
    name = {"max": "amax", "min": "amin", "product": "prod"}.get(how, how)
    combined: Tensor = getattr(torch.stack(scores), name)(0)
    return combined


class CheckedOptions:
    """A dataclass whose options of a ``Literal`` type are checked when it is made."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(kind)
            if get_origin(kind) is Literal and value not in choices:
                listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise ValueError(f"{name} must be {listed}, not {value!r}")
