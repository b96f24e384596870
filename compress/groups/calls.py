"""The calls of a program, also those inside the functions of torch.nn.functional."""

from __future__ import annotations

import abc
import contextlib
import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from compress.groups import meta_ops

WHOLE = frozenset(  # followed as one op each
    (
        "scaled_dot_product_attention",
        "quantile",
        "nanquantile",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
    )
)
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
        data = args[-1 if name == "new_tensor" else 0] if args else None
        if type(data) in {list, tuple} and len(data) == 1:
            data = data[0]
        is_number = isinstance(data, int | float) and not isinstance(data, bool)
        return name if is_number else None
    return name if name in WHOLE else None


class WatchedOps(TorchDispatchMode):
    """A mode in which ``op`` runs every op, but those inside a call that is followed as a whole.

    Args:
        on: The meta device; None leaves tensors where the program has them.
    """

    def __init__(self, on: torch.device | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._on = on
        self._inside_whole = False

    def run(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an op gives."""
        return meta_ops.run_op(func, args, kwargs, self._on)

    def op(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an op gives."""
        return self.run(func, args, kwargs)

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
        """Run one op."""
        return (self.run if self._inside_whole else self.op)(func, args, kwargs or {})


class WatchedCalls(TorchFunctionMode, abc.ABC):
    """A mode in which ``call`` makes every call, also those inside PyTorch's own functions."""

    @abc.abstractmethod
    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the call gives."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Make one call of the program."""
        return self.call(func, args, kwargs or {})

    def inside(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what ``func`` gives; the calls in its body come to this mode."""
        if isinstance(func, types.FunctionType) and func.__globals__ is vars(F):
            with self:
                return _without_override_check(func)(*args, **kwargs)
        return func(*args, **kwargs)
