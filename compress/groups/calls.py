"""The calls of a program, also those inside the functions of torch.nn.functional."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

WHOLE = frozenset(  # followed as one op each
    (
        "scaled_dot_product_attention",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
        "quantile",
        "nanquantile",
    )
)
TAKERS = frozenset(("tolist", "numpy", "__array__"))  # they give values that are no tensors


def _never(*tensors: Any) -> bool:
    return False


_SEEN_THROUGH = {
    name: _never if name.startswith("has_torch_function") else value
    for name, value in vars(F).items()
}
_OPENED: dict[types.FunctionType, types.FunctionType] = {}


def opened(function: types.FunctionType) -> types.FunctionType:
    """Return a copy of a function of torch.nn.functional that does not ask who overrides it.

    Such a function hands itself over as a whole before anything else; the calls in its body, with
    the shapes they are given, are seen only in a copy that does not.
    """
    if function not in _OPENED:
        copy = types.FunctionType(
            function.__code__,
            _SEEN_THROUGH,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        _OPENED[function] = copy
    return _OPENED[function]


def whole_name(func: Any) -> str | None:
    """Return the name of a call that is followed as a whole, None for any other."""
    name = getattr(func, "__name__", None)
    return name if name in WHOLE else None


class WatchedCalls(TorchFunctionMode):
    """A mode that sees the calls inside PyTorch's own functions as well."""

    def inside(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what ``func`` gives; the calls in its body come to this mode."""
        if isinstance(func, types.FunctionType) and func.__globals__ is vars(F):
            with self:
                return opened(func)(*args, **kwargs)
        return func(*args, **kwargs)
