"""Run a pruned copy on the meta device against the record of the original, op by op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from compress.errors import PlanError
from compress.groups.calls import (
    MAKERS,
    TAKERS,
    UNCOMPARED,
    FollowedCalls,
    WatchedOps,
    depends_on_values,
    is_pointwise,
    op_name,
    scalars_in,
    tensors_in,
)
from compress.groups.forward import (
    MismatchError,
    Step,
    TraceRecord,
    here,
    inputs_in,
    needs_values,
    place_of,
    place_text,
    run_traced,
    undisturbed,
)
from compress.groups.labels import Axis
from compress.groups.network import Positions, Reduction
from compress.modules import set_mode

Stays = npt.NDArray[np.bool_]  # (labels,): whether the channel with this label is kept


class TraceComparison(WatchedOps):
    """Compares every op with its step in the record: name, numbers and expected shapes.

    Where the original's program took values, the copy gets the same ones.
    """

    def __init__(self, record: TraceRecord, stays: Stays, on: torch.device | None) -> None:
        super().__init__(on)
        self._steps = record.steps
        self._taken = iter(record.taken)
        self._stays = stays
        self._done = 0
        self._running = False  # an op runs: what is raised comes from it, not from the program
        self._sizes: dict[int, int] = {}
        self._calls: dict[str, int] = {}
        self.numbers: list[Reduction[Positions]] = []  # given other numbers than in the original

    def op(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one op and compare it."""
        name = op_name(func)
        if name in UNCOMPARED:
            return self.run(func, args, kwargs)
        dynamic = self._on is None and depends_on_values(func, args)
        scalars = scalars_in(name, args, kwargs)
        pointwise = is_pointwise(func)
        self._check_numbers(str(func), name, scalars, may_follow=pointwise)
        if dynamic and name == "index_put":  # what it writes is as long as in the original
            return self._compare(name, lambda: args[0], dynamic=True)
        return self._compare(name, lambda: self.run(func, args, kwargs), dynamic=dynamic)

    def whole(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that was followed as one op and compare it."""
        if name in MAKERS:
            scalars = scalars_in(name, args, kwargs)
            self._check_numbers(f"aten.{name}.whole", name, scalars, may_follow=True)
        else:
            self._check_step(name)
        return self._compare(name, lambda: func(*args, **kwargs))

    def _check_step(self, name: str) -> Step:
        step = None if self.finished else self._steps[self._done]
        if step is not None and step.name == name:
            return step
        more = "does more than the original"
        why = more if step is None else f"calls {name} where the original {step.name}"
        raise self._mismatch(f"the pruned network {why}", other_op=True)

    def _check_numbers(
        self, op: str, name: str, scalars: tuple[float, ...], *, may_follow: bool
    ) -> None:
        """Note an op that works position by position with a number of channels, refuse others.

        A scale like ``width ** -0.5`` means that of the pruned network as soon as it is pruned.
        """
        occurrence = self._calls.get(name, 0)
        self._calls[name] = occurrence + 1
        step = self._check_step(name)
        if scalars == step.scalars:
            return
        if not may_follow or len(scalars) != len(step.scalars):
            raise self._mismatch(f"{name} is given a number that depends on the channel count")
        self.numbers.append(Reduction(op, occurrence, {}, {}, numbers=True))

    def _compare(self, name: str, run: Callable[[], Any], *, dynamic: bool = False) -> Any:
        step = self._steps[self._done]
        self._running = True
        result = run()
        self._running = False
        expected = [tuple(map(self._kept, shape, axes)) for shape, axes in step.outputs]
        if dynamic:
            result = _reshaped(result, iter(expected))
        shapes = [tuple(out.shape) for out in tensors_in(result)]
        if shapes != expected:
            found = f"{name} gives {_write(shapes)} where {_write(expected)} should remain"
            raise self._mismatch(f"channel counts written in the program: {found}")
        self._done += 1
        return result if step.value is None else step.value

    def take(self, value: Any) -> Any:
        """Return what the original's program got where this one takes ``value``."""
        return next(self._taken, value)

    @property
    def finished(self) -> bool:
        """Say whether every step of the record was seen."""
        return self._done == len(self._steps)

    def failure(self, error: Exception) -> MismatchError:
        """Return what an exception in the middle of the replay means."""
        if isinstance(error, MismatchError):
            return error
        cause = error.__cause__ or error
        text = str(cause).split("\n")[0]
        why = f"channel counts written in the program: {text} at {place_text(place_of(cause))}"
        return self._mismatch(why, line=False)

    def check_finished(self) -> None:
        """Raise MismatchError unless all steps of the record were seen."""
        if not self.finished:
            raise self._mismatch("the pruned network does less than the original")

    def _mismatch(self, why: str, *, line: bool = True, other_op: bool = False) -> MismatchError:
        at = min(self._done, len(self._steps) - 1)
        if not line and not self._running:
            at = max(0, self._done - 1)  # the program itself stopped, after that op
        ending = f" at {here()}" if line else ""
        return MismatchError(at, self._steps[at].key, why + ending, other_op=other_op)

    def _kept(self, size: int, axis: Axis) -> int:
        if axis is None:
            return size
        if id(axis) not in self._sizes:
            self._sizes[id(axis)] = int(self._stays[axis].sum())
        return self._sizes[id(axis)]


def _reshaped(result: Any, shapes: Iterator[tuple[int, ...]]) -> Any:
    """Return zeros in the shapes that the original's results had."""
    if isinstance(result, Tensor):
        return result.new_zeros(next(shapes))
    return type(result)(_reshaped(item, shapes) for item in result)


class _ReplayCalls(FollowedCalls):
    """Hands the program of a replayed network the values that the original's took out."""

    def __init__(self, replay: TraceComparison) -> None:
        super().__init__(replay)
        self._replay = replay

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call(func, args, kwargs)
        return self._replay.take(result) if getattr(func, "__name__", "") in TAKERS else result


def _write(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes) or "nothing"


def compared(
    model: nn.Module,
    inputs: Any,
    record: TraceRecord,
    stays: Stays,
    on: torch.device | None,
) -> TraceComparison | MismatchError:
    """Compare a cut copy with a forward of the original; return what went wrong, if it did.

    A network may keep what it computed for one size of feature maps, as YOLO does anchors, and
    the original may have met this size before it was traced. A copy that calls other ops is
    compared again once it has met it, too.

    Raises:
        PlanError: it needs values to meet it, and the copy has none.
    """

    def replayed() -> TraceComparison | MismatchError:
        replay = TraceComparison(record, stays, on)
        try:
            run_traced(model, inputs_in(inputs, record.training), replay, _ReplayCalls(replay))
            replay.check_finished()
        except (PlanError, MismatchError) as error:
            return replay.failure(error)
        return replay

    set_mode(model, training=record.training)
    found = replayed()
    if not isinstance(found, MismatchError) or not found.other_op:
        return found
    args, kwargs = inputs_in(inputs, record.training)
    try:
        with undisturbed(), WatchedOps(on):  # as in a comparison, and nothing is compared
            model(*args, **kwargs)
    except Exception as error:
        if on is not None and needs_values(error):
            raise PlanError("the cut network asks for values") from error
        return found
    again = replayed()
    return found if isinstance(again, MismatchError) else again
