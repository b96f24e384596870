"""A copy of a network holds what ``copy.deepcopy`` would, and shares what it is meant to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from compress.models.cifar import resnet8
from compress.modules.copying import aliasing_copy, full_copy, meta_copy


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


def test_a_hook_is_copied_as_deepcopy_copies_it():
    model = resnet8()
    model.conv1.register_forward_hook(print)
    assert list(full_copy(model).conv1._forward_hooks.values()) == [print]


def test_modules_with_a_way_of_their_own_are_copied_that_way():
    model = nn.Sequential(Own(3, 4, 3), Restored())
    twin = full_copy(model)
    assert twin[0].copied == 1
    assert twin[1].table == [1] * 4
