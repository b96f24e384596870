"""Layer-wise reconstruction: fit remaining weights to the original's outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.groups.plan import PrunePlan
from compress.modules import evaluating
from compress.modules.inputs import copied, read_batches
from compress.progress import track
from compress.prune.batchnorm import rebase_batchnorm
from compress.prune.forward_passes import EnoughSeen, Join, Rectifier, Replay, Sums, followers
from compress.prune.windows import (
    ENOUGH,
    Layer,
    Ridge,
    Transposed,
    answered_rows,
    computed_from,
    computed_weight,
    filters_of,
    is_linear_in_its_weight,
    mirrored,
    seen_rows,
    set_computed,
)

MOST_FEATURES = 12_288  # whose squares are taken: over 1 GiB; a wider layer is shown few samples
ZERO = 1e-4  # of its weights' mean size: what the sum of a filter without one may be
OTHER = 1.0625  # times the weights: others, with the answers of much the same network
ANSWERS_MIB = 256  # of the original's answers held at once

Batches = Iterable[tuple[Tensor, Tensor]]


def refit(
    pruned: nn.Module,
    original: nn.Module,
    plan: PrunePlan,
    batches: Batches,
    *,
    training_batches: Batches | None = None,
) -> nn.Module:
    """Fit the weights of ``pruned`` layer by layer to the outputs of ``original``, in place.

    For every convolution and linear layer, in the order of execution, the weights W minimize
    |X W - Y|^2 + r |W - W0|^2: X is what the layer sees in the pruned network, whose earlier layers
    are fitted already, Y what the same layer answered in the original, W0 the weights it has. What
    the lost channels did is taken over by those that correlate with them. Where the answer is added
    to something that is there before, as at the end of a residual block, Y is what is missing to
    the original's sum: every block makes up for the errors of those before it. Where a ReLU
    follows, the layer is fitted once more, to what the ReLU passes on: any answer below zero is
    right where the original's is. A layer without a bias whose answer only a BatchNorm reads has
    one in that. Needs no labels; a few hundred images do. In the end BatchNorm's statistics become
    those of training, without a change of the answers (``rebase_batchnorm``).

    A layer that several calls share is fitted to all of them. The fewer samples it sees for each
    weight of a filter, the larger is r. A weight that a convolution computes of its parameters, as
    standardized ones and those with a weight norm, is fitted where these can be set to give it.
    Transposed convolutions in groups, and layers that share a weight, stay as they are.

    Args:
        pruned: What ``apply_pruning(original, plan)`` returned. Its weights are replaced.
        original: The network before the cut.
        plan: The cut between the two.
        batches: Images, float32 (B, C, H, W), with or without anything after them.
        training_batches: Images as training is going to show them, if it changes them at random:
            with statistics of others, the first steps of training lose what fitting gained.
            ``batches`` if absent.

    Returns:
        ``pruned``.

    Raises:
        UsageError: there is not one batch.

    Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017,
    https://arxiv.org/abs/1707.06168, section 3.1, equation 4, and section 3.3 for sums; the pull
    towards the weights, and fitting to inputs of the network that is fitted already, are
    differences from it. That the ReLU counts is from Zhang et al., Accelerating Very Deep
    Convolutional Networks, https://arxiv.org/abs/1505.06798, section 3.2; here by a second fit.
    """
    device = next(pruned.parameters()).device
    batches = list(batches)
    images = [batch.to(device).args[0] for batch in read_batches(batches)]
    with evaluating(pruned), evaluating(original), torch.no_grad():
        pairs = list(_pairs(pruned, original, plan, images))
        count = sum(map(len, images))
        known, fitted = (Replay(net, images[0][:1], count) for net in (original, pruned))
        ready: Iterator[_LayerFit] = (
            pair for some in _portions(pairs) for pair in _asked(some, known, images)
        )
        for pair in track(ready, "refit", len(pairs)):
            _fit(pair, fitted, images)
    return rebase_batchnorm(pruned, batches if training_batches is None else training_batches)


@dataclass
class _LayerFit:
    """One layer in both networks, and what the original answered there at places drawn for it."""

    layer: Layer
    before: nn.Module
    kept: Any  # positions of the layer's outputs that are left, None = all
    calls: int  # how often it runs in one forward
    batches: int
    join: Join | None = None  # what its answer is added to
    rectifier: Rectifier | None = None  # what alone reads that
    norm: _BatchNorm | None = None  # of the pruned network; takes the bias that the layer has not
    shift: Tensor | None = None  # bias that the norm is going to take, (O,)
    answers: list[tuple[Any, tuple[int, ...], Tensor]] = field(
        default_factory=list
    )  # places in what extent, (rows, O)
    draw: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def __post_init__(self) -> None:
        self.computed = computed_weight(self.layer)
        filters = None if self.computed is None else self.computed.flatten(1)
        sums = None if filters is None else filters.mean(1).abs() <= ZERO * filters.abs().mean(1)
        # Standardized: filters sum to zero whatever the parameters are.
        self.is_centered = sums is not None and bool(sums.all())

    @property
    def features(self) -> int:
        """Weights of one filter, its bias included."""
        return filters_of(self.layer)[0].numel() + self.has_bias

    @property
    def has_bias(self) -> bool:
        """Say whether a constant can be added to its answers."""
        return self.layer.bias is not None or self.norm is not None

    @property
    def bias(self) -> Tensor:
        """What is added to its answers by itself or, when all is fitted, the norm: (O,)."""
        if self.layer.bias is not None:
            return self.layer.bias
        if self.shift is None:
            return self.layer.weight.new_zeros(len(filters_of(self.layer)))
        return self.shift

    def finish(self) -> None:
        """Let the norm add what the layer cannot."""
        if self.shift is not None and self.norm is not None and self.norm.running_mean is not None:
            self.norm.running_mean -= self.shift

    def extent(self, answer: Tensor) -> tuple[int, ...]:
        """Return over what it runs in one call: every size of its answer but that of channels."""
        axis = answer.ndim - 1 if isinstance(self.layer, nn.Linear) else 1
        return (*answer.shape[:axis], *answer.shape[axis + 1 :])

    @property
    def rows(self) -> int:
        """Samples wanted from one call on one batch."""
        is_wide = self.features > MOST_FEATURES
        rows = MOST_FEATURES**2 // self.features if is_wide else ENOUGH * self.features
        return -(-rows // self.batches)

    @property
    def mib(self) -> float:
        """Size of the answers, at most."""
        return self.rows * self.batches * self.calls * len(filters_of(self.layer)) * 4 / 2**20

    def note(self, _input: Tensor, answer: Tensor, other: Tensor | None) -> None:
        """Keep what the original answered, with what that is added to, at places drawn for this."""
        places = None
        if not isinstance(self.layer, nn.Linear):
            size = answer.shape[2:]
            every = int(np.prod(size))
            count = min(every, max(1, -(-self.rows // len(answer))))
            places = np.unravel_index(np.sort(self.draw.choice(every, count, replace=False)), size)
        kept = None
        if self.kept is not None:
            kept = torch.as_tensor(np.asarray(self.kept), device=answer.device)
        rows = answered_rows(self.layer, answer, places, kept)
        if self.join is not None and other is not None:
            rows = rows + answered_rows(self.layer, other, places, kept) * self.join.gain()
        self.answers.append((places, self.extent(answer), rows))

    def lack(
        self, noted: Tensor, other: Tensor | None, places: Any, answer: Tensor, is_again: bool
    ) -> Tensor:
        """Return what the ``answer`` now lacks where ``other`` is added: (G, rows, O / G).

        For a layer that ``is_again`` fitted only of what the ReLU behind it passes on.
        """
        now = answered_rows(self.layer, answer, places, None)
        if self.shift is not None:
            now = now + self.shift
        if self.join is not None and other is not None:
            now = now + answered_rows(self.layer, other, places, None) * self.join.gain()
        is_known = self.join is None or other is not None
        if is_again and self.rectifier is not None and is_known:
            noted = self.rectifier.asked(noted, now)
        groups = getattr(self.layer, "groups", 1)
        return (noted - now).reshape(len(now), groups, -1).transpose(0, 1)

    def change(self, change: Tensor) -> None:
        """Add ``change`` (G, O / G, F), if it is finite, to the weights and the bias."""
        if not torch.isfinite(change).all():
            return
        shift = change[:, :, -1].reshape(-1) if self.has_bias else None
        change = change if shift is None else change[:, :, :-1]
        filters = filters_of(self.layer) if self.computed is None else self.computed
        fitted = filters + change.reshape(filters.shape).to(filters)
        if self.computed is None:
            self.layer.weight.copy_(mirrored(self.layer, fitted))
        elif set_computed(self.layer, fitted):
            self.computed = fitted
        else:
            return
        if shift is not None and self.layer.bias is not None:
            self.layer.bias.copy_(self.bias + shift)
        elif shift is not None:  # the norm is going to add it
            self.shift = (self.bias + shift).to(self.layer.weight)


def _pairs(
    pruned: nn.Module, original: nn.Module, plan: PrunePlan, images: Sequence[Tensor]
) -> Iterator[_LayerFit]:
    """Yield the layers that can be fitted, in the order in which they first run."""
    before = dict(original.named_modules())
    one, batch = (fitted_layers(pruned, part) for part in (images[0][:1], images[0]))
    layers = [each for each in one if each in batch]  # not those that run image by image
    # Looked for in the original: where one channel is left, a broadcast looks like a plain sum.
    found = followers(
        original, [before[name] for name, _, calls in layers if calls == 1], images[0][:1]
    )
    left = {before[name]: m for name, m in pruned.named_modules() if name in before}
    for name, layer, calls in layers:
        axis = int(isinstance(layer, Transposed))
        kept = plan.tensors.get(f"{name}.{computed_from(layer)}", {}).get(axis)
        join = found.joins.get(before[name])
        if join is not None and join.norm is not None:
            join = dataclasses.replace(join, norm=left[join.norm])
        relu = found.rectifiers.get(before[name])
        if relu is not None and relu.norm is not None:
            relu = dataclasses.replace(relu, norm=left[relu.norm])
        norm = found.norms.get(before[name]) if layer.bias is None else None
        pair = _LayerFit(layer, before[name], kept, calls, len(images), join, relu)
        pair.norm = None if norm is None else left[norm]
        yield pair


def _portions(pairs: Sequence[_LayerFit]) -> Iterator[list[_LayerFit]]:
    """Yield the pairs in portions whose answers fit into memory together."""
    portion: list[_LayerFit] = []
    for pair in pairs:
        if portion and sum(each.mib for each in portion) + pair.mib > ANSWERS_MIB:
            yield portion
            portion = []
        portion.append(pair)
    if portion:
        yield portion


def _asked(
    pairs: Sequence[_LayerFit], original: Replay, images: Sequence[Tensor]
) -> Iterator[_LayerFit]:
    """Run the original once for all ``pairs``, yield them, and forget each one's answers after."""
    for number, batch in enumerate(images):
        _run(original, number, batch, {pair.before: (pair, pair.note) for pair in pairs})
    for pair in pairs:
        yield pair
        pair.answers.clear()


def fitted_layers(model: nn.Module, image: Tensor) -> list[tuple[str, Layer, int]]:
    """Return the layers that can be fitted, in the order in which they first run, and how often."""
    modules = dict(model.named_modules())
    owners = Counter(id(weight) for m in modules.values() for weight in m._parameters.values())
    calls: Counter[str] = Counter()

    def count(name: str, module: nn.Module, inputs: tuple[Tensor, ...], answer: Any) -> None:
        # Not before it runs: a weight that is computed may be that of before the cut until then.
        is_known = bool(inputs) and computed_from(module) is not None
        if is_known and is_linear_in_its_weight(module, inputs[0], answer):
            calls.update([name])

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            own = (each for key, each in module.named_parameters() if key != "bias")
            if isinstance(module, Layer) and all(owners[id(each)] == 1 for each in own):
                hook = functools.partial(count, name)
                hooks.enter_context(module.register_forward_hook(hook))
        model(copied(image))
    written = _written_anew(model, [(name, modules[name]) for name in calls], image)
    return [(name, modules[name], count) for name, count in calls.items() if name not in written]


def _written_anew(
    model: nn.Module, layers: Iterable[tuple[str, nn.Module]], image: Tensor
) -> set[str]:
    """Return layers whose weights the network writes whenever it runs, as merged branches are.

    What is fitted would be lost. Seen by other weights that are no longer there after a pass.
    """
    plain = {name: layer._parameters.get("weight") for name, layer in layers}
    weights = {name: each for name, each in plain.items() if each is not None}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        other = {name: weight.mul_(OTHER).clone() for name, weight in weights.items()}
        model(copied(image))
        found = {name for name, weight in weights.items() if not weight.equal(other[name])}
        for name, weight in weights.items():
            weight.copy_(before[name])
    return found


def _fit(pair: _LayerFit, pruned: Replay, images: Sequence[Tensor]) -> None:
    """Fit one layer and, where a ReLU follows, once more to what that passes on of its answers."""
    ridge = Ridge(sum(len(rows) for _, _, rows in pair.answers), pair.features)

    def add(x: Tensor, answer: Tensor, other: Tensor | None, noted: Tensor, places: Any) -> None:
        ridge.add(_seen(pair, x, places), pair.lack(noted, other, places, answer, ridge.is_solved))

    for _ in range(1 if pair.rectifier is None else 2):
        _show(pair, pruned, images, add)
        if ridge.rows:
            pair.change(ridge.solve().mT)
    pair.finish()


def _show(
    pair: _LayerFit, pruned: Replay, images: Sequence[Tensor], add: Callable[..., None]
) -> None:
    """Run the pruned network on all images and show what the layer does, with what is wanted."""
    answers = iter(pair.answers)

    def show(x: Tensor, answer: Tensor, other: Tensor | None) -> None:
        places, extent, noted = next(answers)
        # Where it runs over channels of others, some of which are gone, no place has a partner.
        if pair.extent(answer) == extent:
            add(x, answer, other, noted, places)

    for number, batch in enumerate(images):
        _run(pruned, number, batch, {pair.layer: (pair, show)})


Show = Callable[[Tensor, Tensor, Tensor | None], None]  # input, answer, what it is added to


def _run(
    replay: Replay, number: int, images: Tensor, shows: Mapping[nn.Module, tuple[_LayerFit, Show]]
) -> None:
    """Run a network until every call of some of its layers was shown.

    What ran before the first of the layers is final, and not computed again.
    """
    missing = sum(pair.calls for pair, _ in shows.values())
    joined = {pair.join.number: (pair.join, show) for pair, show in shows.values() if pair.join}
    waiting: dict[int, tuple[Tensor, Tensor]] = {}  # input and answer, by the sum to come

    def shown() -> None:
        nonlocal missing
        missing -= 1
        if not missing:
            raise EnoughSeen

    def seen(layer: nn.Module, inputs: tuple[Tensor, ...], answer: Tensor) -> None:
        pair, show = shows[layer]
        if pair.join is not None:
            waiting[pair.join.number] = inputs[0], answer
            return
        show(inputs[0], answer, None)
        shown()

    def summed(number: int, operands: tuple[Tensor, Tensor]) -> None:
        if number in joined:
            join, show = joined[number]
            x, answer = waiting.pop(number)
            other = operands[join.other]  # one for all images, where it is a map of places
            if len(other) in (1, len(answer)):
                show(x, answer, other.expand(len(answer), *other.shape[1:]))
            else:
                show(x, answer, None)
            shown()

    sums = Sums(summed)
    limit = min(map(replay.entered, shows))
    with contextlib.ExitStack() as stack:
        for layer in shows:
            stack.enter_context(layer.register_forward_hook(seen))
        stack.enter_context(replay.passing(number, limit, sums.skip))
        stack.enter_context(contextlib.suppress(EnoughSeen))
        stack.enter_context(sums if joined else contextlib.nullcontext())
        replay.model(copied(images))


def _seen(pair: _LayerFit, x: Tensor, places: Any) -> Tensor:
    """Return what the layer sees at some places of its output, by group: (G, rows, F)."""
    seen = seen_rows(pair.layer, x, places)
    if pair.is_centered:  # then no change has a sum either
        seen = seen - seen.mean(2, keepdim=True)
    if pair.has_bias:
        seen = torch.cat([seen, seen.new_ones(*seen.shape[:2], 1)], dim=2)
    return seen
