"""What tracing notes of a forward pass: its ops, where they come from, what rules are told."""

from __future__ import annotations

import functools
import linecache
import os
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.groups.labels import Axes, Axis, Labels
from compress.groups.network import Reduction

Place = tuple[str, int]  # file and line of the user's program
_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS = str(Path(__file__).parent) + os.sep
Key = tuple[str, str, int]  # an op and its place


@dataclass(frozen=True)
class RawCall:
    """A call as the program wrote it, before PyTorch turned it into ops, TracedInts and all."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the function's own name: ``view``, ``chunk``, ``__getitem__``."""
        return str(getattr(self.function, "__name__", ""))

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument given by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def sizes(self, start: int) -> tuple[Any, ...]:
        """Return what was given from a position on, or by name: single sizes, or a list of them."""
        given = self.args[start:] or tuple(self.kwargs.values())
        return tuple(given[0]) if len(given) == 1 and isinstance(given[0], Sequence) else given


NO_CALL = RawCall(None, (), {})


@dataclass(frozen=True)
class Step:
    """What one op did in the traced forward; a replay is compared with it."""

    name: str
    outputs: tuple[tuple[tuple[int, ...], Axes], ...]  # shape and labels of each output
    scalars: tuple[float, ...]
    inputs: tuple[Axes, ...]
    place: Place
    value: Any = None  # a number the op gave instead of tensors

    @property
    def key(self) -> Key:
        """Return the op and the line of the program it came from."""
        return (self.name, *self.place)


@dataclass(frozen=True)
class Use:
    """One matrix product or convolution with a weight: what the layer's cost is made of."""

    weight: str
    macs: int  # of the whole batch
    output: Axis
    input: Axis


@dataclass
class Call:
    """One op on its way through the rules."""

    name: str
    func: Any  # the op; the program's function where a call is followed as a whole
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Tensor, ...]
    raw: RawCall
    is_reduction: bool = False  # across channels that can be cut
    mask_only: bool = False

    def argument(self, position: int, default: Any = None) -> Any:
        """Return the positional argument, or ``default`` where the op got fewer."""
        return self.args[position] if position < len(self.args) else default


@dataclass
class TraceRecord:
    """Everything one forward left behind."""

    training: bool  # the mode it was made in
    steps: list[Step] = field(default_factory=list)
    reductions: list[Reduction[Labels]] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    taken: list[Any] = field(default_factory=list)  # values that the program took out, in order
    touched: dict[str, None] = field(default_factory=dict)  # tensors of the model, in order of use
    indexed: dict[str, Labels] = field(default_factory=dict)  # buffer -> channels it picks from
    occurrences: dict[str, int] = field(default_factory=dict)


@functools.cache
def _is_foreign(code: types.CodeType) -> bool:
    """Say whether code is PyTorch's, or ours: not the user's program."""
    return code.co_filename.startswith((_TORCH, _OURS, "<"))


def program_place() -> Place:
    """Return file and line of the user's program that is running now.

    A network made of PyTorch's modules alone has no program of its own: then it is the line of
    PyTorch that called the op.
    """
    frame: types.FrameType | None = sys._getframe(1)
    innermost: Place | None = None
    while frame is not None:
        code = frame.f_code
        if not _is_foreign(code):
            return code.co_filename, frame.f_lineno
        if innermost is None and not code.co_filename.startswith(_OURS):
            innermost = code.co_filename, frame.f_lineno
        if code.co_name == "run_traced" and code.co_filename.startswith(_OURS):
            break
        frame = frame.f_back
    return innermost or ("", 0)


def place_of(error: BaseException) -> Place:
    """Return file and line of the user's program where an exception passed last."""
    found: Place = ("", 0)
    trail = error.__traceback__
    while trail is not None:
        if not _is_foreign(trail.tb_frame.f_code) or found == ("", 0):
            found = trail.tb_frame.f_code.co_filename, trail.tb_lineno
        trail = trail.tb_next
    return found


def here() -> str:
    """Return file, line and text of the user's program that is running now."""
    return place_text(program_place())


def place_text(at: Place) -> str:
    """Return a place as text: the end of the file's path, the line, and what it says."""
    file, line = at
    text = linecache.getline(file, line).strip()
    return f"{'/'.join(Path(file).parts[-2:])}:{line} ({text})"
