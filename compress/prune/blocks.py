"""Block-wise reconstruction: blocks of layers are fitted together, by gradient, without labels."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compress.errors import UsageError
from compress.groups.calls import tensors_in
from compress.groups.plan import PrunePlan
from compress.modules import evaluating
from compress.modules.inputs import read_batches
from compress.progress import track
from compress.prune.batchnorm import rebase_batchnorm
from compress.prune.forward_passes import EnoughSeen, Replay
from compress.prune.reconstruction import Batches, Layer, Transposed, fitted_layers

MOST_LAYERS = 8  # of a block: more are fitted part by part
IMAGES = 128  # of one step
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
    the largest module of two to eight layers that makes one tensor, as a residual block does. The
    layer that reads its answer, or its own last one, says which of its channels are left; one whose
    answer neither orders, and one that comes no closer, stay as they are. Needs no labels.

    Args:
        pruned: What ``refit`` returned. Its weights are replaced.
        original: The network before the cut. Not modified.
        plan: The cut between the two.
        batches: Images, float32 (B, C, H, W), with or without anything after them.
        steps: Steps of Adam for each block.
        training_batches: As in ``refit``.

    Returns:
        ``pruned``.

    Raises:
        UsageError: there is not one batch, or no block.

    Source: Li et al., BRECQ, ICLR 2021, https://arxiv.org/abs/2102.05426, which rounds weights
    block by block; here weights that a cut has left are fitted so.
    """
    device = next(pruned.parameters()).device
    batches = list(batches)
    images = _regrouped([batch.to(device).args[0] for batch in read_batches(batches)])
    with evaluating(pruned), evaluating(original):
        blocks = _blocks(pruned, original, plan, images[0][:1])
        if not blocks:
            raise UsageError(
                "no block can be fitted",
                expected=f"modules of 2 to {MOST_LAYERS} layers that make one tensor",
                fix="Leave refit_steps out",
            )
        count = sum(map(len, images))
        with torch.no_grad():
            known, fitted = (Replay(net, images[0][:1], count) for net in (original, pruned))
        for block in track(blocks, "refit blocks", len(blocks)):
            _fit(block, list(_seen(block, known, fitted, images)), steps)
    return rebase_batchnorm(pruned, batches if training_batches is None else training_batches)


@dataclass(frozen=True)
class _Block:
    """A module in both networks, and which channels of the original's answer are left."""

    module: nn.Module
    before: nn.Module
    kept: Any  # positions, None = all
    weights: tuple[nn.Parameter, ...]  # that no other module has


def _regrouped(batches: Sequence[Tensor]) -> list[Tensor]:
    """Return the images in batches for one step each; as they are where their sizes differ."""
    if len({batch.shape[1:] for batch in batches}) > 1:
        return list(batches)
    return list(torch.split(torch.cat(list(batches)), IMAGES))


def _blocks(pruned: nn.Module, original: nn.Module, plan: PrunePlan, image: Tensor) -> list[_Block]:
    """Return the blocks in the order in which they run."""
    layers = [name for name, _, _ in fitted_layers(pruned, image)]
    (before, readers), (after, _) = (_observed(net, image) for net in (original, pruned))
    owners = Counter(id(p) for m in pruned.modules() for p in m._parameters.values())
    modules, originals = dict(pruned.named_modules()), dict(original.named_modules())

    def inside(name: str) -> list[str]:
        return [layer for layer in layers if layer.startswith(f"{name}.")]

    found: dict[str, _Block] = {}
    for name in after:
        if not name or name not in before or not 2 <= len(inside(name)) <= MOST_LAYERS:
            continue
        whole, left = before[name], after[name]
        kept = None
        if whole != left:
            kept = _kept(plan, originals, [*readers[name], (inside(name)[-1], False)], whole)
            if kept is None or len(kept) != left:
                continue  # several layers make its channels, in an order that is not known here
        own = [p for p in modules[name].parameters() if owners[id(p)] == 1]
        found[name] = _Block(modules[name], originals[name], kept, tuple(own))
    return [
        block
        for name, block in found.items()
        if not any(name.startswith(f"{other}.") for other in found)
    ]


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
        kept = plan.tensors.get(f"{name}.weight", {}).get(axis)
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


def _observed(
    model: nn.Module, image: Tensor
) -> tuple[dict[str, int], dict[str, list[tuple[str, bool]]]]:
    """Return how many channels each module makes, in the order in which they end, and its readers.

    Only of modules that run once and make one tensor with channels. A reader is a layer that gets
    the answer itself, or what pooling and activations made of it.
    """
    found: dict[str, int] = {}
    calls: Counter[str] = Counter()
    makers: dict[Any, list[str]] = {}  # of a place in memory: what was put there
    readers: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    held: list[Tensor] = []  # so that no place in memory is used twice

    def enter(module: nn.Module, inputs: Any, *, name: str) -> None:
        plain = isinstance(module, _Norm) or (isinstance(module, Layer) and _groups(module) == 1)
        if plain and inputs and isinstance(inputs[0], Tensor):
            for maker in makers.get(_place(inputs[0]), ()):
                readers[maker].append((name, True))

    def leave(module: nn.Module, inputs: Any, answer: Any, *, name: str) -> None:
        calls[name] += 1
        if isinstance(answer, Tensor) and answer.ndim > 1:
            found[name] = answer.shape[1]
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
        model(image)
    return {name: count for name, count in found.items() if calls[name] == 1}, readers


def _groups(layer: Any) -> int:
    return int(getattr(layer, "groups", 1))


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
        given, _ = _called(fitted, block.module, number, batch)
        if block.kept is not None:
            wanted = wanted[:, torch.as_tensor(np.asarray(block.kept), device=wanted.device)]
        yield given, wanted
        held += sum(tensor.nbytes for tensor in tensors_in((given, wanted))) / 2**20
        if held > HELD_MIB:
            return


@torch.no_grad()
def _called(
    replay: Replay, module: nn.Module, number: int, images: Tensor
) -> tuple[_Given, Tensor]:
    """Return what ``module`` gets and what it answers for a batch."""
    found: list[Any] = []

    def enter(_module: Any, inputs: Any, named: Any) -> None:
        found.append(_cloned((inputs, named)))  # the block may change it in place

    def leave(_module: Any, _inputs: Any, answer: Tensor) -> None:
        found.append(answer.clone())
        raise EnoughSeen

    with contextlib.ExitStack() as stack:
        stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
        stack.enter_context(module.register_forward_hook(leave))
        stack.enter_context(replay.passing(number, replay.entered(module), lambda _: None))
        stack.enter_context(contextlib.suppress(EnoughSeen))
        replay.model(images)
    given, answer = found
    return given, answer


def _cloned(given: _Given) -> _Given:
    return cast("_Given", tree_map_only(Tensor, Tensor.clone, given))


def _answer(module: nn.Module, given: _Given) -> Tensor:
    inputs, named = _cloned(given)
    return cast("Tensor", module(*inputs, **named))


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
                error = (_answer(block.module, given) - wanted).square().mean() / power
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
    error = sum(float((_answer(block.module, x) - y).square().sum()) for x, y in seen)
    power = sum(float(wanted.square().sum()) for _, wanted in seen)
    return error / power if power else 0.0
