"""Networks as people pass them: out of wrappers, checked, put into a mode and back, copied."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import types
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from compress.errors import ModelError, PlanError

_INSIDE = ("_orig_mod", "module", "ema_model", "ema", "_original_module")  # in wrappers
_BESIDE = {"online_model", "model", "_forward_module"}  # the trained one, next to its average
_WRAPPER = re.compile(r"EMA|Ema(?![a-z])|Averag|Parallel|^OptimizedModule$|^_FabricModule$")
_HOLDS = ("model", "net", "network", "module", "backbone")  # where other objects keep a network


def network_of(model: Any) -> nn.Module:
    """Return the network itself, out of the wrappers that compile, parallelize or average it.

    Known are ``torch.compile``, ``DataParallel``, ``DistributedDataParallel``, ``AveragedModel``,
    Lightning Fabric's module, and classes named after an average (EMA) that keep a network in
    ``module``, ``ema`` or ``ema_model``.

    Raises:
        ModelError: it is no network whose program can be followed; the message says what to pass.
    """
    while (inner := _wrapped(model)) is not None:
        model = inner
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ModelError(
            "is no network", where=name, expected="a torch.nn.Module", fix=_advice(model)
        )
    for place, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                "is a TorchScript module, whose program cannot be followed or changed",
                where=place or name,
                fix="Pass the network as it was before torch.jit.script or torch.jit.trace",
            )
    if type(model).forward is nn.Module.forward and "forward" not in vars(model):
        raise ModelError("defines no forward: it is no network", where=name, fix=_advice(model))
    for place, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                f"{place} has no shape yet, as in lazy modules that never ran",
                where=name,
                fix="Run the network once on an example input",
            )
    return model


def set_mode(model: nn.Module, *, training: bool) -> None:
    """Put ``model`` into training or eval mode, also where its ``train`` means something else."""
    if _switches_mode(type(model).train):
        model.train(training)
    else:
        nn.Module.train(model, training)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into eval mode and leave every module's mode as it was found."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        set_mode(model, training=False)
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def with_gradients() -> Iterator[None]:
    """Record gradients and make ordinary tensors, inside ``no_grad`` and ``inference_mode`` too."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


def _wrapped(model: Any) -> Any:
    """Return what a wrapper holds; None if ``model`` is none."""
    if isinstance(model, torch.jit.ScriptModule) or not _WRAPPER.search(type(model).__name__):
        return None
    held = _held(model)
    place = next((name for name in _INSIDE if name in held), None)
    if place is None:
        return None
    if isinstance(model, nn.Module) and (
        model._parameters or not set(held) <= {place, *_BESIDE, *_INSIDE}
    ):
        return None  # a network of its own that is named like a wrapper
    return held[place]


def _held(model: Any) -> dict[str, nn.Module]:
    """Return the networks that an object keeps in its attributes."""
    found = dict(getattr(model, "__dict__", {}))
    if isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        found |= model._modules
    return {name: value for name, value in found.items() if isinstance(value, nn.Module)}


def _advice(model: Any) -> str:
    held = _held(model)
    name = next((name for name in _HOLDS if name in held), next(iter(held), None))
    if name is None:
        return "Pass the network itself"
    return f"Pass the network that it holds: model.{name} (a {type(held[name]).__name__})"


def _switches_mode(train: Any) -> bool:
    """Say whether ``train`` is called with the mode alone, as ``nn.Module.train`` is."""
    try:
        _, *options = inspect.signature(train).parameters.values()
    except (TypeError, ValueError):
        return False
    if not options or any(each.default is each.empty for each in options[1:]):
        return False
    first = options[0]
    return first.name == "mode" or isinstance(first.default, bool)


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` whose tensors have shapes and types but no values."""
    return _copy(
        model, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    )


def full_copy(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with its values; gradients and the graph are left behind."""
    return _copy(model, lambda t: t.detach().clone())


def aliasing_copy(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` whose tensors still share their memory with it."""
    return _copy(model, lambda t: t.detach().clone() if t.is_inference() else t.detach())


def own_storage(copied: nn.Module, except_for: Container[str]) -> None:
    """Give every tensor of an aliasing copy, but those named, memory of its own."""
    for name, tensor in parameters_and_buffers(copied):
        if name not in except_for:
            tensor.data = tensor.data.clone()


def breaks_channels_last(weight: Tensor, stride: Sequence[int]) -> bool:
    """Return whether the gradient of a convolution overwrites memory in channels last, on a CPU.

    oneDNN's kernel for strided 1x1 convolutions of 2 to 7 channels does, on CPUs without AVX-512
    (torch 2.15): first layers of RepVGG, MobileOne and FastViT ended the process.
    """
    channels, kernel = weight.shape[1], weight.shape[2:]
    return weight.ndim == 4 and channels < 8 and max(kernel) == 1 and max(stride) > 1


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Return how ``tensor`` is laid out: channels last where that differs from contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(tensor.ndim)
    if last is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _copy(model: nn.Module, tensor: Any) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(tensor(parameter.detach()), parameter.requires_grad)
    # Also tensors that modules keep as plain attributes, as weight norm's hook does.
    kept = (value for module in model.modules() for value in module.__dict__.values())
    for value in (*model.buffers(), *(value for value in kept if isinstance(value, Tensor))):
        memo.setdefault(id(value), tensor(value.detach()))
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:  # noqa: BLE001 - whatever a class of the user's raises
        raise PlanError(
            f"the network cannot be copied: {type(error).__name__}: {error}",
            where=_uncopied(model, memo),
            fix="Keep tensors, modules and plain values only (a dict's keys as a list; no locks, "
            "files or handles; no dict whose __getattr__ raises KeyError, for AttributeError)",
        ) from None
    for module in twin.modules():
        wrapped = isinstance(module.__dict__.get("forward"), types.FunctionType)
        if wrapped and type(module).forward is not nn.Module.forward:
            del module.__dict__["forward"]  # a wrapper around the forward of the original
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in hooks.items():
                if isinstance(hook, types.FunctionType):  # it may write into the network
                    hooks[key] = with_closure(hook, lambda _, held: memo.get(id(held), held))
    return twin


def _uncopied(model: nn.Module, memo: dict[int, Any]) -> str:
    """Return the class of ``model`` and the first attribute that cannot be copied, if one is it."""
    whole = type(model).__name__
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception:  # noqa: BLE001 - whatever a class of the user's raises
                    return f"{whole}: {name}.{key}" if name else f"{whole}: {key}"
    return whole


def parameters_and_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer once, by the first of its names."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def with_closure(
    function: types.FunctionType, change: Callable[[str, Any], Any]
) -> types.FunctionType:
    """Return a copy of ``function`` with ``change(name, value)`` for each closed-over variable."""
    cells = tuple(
        types.CellType(change(name, value)) if value is not _EMPTY else types.CellType()
        for name, value in closed_over(function)
    )
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    return copy


_EMPTY = object()


def closed_over(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of the variables that a function closes over."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a cell that was never filled
            yield name, _EMPTY
