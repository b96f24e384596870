"""Block-wise reconstruction: blocks of layers are fitted together, by gradient, without labels."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compress.errors import UsageError
from compress.groups.calls import tensors_in
from compress.groups.plan import PrunePlan
from compress.modules import evaluating, network_of
from compress.modules.inputs import copied, read_batches
from compress.progress import track
from compress.prune.batchnorm import rebase_batchnorm
from compress.prune.forward_passes import EnoughSeen, Replay
from compress.prune.reconstruction import Batches, fitted_layers
from compress.prune.windows import Layer, Transposed, computed_from

MOST_LAYERS = 8  # of a block: more are fitted part by part
IMAGES = 128  # of one step, at most
STEP_MIB = 2048  # of what the modules of a block answer in one step
HELD_MIB = 1024  # of the inputs and answers of one block
RATE = 1e-3  # of Adam, at the start; falls to zero along a cosine


def refit_blocks(
    pruned: nn.Module,
    original: nn.Module,
    plan: PrunePlan,
    batches: Batches,
    *,
    steps: int = 200,
    training_batches: Batches | None = None,
) -> nn.Module:
    """Fit the blocks of ``pruned`` one after the other to the answers of ``original``, in place.

    ``refit`` solves for one layer at a time: the first layer of a block never learns what the later
    ones could still make good. Here all weights of a block move together until its answer to what
    it gets in the pruned network comes close to the original's; call it after ``refit``. A block is
    the largest module of two to eight layers that makes one tensor, as a residual block does, or so
    many neighbours in a Sequential. The layer that reads its answer, or its own last one, says
    which of its channels are left; one whose answer neither orders, and one that comes no closer,
    stay as they are. Needs no labels.

    Arguments are those of ``refit``; ``steps`` are of Adam for each block.

    Raises:
        UsageError: there is not one batch, or no block.

    Source: Li et al., BRECQ, ICLR 2021, https://arxiv.org/abs/2102.05426, which rounds weights
    block by block; here weights that a cut has left are fitted so.
    """
    device = next(pruned.parameters()).device
    batches = list(batches)
    images = [batch.to(device).args[0] for batch in read_batches(batches)]
    with evaluating(pruned), evaluating(original):
        blocks = _blocks(pruned, original, plan, images[0][:1])
        if not blocks:
            raise _no_block()
        count = sum(map(len, images))
        if len({batch.shape[1:] for batch in images}) == 1:
            size = int(STEP_MIB / max(block.mib for block in blocks))  # of a batch for one step
            images = list(torch.split(torch.cat(images), max(1, min(IMAGES, size))))
        with torch.no_grad():
            known, fitted = (Replay(net, images[0][:1], count) for net in (original, pruned))
        for block in track(blocks, "refit blocks", len(blocks)):
            _fit(block, list(_seen(block, known, fitted, images)), steps)
    return rebase_batchnorm(pruned, batches if training_batches is None else training_batches)


def check_blocks(model: nn.Module, image: Tensor) -> None:
    """Check, on one image (1, C, H, W), that a network has blocks that ``refit_blocks`` could fit.

    Raises:
        UsageError: it has none.
    """
    model = network_of(model)
    with evaluating(model), torch.no_grad():
        layers = [name for name, _, _ in fitted_layers(model, image)]
        fit = set(_observed(model, image).channels)
    if next(_candidates(dict(model.named_modules()), layers, fit), None) is None:
        raise _no_block()


def _no_block() -> UsageError:
    return UsageError(
        "no block can be fitted",
        expected=f"modules, or neighbours in a Sequential, of 2 to {MOST_LAYERS} layers",
        fix="Leave refit_steps out",
    )


@dataclass(frozen=True)
class _Block:
    """Modules that feed one the other, in both networks, and which channels of the answer stay."""

    parts: tuple[nn.Module, ...]
    before: tuple[nn.Module, ...]
    kept: Any  # positions, None = all
    weights: tuple[nn.Parameter, ...]  # that no other module has
    mib: float  # of what all its modules answer for one image


def _blocks(pruned: nn.Module, original: nn.Module, plan: PrunePlan, image: Tensor) -> list[_Block]:
    """Return the blocks in the order in which they run."""
    layers = [name for name, _, _ in fitted_layers(pruned, image)]
    before, after = (_observed(net, image) for net in (original, pruned))
    owners = Counter(id(p) for m in pruned.modules() for p in m._parameters.values())
    modules, originals = dict(pruned.named_modules()), dict(original.named_modules())
    fit = set(before.channels) & set(after.channels)
    order = list(after.channels)
    found: dict[tuple[str, ...], _Block] = {}
    for names in sorted(_candidates(modules, layers, fit), key=lambda each: order.index(each[-1])):
        last = names[-1]
        whole, left = before.channels[last], after.channels[last]
        kept = None
        if whole != left:
            own_last = [layer for name in names for layer in _inside(name, layers)][-1]
            kept = _kept(plan, originals, [*before.readers[last], (own_last, False)], whole)
            if kept is None or len(kept) != left:
                continue  # several layers make its channels, in an order that is not known here
        parts = tuple(modules[name] for name in names)
        own = [p for part in parts for p in part.parameters() if owners[id(p)] == 1]
        mib = sum(after.mib(name) for name in names)
        found[names] = _Block(parts, tuple(originals[n] for n in names), kept, tuple(own), mib)
    covered = {name for names in found for name in names}
    return [
        block
        for names, block in found.items()
        if not any(names[0].startswith(f"{other}.") for other in covered)
        and not any(names[0] in others and len(others) > len(names) for others in found)
    ]


def _inside(name: str, layers: Sequence[str]) -> list[str]:
    """Return the layers of a module, itself if it is one."""
    return [layer for layer in layers if layer == name or layer.startswith(f"{name}.")]


def _candidates(
    modules: dict[str, nn.Module], layers: Sequence[str], fit: set[str]
) -> Iterator[tuple[str, ...]]:
    """Yield what a block could be: a module, or neighbours of a Sequential too large for one."""
    for name in fit:
        count = len(_inside(name, layers))
        if 2 <= count <= MOST_LAYERS and name and name not in layers:
            yield (name,)
        if count > MOST_LAYERS and type(modules[name]).forward is nn.Sequential.forward:
            children = [f"{name}.{child}" if name else child for child in modules[name]._modules]
            yield from _portions(children, layers, fit)


def _portions(
    children: Sequence[str], layers: Sequence[str], fit: set[str]
) -> Iterator[tuple[str, ...]]:
    """Yield neighbours that have two to eight layers together, in portions of about one size.

    One layer that is left over behind them is in none.
    """
    counts = {child: len(_inside(child, layers)) for child in children}
    for is_fit, run in groupby(children, lambda c: c in fit and counts[c] <= MOST_LAYERS):
        names = list(run) if is_fit else []
        total = sum(counts[name] for name in names)
        most = math.ceil(total / max(1, math.ceil(total / MOST_LAYERS)))
        portions: list[list[str]] = [[]]
        for name in names:
            held = sum(counts[each] for each in portions[-1])
            if held and counts[name] and held + counts[name] > most:
                portions.append([])
            portions[-1].append(name)
        for portion in portions:
            if len(portion) > 1 and sum(counts[name] for name in portion) > 1:
                yield tuple(portion)


def _kept(
    plan: PrunePlan, originals: Any, layers: Sequence[tuple[str, bool]], channels: int
) -> Any:
    """Return which of so many channels are left, from the first layer that reads or makes them."""
    for name, reads in layers:
        layer = originals[name]
        if isinstance(layer, _Norm):
            axis, whole = 0, layer.num_features
        else:
            axis = int(reads != isinstance(layer, Transposed))
            whole = layer.weight.shape[axis]
        kept = plan.tensors.get(f"{name}.{computed_from(layer)}", {}).get(axis)
        if kept is not None and whole == channels:
            return kept
    return None


_Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_Pool = nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d | nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d
_Whole = nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool1d | nn.AdaptiveMaxPool2d
# What answers with the channels it reads, in their order.
_Passing = (
    _Pool
    | _Whole
    | nn.ReLU
    | nn.ReLU6
    | nn.LeakyReLU
    | nn.SiLU
    | nn.GELU
    | nn.Dropout
    | nn.Identity
)


@dataclass(frozen=True)
class _Observed:
    """What the modules that run once and make one tensor with channels answer for one image."""

    channels: dict[str, int]  # in the order in which they end
    sizes: dict[str, int]  # bytes
    readers: dict[str, list[tuple[str, bool]]]  # layers that get it, pooled and activated perhaps

    def mib(self, name: str) -> float:
        """Return the size of what a module and all in it answer."""
        inside = [n for n in self.sizes if n == name or n.startswith(f"{name}.")]
        return sum(self.sizes[each] for each in inside) / 2**20


def _observed(model: nn.Module, image: Tensor) -> _Observed:
    """Run a network once and note what its modules make, and which layers read that."""
    found: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()
    makers: dict[Any, list[str]] = {}  # of a place in memory: what was put there
    readers: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    held: list[Tensor] = []  # so that no place in memory is used twice

    def enter(module: nn.Module, inputs: Any, *, name: str) -> None:
        plain = isinstance(module, _Norm) or (
            isinstance(module, Layer) and getattr(module, "groups", 1) == 1
        )
        if plain and inputs and isinstance(inputs[0], Tensor):
            for maker in makers.get(_place(inputs[0]), ()):
                readers[maker].append((name, True))

    def leave(module: nn.Module, inputs: Any, answer: Any, *, name: str) -> None:
        calls[name] += 1
        if isinstance(answer, Tensor) and answer.ndim > 1:
            found[name] = answer
            held.append(answer)
            known = makers.setdefault(_place(answer), [])
            if isinstance(module, _Passing) and inputs:
                known += [m for m in makers.get(_place(inputs[0]), ()) if m not in known]
            known.append(name)

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            before, after = functools.partial(enter, name=name), functools.partial(leave, name=name)
            hooks.enter_context(module.register_forward_pre_hook(before))
            hooks.enter_context(module.register_forward_hook(after))
        model(copied(image))
    once = {name: answer for name, answer in found.items() if calls[name] == 1}
    channels = {name: answer.shape[1] for name, answer in once.items()}
    return _Observed(channels, {name: answer.nbytes for name, answer in once.items()}, readers)


def _place(tensor: Tensor) -> Any:
    """Return where the channels of a tensor lie: the same after it was flattened behind them."""
    return tensor.data_ptr(), tensor.shape[1:2], tensor.stride()[1:2]


_Given = tuple[tuple[Any, ...], dict[str, Any]]  # what a module is called with


def _seen(
    block: _Block, known: Replay, fitted: Replay, images: Sequence[Tensor]
) -> Iterator[tuple[_Given, Tensor]]:
    """Yield what the block gets in the pruned network, and what it is to answer, of each batch."""
    held = 0.0
    for number, batch in enumerate(images):
        _, wanted = _called(known, block.before, number, batch)
        given, _ = _called(fitted, block.parts, number, batch)
        if block.kept is not None:
            wanted = wanted[:, torch.as_tensor(np.asarray(block.kept), device=wanted.device)]
        yield given, wanted
        held += sum(tensor.nbytes for tensor in tensors_in((given, wanted))) / 2**20
        if held > HELD_MIB:
            return


@torch.no_grad()
def _called(
    replay: Replay, parts: Sequence[nn.Module], number: int, images: Tensor
) -> tuple[_Given, Tensor]:
    """Return what the first of ``parts`` gets and what the last answers, for a batch."""
    found: list[Any] = []

    def enter(_module: Any, inputs: Any, named: Any) -> None:
        found.append(_cloned((inputs, named)))  # the block may change it in place

    def leave(_module: Any, _inputs: Any, answer: Tensor) -> None:
        found.append(answer.clone())
        raise EnoughSeen

    with contextlib.ExitStack() as stack:
        stack.enter_context(parts[0].register_forward_pre_hook(enter, with_kwargs=True))
        stack.enter_context(parts[-1].register_forward_hook(leave))
        stack.enter_context(replay.passing(number, replay.entered(parts[0]), lambda _: None))
        stack.enter_context(contextlib.suppress(EnoughSeen))
        replay.model(copied(images))
    given, answer = found
    return given, answer


def _cloned(given: _Given) -> _Given:
    return cast("_Given", tree_map_only(Tensor, Tensor.clone, given))


def _answer(block: _Block, given: _Given) -> Tensor:
    inputs, named = _cloned(given)
    answer: Tensor = block.parts[0](*inputs, **named)
    for part in block.parts[1:]:
        answer = part(answer)
    return answer


def _fit(block: _Block, seen: Sequence[tuple[_Given, Tensor]], steps: int) -> None:
    """Move the weights of a block towards the answers wanted; keep them if they come closer."""
    before = _distance(block, seen)
    if not block.weights or not 0 < before < 1:  # 1: no answer at all is as close
        return
    old = [weight.detach().clone() for weight in block.weights]
    asked = [weight.requires_grad for weight in block.weights]
    power = sum(float(wanted.square().mean()) for _, wanted in seen) / len(seen)
    try:
        for weight in block.weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            optimizer = torch.optim.Adam(block.weights, lr=RATE)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for step in range(steps):
                given, wanted = seen[step % len(seen)]
                error = (_answer(block, given) - wanted).square().mean() / power
                grads = torch.autograd.grad(error, block.weights, allow_unused=True)
                for weight, grad in zip(block.weights, grads, strict=True):
                    weight.grad = grad
                optimizer.step()
                schedule.step()
    finally:
        for weight, flag in zip(block.weights, asked, strict=True):
            weight.grad = None
            weight.requires_grad_(flag)
    if not _distance(block, seen) < before:
        with torch.no_grad():
            for weight, value in zip(block.weights, old, strict=True):
                weight.copy_(value)


@torch.no_grad()
def _distance(block: _Block, seen: Sequence[tuple[_Given, Tensor]]) -> float:
    """Return the squared error of a block's answers as a share of the power of those wanted."""
    error = sum(float((_answer(block, x) - y).square().sum()) for x, y in seen)
    power = sum(float(wanted.square().sum()) for _, wanted in seen)
    return error / power if power else 0.0
