"""Run a network once on the meta device and follow every channel through it."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import compress.groups.rules  # noqa: F401 - they register themselves
from compress.errors import ModelError, PlanError, UsageError
from compress.groups.cut import cut
from compress.groups.forward import (
    Key,
    MismatchError,
    TraceRecord,
    Use,
    attributes_restored,
    batch_size,
    has_own_hooks,
    inputs_in,
    left_on_attributes,
    needs_values,
    run_traced,
)
from compress.groups.labels import Axes, Axis, Components, Constraints, find_units, layer_name
from compress.groups.network import AttributeUse, Layer, Network, Positions, stays_at
from compress.groups.plan import make_prune_plan
from compress.groups.replay import compared
from compress.groups.traced_ints import Attribute, tag_attributes
from compress.groups.tracer import CallWatcher, Tracer
from compress.modules import (
    full_copy,
    meta_copy,
    network_of,
    parameters_and_buffers,
    set_mode,
    with_gradients,
)
from compress.modules.detectors import on_batch
from compress.modules.inputs import Example, call_inputs, copied
from compress.modules.outputs import chosen_outputs

_PREPARED = re.compile(  # FloatFunctional adds and multiplies as any code, until it is prepared
    r"torch\.ao\.(quantization\.(fake_quantize|observer)"
    r"|nn\.(?!quantized\.modules\.functional_modules).*quantized)"
)
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
        ModelError: the network is prepared for PyTorch's own quantization.
        PlanError: the network cannot be run on the example, or nothing in it can be cut.
        UsageError: there is no such output.
    """
    model = network_of(model)
    _check_unprepared(model)
    distrusted: dict[Key, str] = {}
    with_values = has_own_hooks(model)
    for number in range(_ROUNDS):
        try:
            traced = _Traced(model, example_input, distrusted, outputs, with_values=with_values)
            mismatch = traced.probe(number)
        except PlanError as error:
            if with_values or not needs_values(error.__cause__):
                raise
            with_values = True
            traced = _Traced(model, example_input, distrusted, outputs, with_values=True)
            mismatch = traced.probe(number)
        if mismatch is None or not traced.groups:
            break
        key = traced.culprit(mismatch, {key for key, why in distrusted.items() if why})
        distrusted[key] = "" if traced.is_guess(key, distrusted) else mismatch.why
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


def _check_unprepared(model: nn.Module) -> None:
    for place, module in model.named_modules():
        if _PREPARED.match(type(module).__module__):
            raise ModelError(
                "is prepared for PyTorch's own quantization, and counts channels as they are",
                where=place,
                fix="Prune it as it was before torch.ao.quantization prepared it",
            )


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
        self._inputs = copied((args, kwargs))
        if not with_values:
            self._inputs = tree_map(
                lambda v: v.to("meta") if isinstance(v, Tensor) else v, self._inputs
            )
        self._constraints = Constraints()
        self._named = self._label_tensors()
        with attributes_restored(self._model):
            tag_attributes(self._model)
            self._left: dict[str, list[Axes]] = {}
            self._forwards = [self._forward(distrusted, training=False)]
            if not self._touched().keys() >= {n for n, _ in self._model.named_parameters()}:
                with contextlib.suppress(PlanError):
                    self._forwards.append(self._forward(distrusted, training=True))
        self._components = self._merged()
        self._layers = self._find_layers()
        order = [(name, self._named[name]) for name in self._touched()]
        produced = self._constraints.produced
        self._unit_of, self.groups = find_units(self._components, produced, order, self._layers)
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

    def _forward(self, distrusted: Mapping[Key, str], *, training: bool) -> TraceRecord:
        set_mode(self._model, training=training)
        before = {name: dict(m.__dict__) for name, m in self._model.named_modules()}
        named = [(t, name, self._named[name]) for name, t in self._tensors.items()]
        how = distrusted, training, self._on, self._constants
        tracer = Tracer(self._constraints, named, *how)
        inputs = inputs_in(self._inputs, training)
        found = run_traced(self._model, inputs, tracer, CallWatcher(tracer))
        for _, leaf in self._counted(found, training):
            if isinstance(leaf, Tensor):
                tracer.freeze_output(leaf, "its channels are an output of the network")
            elif isinstance(leaf, Number):
                tracer.freeze_taken("that number is an output of the network")
        if not training:
            left = left_on_attributes(self._model, before)
            self._left = {  # without what is computed of weights alone: no image is in it
                name: [tracer.axes(each) for each in tensors if tracer.origin(each) is None]
                for name, tensors in left.items()
            }
        return tracer.record

    def _counted(self, found: list[tuple[str, Any]], training: bool) -> list[tuple[str, Any]]:
        """Return the outputs whose channels stay; in training mode there may be others."""
        try:
            return chosen_outputs(found, self._outputs, where=type(self._model).__name__)
        except UsageError:
            if not training:
                raise
            return found

    def _touched(self) -> dict[str, None]:
        """Return the tensors of the model that ran, in the order of use."""
        return {name: None for f in self._forwards for name in f.touched}

    def _merged(self) -> Components:
        """Merge labels; channels that one attribute counts are tied, or stay if that cannot be."""
        components, tried = self._constraints.solve(), set()
        while bad := components.conflicts():
            for first, second in bad:
                a, b = first.counted, second.counted
                if (id(a), id(b)) in tried or not self._constraints.reconcile(a, b):
                    self._constraints.freeze(a, second.why_fixed)
                    self._constraints.freeze(b, first.why_fixed)
                tried.add((id(a), id(b)))
            components = self._constraints.solve()
        return components

    def _find_layers(self) -> dict[str, Layer]:
        batch = batch_size(self._inputs)
        layers: dict[str, Layer] = {}
        macs: dict[str, int] = {}  # of the batch, in all uses of a weight
        for use in self._forwards[0].uses:
            shape, axes = self._shapes[use.weight], self._named[use.weight]
            macs[use.weight] = total = macs.get(use.weight, 0) + use.macs
            each = max(round(total / batch / math.prod(shape)), 1 if total else 0)
            layers[use.weight] = Layer(shape, each, *_dims_of(axes, use))
        return layers

    def _network(self) -> Network:
        found = [each.map(self._units_along) for each in self._forwards[0].reductions]
        followers: dict[Attribute, AttributeUse] = {}
        for use in self._components.uses:
            row = self._unit_of[use.counted]
            if (row >= 0).any():
                followers.setdefault(use.attribute, replace(use, counted=row))
        indexed = {n: axis for f in self._forwards for n, axis in f.indexed.items()}
        return Network(
            groups=self.groups,
            layers=self._layers,
            frozen=self._frozen(),
            shapes=self._shapes,
            parameters=frozenset(name for name, _ in self._model.named_parameters()),
            followers=tuple(followers.values()),
            reductions=tuple(reduction for reduction in found if reduction.inputs),
            indices={n: (self._unit_of[axis], self._constants[n]) for n, axis in indexed.items()},
            side_outputs=tuple(
                n
                for n, rows in self._left.items()
                if any(self._units_along(a) is not None for axes in rows for a in axes)
            ),
        )

    def _units_along(self, axis: Axis) -> Positions | None:
        """Return the units of a dimension; None where it has none."""
        row = None if axis is None else self._unit_of[axis]
        return None if row is None or (row < 0).all() else row

    def _frozen(self) -> dict[str, str]:
        frozen: dict[str, str] = {}
        for name, layer in self._layers.items():
            axis = self._named[name][layer.output_dim]
            if axis is None:
                frozen[layer_name(name)] = "it has a single output channel"
                continue
            stays = axis[self._unit_of[axis] < 0]
            if len(stays):
                part = f"{len(stays)} of {len(axis)} channels: " if len(stays) < len(axis) else ""
                why = self._components.reasons.get(int(self._components.of[stays[0]]))
                frozen[layer_name(name)] = part + (why or "no layer makes its channels")
        touched = self._touched()
        for name, _ in self._model.named_parameters():
            if name not in touched and name.endswith(".weight"):
                frozen[layer_name(name)] = "it does not run on the example input"
        return frozen

    def is_guess(self, key: Key, distrusted: Mapping[Key, str]) -> bool:
        """Say whether an op went wrong whose plain numbers were taken for shares of a width."""
        return key not in distrusted and any(key in forward.guessed for forward in self._forwards)

    def culprit(self, mismatch: MismatchError, known: Container[Key]) -> Key:
        """Return the op to freeze: where it went wrong, or the last before it not yet frozen."""
        steps = self._forwards[mismatch.forward].steps[: mismatch.step + 1]
        for step in reversed(steps):
            rows = (*step.inputs, *(axes for _, axes in step.outputs))
            if step.key not in known and any(axis is not None for axes in rows for axis in axes):
                return step.key
        return mismatch.key

    def probe(self, seed: int) -> MismatchError | None:
        """Cut a random part of every group of a copy and replay it; return what went wrong."""
        rng = np.random.default_rng(seed)
        keep = {}
        for group in self.groups:
            count = max(1, int(group.size * rng.uniform(0.4, 0.9)))
            keep[group.name] = np.sort(rng.permutation(group.size)[:count])
        cut(self._model, make_prune_plan(self.network, keep))
        stays = stays_at(self._unit_of, self.network.kept_units(keep))
        for number, forward in enumerate(self._forwards):
            replay = compared(self._model, self._inputs, forward, stays, self._on)
            if isinstance(replay, MismatchError):
                replay.forward = number
                return replay
            if number == 0:
                numbers = replay.numbers
        self.network = replace(self.network, reductions=(*self.network.reductions, *numbers))
        return None


def _constants(model: nn.Module) -> dict[str, Positions]:
    """Return the values of buffers of whole numbers, by which a program may pick channels."""
    return {
        name: tensor.detach().cpu().numpy().astype(np.int64)
        for name, tensor in model.named_buffers()
        if tensor.ndim == 1 and tensor.dtype in {torch.int32, torch.int64} and not tensor.is_meta
    }


def _dims_of(axes: Axes, use: Use) -> tuple[int, int]:
    """Return the dimensions of a weight that hold filters and inputs; those of size 1 have none."""
    made, taken = (
        next((dim for dim, own in enumerate(axes) if own is not None and own is axis), None)
        for axis in (use.output, use.input)
    )
    last = max(len(axes) - 1, 0)
    if made is None:
        made = 1 if taken == 0 else 0
    if taken is None:
        taken = 0 if made == 1 else 1
    return min(made, last), min(taken, last)
