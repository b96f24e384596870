"""Run a network once on the meta device and follow every channel through it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from compress.errors import ModelError, PlanError, UsageError
from compress.groups.attributes import conflicts, followers, reconcile, why_fixed
from compress.groups.cut import cut
from compress.groups.inputs import (
    Example,
    batch_size,
    call_inputs,
    copied,
    is_images,
    to_meta,
    twice,
)
from compress.groups.labels import Components, Constraints
from compress.groups.network import Index, Layer, Network, Positions, Reduction
from compress.groups.record import Axes, Key, TraceRecord
from compress.groups.replay import (
    MismatchError,
    ReplayCalls,
    Stays,
    TraceComparison,
    UncomparedOps,
)
from compress.groups.rules import RULES, freeze_all
from compress.groups.traced_ints import tag_attributes
from compress.groups.tracer import CallWatcher, Tracer
from compress.groups.units import find_units, layer_name
from compress.modules import network_of, set_mode, with_gradients
from compress.modules.copying import full_copy, meta_copy, parameters_and_buffers
from compress.modules.detectors import on_batch
from compress.modules.outputs import chosen_outputs, leaves

_ROUNDS = 60  # how often a program line may turn out to fix channel counts


@with_gradients()
def trace(
    model: nn.Module, example_input: Example, outputs: Sequence[str] | None = None
) -> Network:
    """Return the groups of channels of ``model`` that can be cut, and what each layer costs.

    Args:
        model: Any network, in a wrapper or not; parameters, mode and hooks are left as they are.
        example_input: One input, a tuple of positional inputs, or a dict of keyword inputs. Only
            shapes and types matter, unless the program asks for the value of a tensor or hooks
            of the user's hang on modules: then a copy of the network runs on the values.
        outputs: Places of the outputs whose channels stay; all if None.

    Raises:
        PlanError: the network cannot be run on the example, or nothing in it can be cut.
        UsageError: there is no such output.
    """
    model = network_of(model)
    distrusted: dict[Key, str] = {}
    with_values = _has_own_hooks(model)
    for number in range(_ROUNDS):
        attempt = partial(_attempt, model, example_input, distrusted, outputs, number)
        try:
            traced, mismatch = attempt(with_values=with_values)
        except PlanError as error:
            if with_values or not _needs_values(error.__cause__):
                raise
            with_values = True
            traced, mismatch = attempt(with_values=with_values)
        if mismatch is None or not traced.units.groups:
            break
        distrusted[traced.culprit(mismatch, distrusted)] = mismatch.why
    else:
        raise PlanError("the network's program depends on channel counts in too many places")
    network = traced.network
    if not network.groups:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in list(network.frozen.items())[:5])
        raise PlanError(
            "nothing in this network can be cut",
            where=type(model).__name__,
            fix=reasons or "It has no convolution or linear layer with a weight",
        )
    return network


def _attempt(
    model: nn.Module,
    example_input: Example,
    distrusted: Mapping[Key, str],
    outputs: Sequence[str] | None,
    seed: int,
    *,
    with_values: bool,
) -> tuple[_Traced, MismatchError | None]:
    """Return what one trace found, and what a random cut of it did wrong."""
    traced = _Traced(model, example_input, distrusted, outputs, with_values=with_values)
    return traced, traced.probe(seed)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No gradients, and the random number generators afterwards as they were before."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        yield


@contextlib.contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """Undo, afterwards, what happens to attributes of modules: tags, and caches of a forward."""
    before = [
        (module, {name: _shallow(value) for name, value in module.__dict__.items()})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _shallow(value: Any) -> Any:
    """Return a copy of a container (the module's buffers are in one), anything else itself."""
    return value.copy() if type(value) in {dict, list, set} and value else value


@dataclass(frozen=True)
class _Forward:
    """One traced forward and the mode it was made in."""

    training: bool
    record: TraceRecord


class _Traced:
    """One attempt: trace, merge, find units; ``probe`` then tries a cut."""

    def __init__(
        self,
        model: nn.Module,
        example_input: Example,
        distrusted: Mapping[Key, str],
        outputs: Sequence[str] | None,
        *,
        with_values: bool,
    ) -> None:
        self._outputs = outputs
        self._on = None if with_values else torch.device("meta")
        args, kwargs = call_inputs(example_input)
        model = model if outputs else on_batch(model, args, kwargs)
        self._model = full_copy(model) if with_values else meta_copy(model)
        self._tensors = dict(parameters_and_buffers(self._model))
        self._shapes = {name: tuple(t.shape) for name, t in self._tensors.items()}
        self._constants = _constants(model)
        self._inputs = tree_map(copied if with_values else to_meta, (args, kwargs))
        self._constraints = Constraints()
        self._named = self._label_tensors()
        with _attributes_restored(self._model):
            tag_attributes(self._model)
            before = {name: dict(m.__dict__) for name, m in self._model.named_modules()}
            self._left: dict[str, list[Axes]] = {}
            self._forwards = [self._forward(distrusted, training=False, before=before)]
            if self._unused():
                with contextlib.suppress(PlanError):
                    self._forwards.append(self._forward(distrusted, training=True))
        self._components = self._merged()
        self._layers = self._find_layers()
        order = self._order()
        self.units = find_units(self._components, self._constraints.produced, order, self._layers)
        self.network = self._network()

    def _label_tensors(self) -> dict[str, Axes]:
        """Return fresh labels for every dimension that may hold channels; kernels have none."""
        kernels = {
            id(weight)
            for module in self._model.modules()
            if isinstance(module, nn.modules.conv._ConvNd)
            for weight in module.parameters()
        }
        fresh = self._constraints.fresh
        return {
            name: tuple(
                fresh(size) if size > 1 and (dim < 2 or id(tensor) not in kernels) else None
                for dim, size in enumerate(tensor.shape)
            )
            for name, tensor in self._tensors.items()
        }

    def _forward(
        self,
        distrusted: Mapping[Key, str],
        *,
        training: bool,
        before: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> _Forward:
        set_mode(self._model, training=training)
        named = [(t, name, self._named[name]) for name, t in self._tensors.items()]
        tracer = Tracer(
            self._constraints, named, RULES, freeze_all, distrusted, self._on, self._constants
        )
        found = run_traced(self._model, self._inputs_in(training), tracer)
        for _, leaf in self._counted(found, training):
            if isinstance(leaf, Tensor):
                tracer.freeze_output(leaf, "its channels are an output of the network")
            elif isinstance(leaf, Number):
                tracer.freeze_taken("that number is an output of the network")
        if before is not None:
            self._left = _left_on_attributes(self._model, before, tracer)
        return _Forward(training, tracer.record)

    def _counted(self, found: list[tuple[str, Any]], training: bool) -> list[tuple[str, Any]]:
        """Return the outputs whose channels stay; in training mode there may be others."""
        try:
            return chosen_outputs(found, self._outputs, where=type(self._model).__name__)
        except UsageError:
            if not training:
                raise
            return found

    def _inputs_in(self, training: bool) -> Any:
        """Return the inputs; in training mode at least two images, as batch statistics need."""
        inputs = tree_map(copied, self._inputs)  # a network may write into them
        if not training or batch_size(inputs) > 1:
            return inputs
        return tree_map(twice, inputs, is_leaf=is_images)

    def _unused(self) -> bool:
        touched = self._forwards[0].record.touched
        return any(name not in touched for name, _ in self._model.named_parameters())

    def _order(self) -> list[tuple[str, Axes]]:
        touched = {name: None for f in self._forwards for name in f.record.touched}
        return [(name, self._named[name]) for name in touched]

    def _merged(self) -> Components:
        """Merge labels; channels that one attribute counts are tied, or stay if that cannot be."""
        components, tried = self._constraints.solve(), set()
        while bad := conflicts(components):
            for first, second in bad:
                pair = (id(first.labels), id(second.labels))
                if pair in tried or not reconcile(self._constraints, first, second):
                    self._constraints.freeze(first.labels, why_fixed(second))
                    self._constraints.freeze(second.labels, why_fixed(first))
                tried.add(pair)
            components = self._constraints.solve()
        return components

    def _find_layers(self) -> dict[str, Layer]:
        batch = batch_size(self._inputs)
        layers: dict[str, Layer] = {}
        for use in self._forwards[0].record.uses:
            shape, axes = self._shapes[use.weight], self._named[use.weight]
            size = int(np.prod(shape, dtype=np.int64))
            before = layers[use.weight].macs if use.weight in layers else 0
            each = round((use.macs / batch + before) / size)
            output, taken = _dim_of(axes, use.output, 0), _dim_of(axes, use.input, 1)
            layers[use.weight] = Layer(use.weight, shape, each, output, taken)
        return layers

    def _network(self) -> Network:
        parameters = frozenset(name for name, _ in self._model.named_parameters())
        return Network(
            groups=self.units.groups,
            layers=self._layers,
            frozen=self._frozen(),
            shapes=self._shapes,
            parameters=parameters,
            followers=followers(self._components, self.units),
            reductions=self._reductions(),
            indices=tuple(self._indices()),
            side_outputs=tuple(
                name
                for name, rows in self._left.items()
                if any(self._axis_units(axes) for axes in rows)
            ),
        )

    def _frozen(self) -> dict[str, str]:
        frozen: dict[str, str] = {}
        for name, layer in self._layers.items():
            axis = self._named[name][layer.output_dim]
            if axis is None:
                frozen[layer_name(name)] = "it has a single output channel"
                continue
            stays = axis[self.units.of[axis] < 0]
            if len(stays):
                part = f"{len(stays)} of {len(axis)} channels: " if len(stays) < len(axis) else ""
                frozen[layer_name(name)] = part + self._reason(stays[0])
        touched = {name for f in self._forwards for name in f.record.touched}
        for name, _ in self._model.named_parameters():
            if name not in touched and name.endswith(".weight"):
                frozen[layer_name(name)] = "it does not run on the example input"
        return frozen

    def _reason(self, label: int) -> str:
        component = int(self._components.of[label])
        return self._components.reasons.get(component, "no layer makes its channels")

    def _reductions(self) -> tuple[Reduction, ...]:
        found = []
        for item in self._forwards[0].record.restricted:
            inputs = {i: self._axis_units(axes) for i, axes in item.inputs}
            outputs = {i: self._axis_units(axes) for i, axes in enumerate(item.outputs)}
            inputs = {i: dims for i, dims in inputs.items() if dims}
            if inputs:
                outputs = {i: dims for i, dims in outputs.items() if dims}
                found.append(Reduction(item.op, item.occurrence, inputs, outputs, item.mask_only))
        return tuple(found)

    def _indices(self) -> Iterator[Index]:
        for name, axis in {
            n: a for f in self._forwards for n, a in f.record.indexed.items()
        }.items():
            yield Index(name, self.units.of[axis].astype(np.int64), self._constants[name])

    def _axis_units(self, axes: Axes) -> dict[int, Positions]:
        rows = {d: self.units.of[axis] for d, axis in enumerate(axes) if axis is not None}
        return {d: row for d, row in rows.items() if (row >= 0).any()}

    def culprit(self, mismatch: MismatchError, known: Mapping[Key, str]) -> Key:
        """Return the op to freeze: where it went wrong, or the last before it not yet frozen."""
        steps = self._forwards[mismatch.forward].record.steps[: mismatch.step + 1]
        for step in reversed(steps):
            rows = (*step.inputs, *(axes for _, axes in step.outputs))
            if step.key not in known and any(axis is not None for axes in rows for axis in axes):
                return step.key
        return mismatch.key

    def probe(self, seed: int) -> MismatchError | None:
        """Cut a random part of every group of a copy and replay it; return what went wrong."""
        rng = np.random.default_rng(seed)
        keep = {}
        for group in self.units.groups:
            count = max(1, int(group.size * rng.uniform(0.4, 0.9)))
            keep[group.name] = np.sort(rng.permutation(group.size)[:count])
        kept = self.network.kept_units(keep)
        stays = np.ones(len(self.units.of), bool)
        cuttable = self.units.of >= 0
        stays[cuttable] = kept[self.units.of[cuttable]]
        model = self._model
        positions, attributes = self.network.kept_positions(keep), self.network.attributes(kept)
        cut(model, positions, attributes, self.network.kept_indices(kept))
        for number, forward in enumerate(self._forwards):
            set_mode(model, training=forward.training)
            replay = self._compared(forward, stays)
            if isinstance(replay, MismatchError):
                replay.forward = number
                return replay
            if number == 0:
                numbers = [Reduction(op, at, {}, {}, numbers=True) for op, at in replay.numbers]
        self.network = replace(self.network, reductions=(*self.network.reductions, *numbers))
        return None

    def _compared(self, forward: _Forward, stays: Stays) -> TraceComparison | MismatchError:
        """Compare the cut copy with a forward of the original; return what went wrong, if it did.

        A network may keep what it computed for one size of feature maps, as YOLO does anchors, and
        the original may have met this size before it was traced. A copy that calls other ops is
        compared again once it has met it, too.

        Raises:
            PlanError: it needs values to meet it, and the copy has none.
        """
        found = self._replayed(forward, stays)
        if not isinstance(found, MismatchError) or not found.other_op:
            return found
        args, kwargs = self._inputs_in(forward.training)
        try:
            with undisturbed(), UncomparedOps(self._on):
                self._model(*args, **kwargs)
        except Exception as error:
            if self._on is not None and _needs_values(error):
                raise PlanError("the cut network asks for values") from error
            return found
        again = self._replayed(forward, stays)
        return found if isinstance(again, MismatchError) else again

    def _replayed(self, forward: _Forward, stays: Stays) -> TraceComparison | MismatchError:
        replay = TraceComparison(forward.record, stays, self._on)
        try:
            run_traced(self._model, self._inputs_in(forward.training), replay)
            replay.check_finished()
        except (PlanError, MismatchError) as error:
            return replay.failure(error)
        return replay


def run_traced(
    model: nn.Module, inputs: Any, mode: Tracer | TraceComparison
) -> list[tuple[str, Any]]:
    """Return what ``model`` returns, by places as of ``leaves``, while ``mode`` watches.

    Raises:
        PlanError: the network raised an error, or returns what cannot be looked into;
            MismatchError: a replay went another way.
    """
    args, kwargs = inputs
    watcher = CallWatcher(mode) if isinstance(mode, Tracer) else ReplayCalls(mode)
    try:
        with undisturbed(), mode, watcher:
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


def _constants(model: nn.Module) -> dict[str, Positions]:
    """Return the values of buffers of whole numbers, by which a program may pick channels."""
    return {
        name: tensor.detach().cpu().numpy().astype(np.int64)
        for name, tensor in model.named_buffers()
        if tensor.ndim == 1 and tensor.dtype in {torch.int32, torch.int64} and not tensor.is_meta
    }


def _left_on_attributes(
    model: nn.Module, before: Mapping[str, Mapping[str, Any]], tracer: Tracer
) -> dict[str, list[Axes]]:
    """Return the labels of tensors that a forward left on attributes of modules, by their names."""
    found: dict[str, list[Axes]] = {}
    for place, module in model.named_modules():
        for name, value in module.__dict__.items():
            if value is not before.get(place, {}).get(name):
                tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
                if tensors:
                    found[f"{place}.{name}".lstrip(".")] = [tracer.axes(t) for t in tensors]
    return found


def _needs_values(error: BaseException | None) -> bool:
    """Say whether a program failed because tensors on the meta device have no values."""
    return isinstance(error, NotImplementedError) or "meta" in str(error)


def _has_own_hooks(model: nn.Module) -> bool:
    """Say whether hooks that are not PyTorch's (weight norm's are) run with the network."""
    found = [torch.nn.modules.module._global_forward_hooks.values()]
    found.append(torch.nn.modules.module._global_forward_pre_hooks.values())
    for module in model.modules():
        found.extend((module._forward_hooks.values(), module._forward_pre_hooks.values()))
    return any(not _is_pytorchs(hook) for hooks in found for hook in hooks)


def _is_pytorchs(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def _dim_of(axes: Axes, axis: Any, default: int) -> int:
    for dim, own in enumerate(axes):
        if own is not None and own is axis:
            return dim
    return min(default, max(len(axes) - 1, 0))
