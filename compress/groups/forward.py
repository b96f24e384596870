"""One forward pass of a copy: its inputs, what watches it, what is noted, what it leaves behind."""

from __future__ import annotations

import contextlib
import functools
import linecache
import os
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from compress.errors import ModelError, PlanError
from compress.groups.labels import Axes, Axis, Labels
from compress.groups.network import Reduction
from compress.modules.inputs import copied
from compress.modules.outputs import leaves

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
    is_weighted: bool = False  # a layer that weighs its inputs
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
    # Ops whose plain numbers may be shares of widths
    guessed: set[Key] = field(default_factory=set)


@functools.cache
def _is_foreign(code: types.CodeType) -> bool:
    """Say whether code is PyTorch's, or ours: not the user's program."""
    return code.co_filename.startswith((_TORCH, _OURS, "<"))


def program_place() -> Place:
    """Return file and line of the user's program that is running now.

    A network made of PyTorch's modules alone has no program of its own: then it is the line of
    PyTorch that called the op.
    """
    innermost: Place | None = None
    for frame in _frames():
        place = frame.f_code.co_filename, frame.f_lineno
        if not _is_foreign(frame.f_code):
            return place
        if innermost is None and not place[0].startswith(_OURS):
            innermost = place
    return innermost or ("", 0)


def _frames() -> Iterator[types.FrameType]:
    """Yield the frames that run now, from the innermost out to that of ``run_traced``."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        is_ours = frame.f_code.co_filename.startswith(_OURS)
        frame = None if is_ours and frame.f_code.co_name == "run_traced" else frame.f_back


_ROUNDING = frozenset(("int", "round", "floor", "ceil", "trunc"))


def rounds_numbers() -> bool:
    """Say whether the program that runs now, or what called it, makes whole numbers of others.

    ``int(x.shape[1] / 2)`` is a plain number, and cannot be told from one that is written there.
    """
    programs = (frame.f_code for frame in _frames() if not _is_foreign(frame.f_code))
    return any(not _ROUNDING.isdisjoint(code.co_names) for code in programs)


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


def batch_size(inputs: Any) -> int:
    """Return how many images the first input holds."""
    for leaf in tree_leaves(inputs, is_leaf=_is_images):
        if _is_images(leaf) or (isinstance(leaf, Tensor) and leaf.ndim):
            return len(leaf)
    return 1


def inputs_in(inputs: Any, training: bool) -> Any:
    """Return a copy of inputs; in training mode of two images at least, for batch statistics."""
    inputs = copied(inputs)  # a network may write into them
    if not training or batch_size(inputs) > 1:
        return inputs
    return tree_map(_twice, inputs, is_leaf=_is_images)


def _twice(value: Any) -> Any:
    """Return one image, or a list of them, twice; anything else as it is."""
    if _is_images(value):
        return [*value, *value]
    is_one = isinstance(value, Tensor) and value.ndim and len(value) == 1
    return torch.cat([value, value]) if is_one else value


def _is_images(value: Any) -> bool:
    """Say whether ``value`` is a list of images (C, H, W) of any sizes, as detectors take them."""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(each, Tensor) and each.ndim == 3 for each in value)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No gradients, and the random number generators afterwards as they were before."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        yield


@contextlib.contextmanager
def _shapes_computed_anew() -> Iterator[None]:
    """Keep einops from its memory of shapes, in which equal widths of two layers are one.

    What it computed for the first layer would come back for the second with the first one's tags,
    and their channels could only be cut alike.
    """
    module = sys.modules.get("einops.einops")
    remembering = getattr(module, "_reconstruct_from_shape", None)
    computing = getattr(remembering, "__wrapped__", None)
    if computing is None:
        yield
        return
    setattr(module, "_reconstruct_from_shape", computing)  # noqa: B010 - a name that is not public
    try:
        yield
    finally:
        setattr(module, "_reconstruct_from_shape", remembering)  # noqa: B010


@contextlib.contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """Undo, afterwards, what happens to attributes of modules: tags, and caches of a forward."""

    def shallow(value: Any) -> Any:  # the module's buffers and hooks are in containers
        return value.copy() if type(value) in {dict, OrderedDict, list, set} else value

    before = [
        (module, {name: shallow(value) for name, value in module.__dict__.items()})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)


def left_on_attributes(
    model: nn.Module, before: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[Tensor]]:
    """Return tensors that a forward left on attributes of modules, by their names."""
    found = {}
    for place, module in model.named_modules():
        for name, value in module.__dict__.items():
            if value is not before.get(place, {}).get(name):
                tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
                found[f"{place}.{name}".lstrip(".")] = tensors
    return {name: tensors for name, tensors in found.items() if tensors}


def run_traced(
    model: nn.Module, inputs: Any, ops: TorchDispatchMode, calls: TorchFunctionMode
) -> list[tuple[str, Any]]:
    """Return what ``model`` returns, by places as of ``leaves``, while two modes watch.

    Raises:
        PlanError: the network raised an error, or returns what cannot be looked into;
            MismatchError: a replay went another way.
    """
    args, kwargs = inputs
    try:
        with undisturbed(), _shapes_computed_anew(), ops, calls:
            return leaves(model(*args, **kwargs))  # iterators run on while they are read
    except MismatchError:
        raise
    except ModelError as error:
        parts = {"where": error.where, "expected": error.expected, "fix": error.fix}
        raise PlanError(error.what, **parts) from None
    except Exception as error:
        raise PlanError(
            f"the network does not run on the example input: {type(error).__name__}: {error}",
            where=type(model).__name__,
            expected="an example that the network accepts",
        ) from error


class MismatchError(Exception):
    """The pruned network did something else, at some step, than the record says it must.

    ``other_op`` says that it is another op than the original's, not the same one on other shapes.
    """

    def __init__(self, step: int, key: Key, why: str, *, other_op: bool = False) -> None:
        super().__init__(why)
        self.step, self.key, self.why, self.other_op = step, key, why, other_op
        self.forward = 0  # which of the traced forwards it was, set by who ran them


def needs_values(error: BaseException | None) -> bool:
    """Say whether a program failed because tensors on the meta device have no values."""
    return isinstance(error, NotImplementedError) or "meta" in str(error)


def has_own_hooks(model: nn.Module) -> bool:
    """Say whether hooks that are not PyTorch's (weight norm's are) run with the network."""
    everywhere = torch.nn.modules.module
    found = [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks]
    for module in model.modules():
        found += [module._forward_hooks, module._forward_pre_hooks]
    every = (hook for hooks in found for hook in hooks.values())
    return not all(str(getattr(hook, "__module__", "")).startswith("torch.") for hook in every)
