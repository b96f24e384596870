"""Networks come out of wrappers, change their mode and come back, or are refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import weight_norm

from compress.errors import ModelError, PlanError
from compress.models import check_forward
from compress.models.cifar import resnet8
from compress.modules import (
    aliasing_copy,
    evaluating,
    full_copy,
    meta_copy,
    network_of,
    set_mode,
    with_gradients,
)


class ModelEmaV2(nn.Module):
    """As timm keeps an average: the network is called ``module``."""

    def __init__(self, model):
        super().__init__()
        self.module, self.decay = model, 0.99


class ModelEMA:
    """As Ultralytics keeps an average: no module, the network is called ``ema``."""

    def __init__(self, model):
        self.ema, self.updates = model, 0


class EMANet(nn.Module):
    """A network that is named like an average: it has layers beside the module."""

    def __init__(self, model):
        super().__init__()
        self.module, self.head = model, nn.Linear(10, 2)

    def forward(self, x):
        return self.head(self.module(x))


class Trainer:
    def __init__(self, model):
        self.model = model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        ModelEmaV2,
        ModelEMA,
        lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    ],
)
def test_wrappers_are_taken_off(wrap):
    model = resnet8()
    found = network_of(wrap(model))
    assert type(found) is type(model)
    assert list(found.state_dict()) == list(model.state_dict())


def test_a_network_named_like_a_wrapper_stays():
    model = EMANet(resnet8())
    assert network_of(model) is model


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (Trainer(resnet8()), "model.model"),
        ({"state_dict": {}}, "dict"),
        (None, "NoneType"),
        (nn.Module(), "no forward"),
        (nn.Sequential(nn.LazyConv2d(4, 3)), "0.weight has no shape yet"),
    ],
)
def test_what_is_no_network_is_refused_by_name(thing, message):
    with pytest.raises(ModelError, match=message):
        network_of(thing)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "made", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(1, 2))]
)
def test_torchscript_is_refused_inside_a_network_too(made):
    scripted = made(nn.Linear(2, 2))
    for thing in (scripted, nn.Sequential(nn.ReLU(), scripted)):
        with pytest.raises(ModelError, match="TorchScript"):
            network_of(thing)


class Starts(nn.Linear):
    """As ``ultralytics.YOLO``: ``train`` starts a training."""

    def train(self, data=None, **options):
        raise RuntimeError("a training was started")


def test_a_train_that_is_no_switch_is_not_called():
    model = nn.Sequential(Starts(2, 2), nn.Dropout())
    set_mode(model[0], training=False)
    assert not model[0].training
    inner = Starts(2, 2)
    with evaluating(inner):
        assert not inner.training
    assert inner.training


def test_frozen_parts_keep_their_mode():
    model = resnet8().train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    frozen.eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    check_forward(model, torch.zeros(2, 3, 32, 32))
    assert model.training
    assert not frozen.training


def test_gradients_flow_inside_no_grad_and_inference_mode():
    weight = torch.ones(2, requires_grad=True)
    for context in (torch.no_grad, torch.inference_mode):
        with context(), with_gradients():
            assert torch.autograd.grad((weight * 2).sum(), weight)[0].tolist() == [2, 2]


def test_torchs_own_masks_do_not_hide_a_network():
    model = resnet8()
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    torch_prune.l1_unstructured(layer, "weight", 1)
    assert network_of(model) is model


class Own(nn.Conv2d):
    """Counts how often it is copied its own way."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Own:
        twin = Own(self.in_channels, self.out_channels, self.kernel_size)
        twin.copied = getattr(self, "copied", 0) + 1
        memo[id(self)] = twin
        return twin


class Restored(nn.Linear):
    """Keeps what it can compute out of its state."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.table = [0] * 4

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "table"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.table = [1] * 4


class Listing(nn.Module):
    """Plain attributes of every kind, a module used twice, a tensor that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.names, self.seen = [1, 2], {"a": [3]}, {4}
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.second = self.first
        self.register_parameter("absent", None)
        self.register_buffer("left_out", torch.ones(2), persistent=False)
        self.loose = torch.zeros(3)


def state(model: nn.Module) -> dict[str, Any]:
    """Return all that the modules of ``model`` hold, by name, but tensors and modules."""
    held = ("_parameters", "_buffers", "_modules", "loose")
    return {
        f"{name}.{key}": (type(value), value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in held
    }


@pytest.mark.parametrize("build", [resnet8, Listing, lambda: weight_norm(nn.Linear(3, 4))])
@pytest.mark.parametrize("copied", [aliasing_copy, full_copy, meta_copy])
def test_a_copy_is_what_deepcopy_makes_but_for_its_tensors(build, copied):
    model = build()
    twin, wanted = copied(model), copy.deepcopy(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in wanted.modules()]
    for name in ("_parameters", "_buffers", "_modules"):
        for one, other in zip(twin.modules(), wanted.modules(), strict=True):
            assert list(vars(one)[name]) == list(vars(other)[name])
    if build in (resnet8, Listing):  # classes made anew compare by identity
        assert state(twin) == state(wanted)
    assert list(twin.state_dict()) == list(wanted.state_dict())


class Settings(dict):
    __getattr__ = dict.__getitem__


@pytest.mark.parametrize(
    ("held", "why"), [({}.keys, "TypeError"), (Settings, "KeyError: '__deepcopy__'")]
)
def test_what_cannot_be_copied_is_named(held, why):
    model = Listing()
    model.first[0].kept = held()
    what = rf"Listing: first\.0\.kept: the network cannot be copied: {why}"
    with pytest.raises(PlanError, match=what):
        full_copy(model)


def test_nothing_that_can_change_is_shared():
    model = Listing()
    twin = full_copy(model)
    assert twin.first is twin.second
    assert twin.first is not model.first
    for name in ("sizes", "names", "seen", "loose"):
        assert getattr(twin, name) is not getattr(model, name)
    assert twin.names["a"] is not model.names["a"]
    model.first[0].register_forward_hook(print)
    assert not twin.first[0]._forward_hooks


class KeepsByHook(nn.Module):
    """Reads what a hook, a function made in the constructor, keeps on the network."""

    def __init__(self):
        super().__init__()
        self.inner, self.kept = nn.Linear(2, 2), []
        self.inner.register_forward_hook(lambda _module, _given, out: self.kept.append(out))

    def forward(self, x):
        self.inner(x)
        return self.kept.pop()


def test_a_hook_that_writes_into_its_network_writes_into_the_copy():
    model, x = KeepsByHook(), torch.rand(1, 2)
    twin = full_copy(model)
    torch.testing.assert_close(twin(x), model(x))
    assert model.kept == twin.kept == []


def test_a_hook_is_copied_as_deepcopy_copies_it():
    model = resnet8()
    model.conv1.register_forward_hook(print)
    assert list(full_copy(model).conv1._forward_hooks.values()) == [print]


def test_modules_with_a_way_of_their_own_are_copied_that_way():
    model = nn.Sequential(Own(3, 4, 3), Restored())
    twin = full_copy(model)
    assert twin[0].copied == 1
    assert twin[1].table == [1] * 4
