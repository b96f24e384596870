"""Forward passes that are watched: residual additions, and modules that need not run again."""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.batchnorm import _BatchNorm

from compress.groups.calls import WatchedOps, op_name, tensors_in
from compress.modules.inputs import copied
from compress.modules.outputs import tensors_of
from compress.prune.batchnorm import tracking_norms

LEAST_SLOPE = 1e-3  # of a BatchNorm's largest: a channel below cannot take up what others lost
CACHE_MIB = 2048  # of outputs kept of one network; with more, later modules are computed again


class EnoughSeen(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """The modules in question have run."""


class Sums(WatchedOps):
    """Shows every sum of two tensors of one rank, before it is done: its number and operands."""

    def __init__(self, show: Callable[[int, tuple[Tensor, Tensor]], None]) -> None:
        super().__init__()
        self._show = show
        self.done = 0

    def skip(self, count: int) -> None:
        """Count sums that are not done in this pass."""
        self.done += count

    def op(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one op."""
        if op_name(func) == "add" and not kwargs:
            operands = tuple(each for each in args if isinstance(each, Tensor))
            # Not of a bias: a linear layer may add it apart for one image, and not for several.
            if len(operands) == 2 and operands[0].ndim == operands[1].ndim:
                self._show(self.done, operands)
                self.done += 1
        return func(*args, **kwargs)


@dataclass
class _Call:
    """What is known of a module that runs once in a forward."""

    left: int = 0  # when it ended
    sums: int = 0  # of two tensors, inside it
    mib: float = 0.0  # of its output, for one image
    is_alias: bool = False  # its output is its input, perhaps changed in place
    parents: tuple[str, ...] = ()
    readers: set[tuple[str, ...]] = field(default_factory=set)  # modules around ops that read it


class Replay:
    """Runs a network on the same batches again and again while its weights change in order.

    A module that has run before the layer in question enters, and thus cannot change any more, is
    computed once for each batch; later passes get its output from memory. Outputs that only such
    modules read are not kept. Modules that run several times in a forward, return anything but one
    tensor, return a part or another shape of their input, or change a tensor of others in place,
    are computed in every pass. The network, in eval mode, is left as it was after every pass.
    """

    def __init__(self, model: nn.Module, image: Tensor, images: int) -> None:
        self.model = model
        self.images = images
        self._modules = dict(model.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        watch = _Survey()
        with contextlib.ExitStack() as stack:
            for name, module in self._modules.items():
                stack.enter_context(module.register_forward_pre_hook(partial(watch.enter, name)))
                stack.enter_context(module.register_forward_hook(partial(watch.leave, name)))
            stack.enter_context(watch)
            model(copied(image))
        self._entered = watch.entered
        self._calls = {  # of the modules that can be replayed
            name: found[0]
            for name, found in watch.calls.items()
            if name
            and len(found) == 1
            and name not in watch.unfit
            and (name not in watch.meddling or found[0].is_alias)
            and not isinstance(self._modules[name], torch.jit.ScriptModule)
        }
        self._kept: dict[int, dict[str, Tensor]] = defaultdict(dict)  # by batch
        self._finished: set[str] = set()

    def entered(self, layer: nn.Module) -> int:
        """Return when a layer first runs in a forward; 0 if it was not seen."""
        return self._entered.get(self._names.get(layer, ""), 0)

    @contextlib.contextmanager
    def passing(self, batch: int, limit: int, skip: Callable[[int], None]) -> Iterator[None]:
        """Let one forward pass of a batch reuse what was computed before, and keep what is new.

        Modules that have left before ``limit`` do not change any more. ``skip`` is told of sums of
        two tensors that are left out.
        """
        kept = self._kept[batch]
        done = {name for name, call in self._calls.items() if call.left < limit}
        wanted = {name for name in done if done.isdisjoint(self._calls[name].parents)}
        needed = {
            name
            for name in wanted
            if any(wanted.isdisjoint(stack) for stack in self._calls[name].readers)
        }
        with contextlib.ExitStack() as stack:
            for name, value in kept.items():
                stack.enter_context(self._replaced(name, value, skip))
            size = sum(self._calls[name].mib for name in needed) * self.images
            fresh: dict[str, Tensor] = {}
            if size <= CACHE_MIB:
                for name in wanted - set(kept):
                    hook = partial(_keep, fresh, name, name in needed)
                    stack.enter_context(self._modules[name].register_forward_hook(hook))
            yield
        if size <= CACHE_MIB and wanted - set(kept) <= set(fresh):
            found = kept | fresh
            self._kept[batch] = {
                name: found[name] if name in needed else _shape_of(found[name]) for name in wanted
            }

    @contextlib.contextmanager
    def _replaced(self, name: str, value: Tensor, skip: Callable[[int], None]) -> Iterator[None]:
        module, call = self._modules[name], self._calls[name]

        def forward(*inputs: Any, **_named: Any) -> Any:
            skip(call.sums)
            if _is_shape(value):
                return value
            if call.is_alias and not _is_shape(inputs[0]):
                return inputs[0].copy_(value)
            return value.clone()

        own = module.__dict__.get("forward")
        module.forward = forward
        try:
            yield
        finally:
            if own is None:
                del module.forward
            else:
                module.forward = own


def _keep(
    fresh: dict[str, Tensor], name: str, is_needed: bool, _module: Any, _inputs: Any, output: Tensor
) -> None:
    """Keep the output of a module: a copy, as what comes after may change it in place."""
    fresh[name] = output.clone() if is_needed else _shape_of(output)


def _shape_of(tensor: Tensor) -> Tensor:
    """Return zeros of that shape that take no memory: for outputs that nobody reads any more."""
    return tensor.new_zeros(1).expand(tensor.shape) if tensor.ndim else tensor


def _is_shape(tensor: Tensor) -> bool:
    return tensor.numel() > 1 and not any(tensor.stride())


class _Survey(Sums):
    """Watches one forward pass: which op reads what, inside which modules."""

    def __init__(self) -> None:
        super().__init__(lambda _number, _operands: None)
        self.clock = 0
        self.storages: dict[int, list[_Call]] = defaultdict(list)  # outputs of modules
        self.alive: list[Tensor] = []  # so that no storage is used twice
        self.made: dict[int, int] = {}  # when a storage was first seen
        self.open: list[tuple[str, int]] = []  # modules that run, and when they began
        self.meddling: set[str] = set()  # modules that change what was there before them
        self.calls: dict[str, list[_Call]] = defaultdict(list)  # by module
        self.entered: dict[str, int] = {}  # when each module first runs
        self.unfit: set[str] = set()  # modules that cannot be replayed

    def enter(self, name: str, _module: nn.Module, _inputs: Any) -> None:
        self.clock += 1
        self.entered.setdefault(name, self.clock)
        parents = tuple(parent for parent, _ in self.open if parent)
        self.calls[name].append(_Call(sums=self.done, parents=parents))
        self.open.append((name, self.clock))

    def leave(self, name: str, _module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.clock += 1
        self.open.pop()
        call = self.calls[name][-1]
        call.left, call.sums = self.clock, self.done - call.sums
        if not isinstance(output, Tensor):
            self.unfit.add(name)
            return
        call.mib = output.numel() * output.element_size() / 2**20
        given = inputs[0] if inputs else None
        if isinstance(given, Tensor) and _storage(given) == _storage(output):
            if given.is_set_to(output):
                call.is_alias = True
            else:
                self.unfit.add(name)  # made anew in a moment, and its input may have other readers
                return
        self.storages[_storage(output)].append(call)
        self.alive.append(output)

    def op(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one op and note what it reads and changes."""
        self.clock += 1
        result = super().op(func, args, kwargs)
        for tensor in tensors_in((args, kwargs)):
            for call in self.storages.get(_storage(tensor), ()):
                call.readers.add(tuple(name for name, _ in self.open))
        written = [
            value
            for value, spec in zip(args, func._schema.arguments, strict=False)
            if spec.alias_info is not None and spec.alias_info.is_write
        ]
        for tensor in tensors_in(written):
            since = self.made.get(_storage(tensor), 0)
            self.meddling |= {name for name, begun in self.open if since < begun}
        for tensor in tensors_in(result):
            self.made.setdefault(_storage(tensor), self.clock)
            self.alive.append(tensor)
        return result


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True)
class Join:
    """A residual addition: a layer's output, as it is or after a BatchNorm, is one operand."""

    number: int  # which of the sums of one forward it is
    other: int  # which of its two operands is not the layer's
    norm: _BatchNorm | None = None  # between the layer and the sum, in eval mode

    def gain(self) -> Tensor | float:
        """Return what the layer's answer must change by to change the sum by 1: (C,), or 1.

        It is 0 for channels that the BatchNorm hardly passes on.
        """
        slope, _ = _affine(self.norm)
        if not isinstance(slope, Tensor):
            return slope
        return torch.where(_passes(slope), 1 / slope, torch.zeros_like(slope))


@dataclass(frozen=True)
class Rectifier:
    """A ReLU that alone reads a layer's output, as it is, normalized, or added to something."""

    top: float = math.inf  # what it cuts off above, 6 of a ReLU6
    norm: _BatchNorm | None = None  # between the layer and it, in eval mode

    def asked(self, wanted: Tensor, answer: Tensor) -> Tensor:
        """Return what a layer is asked for: ``wanted`` where the ReLU passes it on.

        Where it does not, any answer is right that it does not pass on either.

        Args:
            wanted: What the layer is to answer, with what its answer is added to: (rows, C).
            answer: What it answers, with the same.
        """
        slope, offset = _affine(self.norm)
        want, got = wanted * slope + offset, answer * slope + offset
        aim = torch.where(want <= 0, got.clamp_max(0), want)
        aim = torch.where(want >= self.top, got.clamp_min(self.top), aim)
        is_free = aim != want
        if isinstance(slope, Tensor):
            is_free &= _passes(slope)
        return torch.where(is_free, (aim - offset) / slope, wanted)


def _affine(norm: _BatchNorm | None) -> tuple[Tensor | float, Tensor | float]:
    """Return factor and offset of a BatchNorm in eval mode, (C,) each; 1 and 0 without one."""
    if norm is None or norm.running_var is None or norm.running_mean is None:
        return 1.0, 0.0
    slope = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    return slope, norm.bias.detach() - slope * norm.running_mean


def _passes(slope: Tensor) -> Tensor:
    """Return for which channels a BatchNorm with this factor passes on what others lost."""
    return slope.abs() > LEAST_SLOPE * slope.abs().max()


@dataclass(frozen=True)
class Followers:
    """What the outputs of layers go into, by layer."""

    joins: dict[nn.Module, Join]
    rectifiers: dict[nn.Module, Rectifier]
    norms: dict[nn.Module, _BatchNorm]  # that read nothing else, and that nothing else reads


def followers(model: nn.Module, layers: Sequence[nn.Module], image: Tensor) -> Followers:
    """Return the addition, the ReLU and the BatchNorm that each layer's output goes into.

    An addition counts if its other operand comes first: where the answers of two layers meet, this
    is so for the one that runs last. A ReLU counts if nothing else reads what it reads. Each of
    ``layers`` runs once in a forward of ``model``, which is in eval mode.
    """
    watch = _Watch([norm for norm in tracking_norms(model) if norm.affine])
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_pre_hook(watch.starts))
            stack.enter_context(layer.register_forward_hook(watch.ends))
        stack.enter_context(watch)
        output = model(copied(image))
    watch.returns(tensors_of(output))
    return Followers(watch.joins, dict(watch.rectifiers()), dict(watch.norms()))


@dataclass(frozen=True)
class _Path:
    """Where the output of a layer goes without being read by anything else."""

    layer: nn.Module
    tensors: tuple[int, ...]  # ids of the output, of what a BatchNorm makes of it, of the sum
    norm: _BatchNorm | None = None
    since: int = 0  # the op after which the last tensor is what is meant


class _Watch(Sums):
    """Knows when tensors were made and by what they are read.

    All are kept, so that no id is used twice.
    """

    def __init__(self, norms: Iterable[_BatchNorm]) -> None:
        super().__init__(self._joins)
        self.joins: dict[nn.Module, Join] = {}
        # Known by their buffers: a class may do more than normalize, as with an activation in it.
        self._norms = {id(norm.running_mean): norm for norm in norms}
        self._normalized: Counter[_BatchNorm] = Counter()
        self._made: dict[int, tuple[int, Tensor]] = {}  # by id; not what was before the forward
        self._reads: dict[int, list[_Read]] = defaultdict(list)  # by the tensor's id
        self._started: dict[nn.Module, int] = {}
        self._paths: dict[int, _Path] = {}  # by the id of the last tensor
        self._ended: list[_Path] = []  # in a sum that is done now
        self._ops = 0

    def starts(self, layer: nn.Module, _inputs: Any) -> None:
        self._started[layer] = len(self._made)

    def ends(self, layer: nn.Module, _inputs: Any, answer: Tensor) -> None:
        self._paths[id(answer)] = _Path(layer, (id(answer),))

    def _normalizes(self, args: tuple[Any, ...], result: Any) -> None:
        """Note what a BatchNorm has made of what a layer has made."""
        norm = next((n for each in args if (n := self._norms.get(id(each))) is not None), None)
        if norm is not None:
            self._normalized[norm] += 1
            path = self._paths.get(id(args[0]))
            answer = next(tensors_in(result))
            if path is not None and path.norm is None:
                self._paths[id(answer)] = _Path(path.layer, (*path.tensors, id(answer)), norm)

    def _joins(self, number: int, operands: tuple[Tensor, Tensor]) -> None:
        alike = operands[0].shape == operands[1].shape
        for own, other in ((0, 1), (1, 0)):
            path = self._paths.get(id(operands[own]))
            made, _ = self._made.get(id(operands[other]), (0, None))
            if alike and path is not None and made <= self._started[path.layer]:
                if path.layer not in self.joins:
                    self._ended.append(path)
                self.joins.setdefault(path.layer, Join(number, other, path.norm))

    def op(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._ops += 1
        read = _Read(self._ops, _top(func, args), str(func._schema.name).endswith("_"))
        for tensor in tensors_in((args, kwargs)):
            self._reads[id(tensor)].append(read)
        result = super().op(func, args, kwargs)
        if "batch_norm" in op_name(func):
            self._normalizes(args, result)
        for tensor in tensors_in(result):
            self._made.setdefault(id(tensor), (len(self._made) + 1, tensor))
            for path in self._ended:
                tensors = (*path.tensors, id(tensor))
                self._paths[id(tensor)] = _Path(path.layer, tensors, path.norm, self._ops)
        self._ended.clear()
        return result

    def returns(self, outputs: Iterable[Tensor]) -> None:
        """Note that the network returns ``outputs``: whoever gets them reads them too."""
        for tensor in outputs:
            self._reads[id(tensor)].append(_Read(self._ops + 1, None, in_place=False))

    def rectifiers(self) -> Iterator[tuple[nn.Module, Rectifier]]:
        """Yield each layer that a ReLU follows."""
        for path in self._paths.values():
            *before, last = path.tensors
            reads = [read for read in self._reads[last] if read.when > path.since]
            tops = {read.top for read in _of_this(reads)}
            is_alone = all(self._is_read_once(key) for key in before)
            if is_alone and len(tops) == 1 and (top := tops.pop()) is not None:
                yield path.layer, Rectifier(top, path.norm)

    def norms(self) -> Iterator[tuple[nn.Module, _BatchNorm]]:
        """Yield each layer with the BatchNorm that follows it, where neither has another."""
        for path in self._paths.values():
            norm = path.norm
            is_own = norm is not None and self._normalized[norm] == 1
            if norm is not None and is_own and self._is_read_once(path.tensors[0]):
                yield path.layer, norm

    def _is_read_once(self, key: int) -> bool:
        return len(_of_this(self._reads[key])) == 1


@dataclass(frozen=True)
class _Read:
    """An op that reads a tensor."""

    when: int
    top: float | None  # where it cuts off, if it is a ReLU
    in_place: bool


def _of_this(reads: list[_Read]) -> list[_Read]:
    """Return the reads of a tensor as it was made: what follows a change in place reads another."""
    return reads[:1] if reads and reads[0].in_place else reads


def _top(func: OpOverload, args: tuple[Any, ...]) -> float | None:
    """Return where a ReLU cuts off above; None for other ops."""
    name = op_name(func)
    if name == "relu":
        return math.inf
    is_relu6 = name == "hardtanh" and len(args) == 3 and args[1] == 0
    return float(args[2]) if is_relu6 else None
