"""The calls of a program and its ops: how they are seen, named and run.

On the meta device the shapes of the most frequent ops are known beforehand.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def words(text: str) -> tuple[str, ...]:
    """Return the names in a line of text."""
    return tuple(text.split())


WHOLE: Mapping[str, tuple[str, ...]] = {  # followed as one op each: names of tensors it takes
    "scaled_dot_product_attention": words("query key value"),
    "local_response_norm": words("input"),
    **dict.fromkeys(words("quantile nanquantile"), words("input")),
    **dict.fromkeys(words("lstm gru rnn_tanh rnn_relu"), ()),
}
MAKERS = frozenset(("tensor", "as_tensor", "new_tensor"))  # of numbers: followed as one op each
TAKERS = frozenset(("tolist", "numpy", "__array__"))  # they give values that are no tensors


_SEEN_THROUGH = {
    name: (lambda *_: False) if name.startswith("has_torch_function") else value
    for name, value in vars(F).items()
}


@functools.cache
def _without_override_check(function: types.FunctionType) -> types.FunctionType:
    """Return a copy of a function of torch.nn.functional that does not ask who overrides it.

    Such a function hands itself over as a whole before anything else; the calls in its body, with
    the shapes they are given, are seen only in a copy that does not.
    """
    made_of = function.__name__, function.__defaults__, function.__closure__
    copy = types.FunctionType(function.__code__, _SEEN_THROUGH, *made_of)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def whole_name(func: Any, args: Sequence[Any]) -> str | None:
    """Return the name of a call that is followed as a whole, None for any other."""
    name = getattr(func, "__name__", None)
    if name in MAKERS:
        data: Any = args[-1 if name == "new_tensor" else 0] if args else None
        if type(data) in {list, tuple} and len(data) == 1:
            data = data[0]
        is_number = isinstance(data, int | float) and not isinstance(data, bool)
        return name if is_number else None
    return name if name in WHOLE else None


SILENT = frozenset({"detach", "alias", "lift_fresh"})  # they come and go without meaning
UNCOMPARED = SILENT | {"clone"}  # whether reshape copies before it views depends on the sizes

# Integers that these ops take describe shapes, which a cut changes: they are checked as shapes.
_SHAPE_OPS = frozenset(
    words(
        "view reshape expand repeat split split_with_sizes slice convolution "
        "constant_pad_nd native_group_norm native_layer_norm zeros ones full empty rand "
        "randn new_zeros new_ones new_full new_empty arange empty_strided "
        "new_empty_strided unsafe_split unsafe_split_with_sizes as_strided narrow unfold "
        "select linspace unbind slice_scatter torchvision::deform_conv2d"
    )
)


@functools.cache
def op_name(func: OpOverload) -> str:
    """Return the name of an op without namespace, overload and in-place mark: ``add``."""
    name = str(func._schema.name).removeprefix("aten::")
    if name == "_unsafe_view":  # what reshape calls after a copy
        return "view"
    return name if name.endswith("__") else name.removesuffix("_")


@functools.cache
def is_pointwise(func: OpOverload) -> bool:
    """Say whether PyTorch tags ``func`` as pointwise."""
    return torch.Tag.pointwise in func.tags


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results, one level of lists deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


_TAKES_BOOLEANS = frozenset(words("index index_put"))


def depends_on_values(func: OpOverload, args: Any) -> bool:
    """Say whether the shapes of an op's results depend on the values it is given."""
    name = op_name(func)
    if name in _TAKES_BOOLEANS:
        return any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1]))
    return torch.Tag.dynamic_output_shape in func.tags or name.endswith("::nms")


def scalars_in(name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the numbers an op was given that a cut must not change."""
    shapes = name in _SHAPE_OPS
    found: list[float] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, float) or (not shapes and isinstance(value, int)):
            found.append(float(value))
        elif not shapes and isinstance(value, list | tuple):
            found.extend(float(v) for v in value if isinstance(v, int | float))
    return tuple(found)


_FACTORIES = frozenset(
    words(
        "zeros ones full empty rand randn arange linspace eye scalar_tensor randint "
        "randperm empty_strided"
    )
)


def _same_device(args: tuple[Any, ...]) -> tuple[Any, ...]:
    if len({t.is_meta for t in tensors_in(args) if t.ndim}) < 2:
        return args

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to("meta") if value.ndim else value
        return type(value)(map(move, value)) if type(value) in {tuple, list} else value

    return tuple(map(move, args))


def _same_shape(func: OpOverload, args: tuple[Any, ...]) -> Any:
    """Unary and same-shape binary ops: nothing to compute on the meta device."""
    first = args[0]
    if not isinstance(first, Tensor) or not first.is_meta or not first.is_floating_point():
        return NotImplemented
    for other in args[1:]:
        if isinstance(other, Tensor) and (
            other.shape != first.shape or other.dtype != first.dtype or other.device != first.device
        ):
            return NotImplemented
    return first if func._schema.is_mutable else first.new_empty(first.shape)


def _batch_norm(func: OpOverload, args: tuple[Any, ...]) -> Any:
    x, training = args[0], args[5]
    if training or not x.is_meta:
        return NotImplemented
    none = x.new_empty(0)
    return x.new_empty(x.shape), none, none


def _layer_norm(func: OpOverload, args: tuple[Any, ...]) -> Any:
    x, over = args[0], args[1]
    if not x.is_meta or tuple(x.shape[-len(over) :]) != tuple(over):
        return NotImplemented
    statistics = x.new_empty((*x.shape[: -len(over)], *([1] * len(over))))
    return x.new_empty(x.shape), statistics, statistics.clone()


def _addmm(func: OpOverload, args: tuple[Any, ...]) -> Any:
    bias, first, second = args[:3]
    alike = first.is_meta and first.dtype == second.dtype == bias.dtype
    if not alike or first.shape[1] != second.shape[0] or bias.shape != second.shape[1:]:
        return NotImplemented
    return first.new_empty((first.shape[0], second.shape[1]))


_FAST: dict[str, Callable[[OpOverload, tuple[Any, ...]], Any]] = {
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    "addmm": _addmm,
    **dict.fromkeys(
        words(
            "relu hardtanh hardswish hardsigmoid sigmoid silu gelu elu leaky_relu tanh mish add mul"
        ),
        _same_shape,
    ),
}


class WatchedOps(TorchDispatchMode):
    """A mode in which ``op`` runs every op, but those inside a call that is followed as a whole.

    Args:
        on: The meta device; None leaves tensors where the program has them.
    """

    def __init__(self, on: torch.device | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._on = on
        self._inside_whole = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    def run(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an op gives; tensors that the program made elsewhere are taken along."""
        if self._on is None:
            return func(*args, **kwargs)
        name = op_name(func)
        if (fast := _FAST.get(name)) is not None and not kwargs:
            result = fast(func, args)
            if result is not NotImplemented:
                return result
        if name in _FACTORIES and not any(True for _ in tensors_in(args)):
            kwargs = {**kwargs, "device": self._on}
        else:
            args = _same_device(args)
        return func(*args, **kwargs)

    def op(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an op gives."""
        return self.run(func, args, kwargs)

    def whole(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a call gives that is followed as one op; its own ops just run."""
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def inside_whole(self) -> Iterator[None]:
        """Let ops just run: those of a call that is followed as a whole."""
        self._inside_whole = True
        try:
            yield
        finally:
            self._inside_whole = False

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return (self.run if self._inside_whole else self.op)(func, args, kwargs or {})


class WatchedCalls(TorchFunctionMode, abc.ABC):
    """A mode in which ``call`` makes every call, also those inside PyTorch's own functions."""

    @abc.abstractmethod
    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the call gives."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.call(func, args, kwargs or {})

    def inside(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what ``func`` gives; the calls in its body come to this mode."""
        if isinstance(func, types.FunctionType) and func.__globals__ is vars(F):
            with self:
                return _without_override_check(func)(*args, **kwargs)
        return func(*args, **kwargs)


def _rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: Any = None
) -> Tensor:
    """The norm in single ops on every device: GPUs make one of it, which hides its mean."""
    sizes = tuple(x.shape[x.ndim - len(normalized_shape) :])
    if sizes != tuple(normalized_shape):
        raise ValueError(f"an RMS norm over {tuple(normalized_shape)} does not fit {sizes}")
    dims = list(range(-len(sizes), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    x = x * torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + eps)
    return x if weight is None else x * weight


class FollowedCalls(WatchedCalls):
    """Hands calls followed as a whole to ``ops``, also those inside PyTorch's functions."""

    def __init__(self, ops: WatchedOps) -> None:
        super().__init__()
        self._ops = ops

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of the program."""
        if func is torch.rms_norm:
            return _rms_norm(*args, **kwargs)
        if (name := whole_name(func, args)) is None:
            return self.inside(func, args, kwargs)
        rest = dict(kwargs)  # rules and the masked reference look for tensors among positions
        by_name = itertools.takewhile(rest.__contains__, WHOLE.get(name, ())[len(args) :])
        args = (*args, *(rest.pop(key) for key in list(by_name)))
        with self._ops.inside_whole():
            return self._ops.whole(name, func, args, rest)
