"""What a layer sees at each place of its answer, and weights fitted to that by ridge regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn import functional as F

from compress.groups.calls import WatchedOps, op_name

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = Conv | nn.Linear | Transposed
Sides = tuple[int, ...]
SAME = 1e-3  # of a weight's norm: what it may differ by from the one that was asked for


@dataclass(frozen=True)
class Sliding:
    """Sizes by dimension of the input, in its order."""

    kernel: Sides
    stride: Sides
    dilation: Sides
    before: Sides  # padding, of a transposed convolution what its output loses
    after: Sides


def sliding(layer: Any) -> Sliding:
    """Return how a convolution slides, whatever was set on it since it was built.

    Backbones are dilated after the fact by new strides, dilations and paddings, as tuples or single
    numbers. Torch keeps a copy of the padding as it was built: only modes other than zeros read it.
    """
    kernel = tuple(layer.weight.shape[2:])
    stride, dilation = (by_dimension(each, len(kernel)) for each in (layer.stride, layer.dilation))
    if layer.padding_mode != "zeros":
        around = layer._reversed_padding_repeated_twice  # last dimension first, before and after
        before, after = tuple(around[0::2][::-1]), tuple(around[1::2][::-1])
    elif layer.padding == "same":
        missing = [step * (side - 1) for step, side in zip(dilation, kernel, strict=True)]
        before = tuple(each // 2 for each in missing)
        after = tuple(each - each // 2 for each in missing)
    else:
        given = 0 if layer.padding == "valid" else layer.padding
        before = after = by_dimension(given, len(kernel))
    return Sliding(kernel, stride, dilation, before, after)


def by_dimension(given: int | Sequence[int], dimensions: int) -> Sides:
    """Return one number for each dimension where one may stand for all."""
    sides = (given,) if isinstance(given, int) else tuple(given)
    return sides * dimensions if len(sides) == 1 else sides


def is_linear_in_its_weight(module: nn.Module, x: Tensor, answer: Any) -> bool:
    """Say whether what it answered to ``x`` is one product with its weight, plus its bias.

    Of torch's own classes it is, but for transposed convolutions in groups, which are not read. A
    class derived from them may do anything: it is where a single product with the weight as it is,
    or one that it computes of its parameters whatever it reads, comes last, behind any padding.
    """
    is_own = module._parameters.get("weight") is not None
    if is_own and type(module) in get_args(Layer):
        return not isinstance(module, Transposed) or module.groups == 1
    if not isinstance(answer, Tensor):
        return False
    if isinstance(module, nn.Linear):
        fits = module.weight.ndim == 2 and x.shape[-1:] == module.weight.shape[1:]
        return is_own and fits and torch.equal(F.linear(x, module.weight, module.bias), answer)
    product = _product(module, x, answer) if isinstance(module, Conv) else None
    if product is None:
        return False
    return product[1] is module._parameters.get("weight") or computed_weight(module) is not None


def computed_weight(layer: nn.Module) -> Tensor | None:
    """Return the weight that a convolution computes of its parameters, standardized ones say.

    None where it takes its weight as it is, or computes it of what it reads.
    """
    if not isinstance(layer, Conv):
        return None
    weight = layer.weight
    how = sliding(layer)
    extent = [step * (side - 1) + 1 for side, step in zip(how.kernel, how.dilation, strict=True)]
    size = (1, weight.shape[1] * layer.groups, *extent)
    found = [_product(layer, weight.new_full(size, value), renew=True) for value in (0.0, 1.0)]
    weights = [product[1] for product in found if product is not None]
    if len(weights) < 2 or weights[0] is layer._parameters.get("weight"):
        return None
    return weights[0].detach() if torch.equal(*weights) else None


def computed_from(layer: nn.Module) -> str | None:
    """Return the name of the parameter that is, or alone has the shape of, a layer's weight."""
    if layer._parameters.get("weight") is not None:
        return "weight"
    shape: Any = layer.weight.shape
    names = [name for name, each in layer.named_parameters() if each.shape == shape]
    return names[0] if len(names) == 1 else None


def set_computed(layer: nn.Module, wanted: Tensor) -> bool:
    """Change the parameters so that the layer computes the weight ``wanted``, if they can.

    One has its shape, perhaps another a factor for each filter, or buffers give one for all: the
    vectors that a spectral norm is taken with. Else all stay as they were.
    """
    name = computed_from(layer)
    own = dict(chain(layer.named_parameters(), layer.named_buffers()))
    own = {key: each for key, each in own.items() if key != "bias" and each.is_floating_point()}
    before = {key: each.clone() for key, each in own.items()}
    if name is None:
        return False
    own.pop(name).copy_(wanted)
    gains = [each for each in own.values() if each.numel() == len(wanted)]
    if gains and (found := computed_weight(layer)) is not None:
        filters, asked = found.flatten(1), wanted.flatten(1)
        factor = (filters * asked).sum(1) / (filters**2).sum(1).clamp_min(1e-30)
        if isinstance(gains[0], nn.Parameter):
            gains[0].mul_(factor.view_as(gains[0]))
        else:
            gains[0].div_(factor.mean())
    found = computed_weight(layer)
    if found is not None and (found - wanted).norm() <= SAME * wanted.norm():
        return True
    for key, each in chain(layer.named_parameters(), layer.named_buffers()):
        if key in before:
            each.copy_(before[key])
    return False


def filters_of(layer: Layer) -> Tensor:
    """Return the weight by outputs: (O, ...), as a convolution with the same answers has it."""
    return mirrored(layer, layer.weight)


def mirrored(layer: Layer, weight: Tensor) -> Tensor:
    """Return a transposed convolution's weight as a convolution's, or back; others as they are."""
    is_transposed = isinstance(layer, Transposed)
    return weight.transpose(0, 1).flip(*range(2, weight.ndim)) if is_transposed else weight


def answered_rows(layer: Layer, answer: Tensor, places: Any, kept: Tensor | None) -> Tensor:
    """Return what is answered at some places, (rows, O), of all channels or of those kept."""
    if isinstance(layer, nn.Linear):
        rows = answer.flatten(0, -2)
    else:
        index: Any = [torch.as_tensor(place, device=answer.device) for place in places]
        rows = answer[:, :, *index].transpose(1, 2).flatten(0, 1)
    return rows if kept is None else rows[:, kept]


def seen_rows(layer: Layer, x: Tensor, places: Sequence[Any] | None) -> Tensor:
    """Return what a layer sees at some places, or all a linear layer sees: (G, rows, F)."""
    if isinstance(layer, nn.Linear) or places is None:
        return x.flatten(0, -2).unsqueeze(0)
    padded, how = _slid_over(layer, x)
    dimensions = len(places)
    index: list[Any] = [slice(None), slice(None)]
    for axis, place in enumerate(places):
        offsets = np.arange(how.kernel[axis]) * how.dilation[axis]
        shape = [len(place)] + [1] * dimensions
        shape[1 + axis] = len(offsets)
        index.append(
            torch.as_tensor(
                (place[:, None] * how.stride[axis] + offsets).reshape(shape), device=x.device
            )
        )
    window = padded[tuple(index)]  # (B, C, places, kernel...)
    batch, channels, count = window.shape[:3]
    window = window.reshape(batch, layer.groups, channels // layer.groups, count, -1)
    return window.permute(1, 0, 3, 2, 4).reshape(layer.groups, batch * count, -1)


def _slid_over(layer: Any, x: Tensor) -> tuple[Tensor, Sliding]:
    """Return what a kernel slides over, padding included, and how it does."""
    if isinstance(layer, Transposed):
        how = sliding(layer)
        return _spread(layer, x, how), Sliding(
            how.kernel, (1,) * len(how.kernel), how.dilation, (), ()
        )
    product = None if type(layer) in get_args(Conv) else _product(layer, x)
    if product is not None:
        (x, _, _, stride, padding, dilation, *_), mode = product, "constant"
        kernel = tuple(layer.weight.shape[2:])
        sides = (by_dimension(each, len(kernel)) for each in (stride, dilation, padding, padding))
        how = Sliding(kernel, *sides)
    else:
        how = sliding(layer)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    around = zip(reversed(how.before), reversed(how.after), strict=True)
    return F.pad(x, [*chain.from_iterable(around)], mode=mode), how


class _Last(WatchedOps):
    """Keeps the last op of a forward, its arguments and its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.args: tuple[Any, ...] = ()
        self.answer: Any = None

    def op(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.name, self.args, self.answer = op_name(func), args, func(*args, **kwargs)
        return self.answer


def _product(
    layer: Any, x: Tensor, answer: Tensor | None = None, *, renew: bool = False
) -> tuple[Any, ...] | None:
    """Return the arguments of the convolution by a weight and its bias that ends a layer's forward.

    None where it ends in anything else, or its ``answer`` is another. With ``renew`` hooks compute
    the weight anew before.
    """
    with _Last() as last:
        try:
            for hook in layer._forward_pre_hooks.values() if renew else ():
                hook(layer, (x,))
            layer.forward(x)
        except Exception:  # noqa: BLE001 - a class of somebody else's may want more
            return None
    if last.name != "convolution" or last.args[8] != layer.groups:
        return None
    if last.args[1].shape != layer.weight.shape or last.args[2] is not layer.bias:
        return None
    is_it = answer is None or torch.equal(last.answer, answer)
    return last.args if is_it else None


def _spread(layer: Any, x: Tensor, how: Sliding) -> Tensor:
    """Return the input over which a transposed convolution slides: zeros between and around."""
    strides = how.stride
    more = by_dimension(layer.output_padding, len(strides))
    extent = [(side - 1) * step + 1 for side, step in zip(x.shape[2:], strides, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *extent)
    every: list[slice] = [slice(None)] * 2 + [slice(None, None, step) for step in strides]
    spread[tuple(every)] = x
    padding: list[int] = []
    for axis in reversed(range(len(extent))):
        edge = how.dilation[axis] * (how.kernel[axis] - 1) - how.before[axis]
        padding += [edge, edge + more[axis]]
    return F.pad(spread, padding)


PULL = 1e-2  # r, as a share of the inputs' mean square, where the samples are ENOUGH
ENOUGH = 64  # samples for each feature; with fewer r is larger by as much


class Ridge:
    """Finds the change D of weights that minimizes |X D - L|^2 + r |D|^2, group by group.

    X (G, rows, F) is what a layer sees, L (G, rows, O) what its answers lack. D is
    (X'X + r)^-1 X'L and, the same, X'(XX' + r)^-1 L: with fewer rows than features the second is
    solved, and nothing is larger than X.

    Source: Hoerl and Kennard, Ridge Regression: Biased Estimation for Nonorthogonal Problems,
    Technometrics 12, 1970; the second form is from Saunders et al., Ridge Regression Learning
    Algorithm in Dual Variables, ICML 1998.
    """

    def __init__(self, rows: int, features: int) -> None:
        """Expect at most so many samples of so many features."""
        self.rows = 0
        self._features = features
        self._is_wide = rows < features
        self._seen: list[Tensor] = []  # X, where it is wide
        self._squares: Tensor | float = 0.0  # X'X of others
        self._wanted: list[Tensor] = []  # L, or X'L
        self._factor: Tensor | None = None

    @property
    def is_solved(self) -> bool:
        """Say whether the samples are known, and only what is lacking is still taken."""
        return self._factor is not None

    def add(self, seen: Tensor, lack: Tensor) -> None:
        """Take the samples of one batch; after a solution the same again, with other lacks."""
        self._wanted.append(lack if self._is_wide else (seen.mT @ lack).double())
        if self.is_solved:
            return
        self.rows += seen.shape[1]
        if self._is_wide:
            self._seen.append(seen)
        else:
            self._squares = self._squares + (seen.mT @ seen).double()

    def solve(self) -> Tensor:
        """Return D (G, F, O) in float64, NaN where there is none, and forget what was lacking."""
        seen = torch.cat(self._seen, 1) if self._is_wide else None
        if self._factor is None:
            squares = self._squares if seen is None else (seen @ seen.mT).double()
            self._factor = self._decomposed(torch.as_tensor(squares))
        wanted = sum(self._wanted) if seen is None else torch.cat(self._wanted, 1).double()
        self._wanted.clear()
        found = torch.cholesky_solve(torch.as_tensor(wanted), self._factor)
        return found if seen is None else seen.mT.double() @ found

    def _decomposed(self, squares: Tensor) -> Tensor:
        """Return the Cholesky factor of X'X + r or XX' + r: (G, N, N)."""
        diagonal = squares.diagonal(dim1=1, dim2=2)
        mean = diagonal.sum(1, keepdim=True) / self._features
        pull = PULL * max(1.0, ENOUGH * self._features / self.rows)
        diagonal += pull * mean.clamp_min(1e-12)
        factor: Tensor
        factor, fault = torch.linalg.cholesky_ex(squares)
        factor[fault > 0] = torch.nan
        return factor
