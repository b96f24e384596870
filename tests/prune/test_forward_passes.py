"""Passes that reuse what was computed before are passes: same inputs seen, same network after."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.models.cifar import resnet8, unet
from compress.prune.forward_passes import Rectifier, Replay, followers


class InPlace(nn.Module):
    """Activations that change their inputs, and a skip that reads what they left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        self.act(x)
        y = self.second(x)
        y += x
        return self.third(F.relu_(y) + x)


class Shared(nn.Module):
    """A layer that runs twice, shapes that are read, a list of features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(18, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        batch, channels = features[0].shape[:2]
        features.append(self.twice(features[-1]))
        features.append(self.twice(features[-1]).view(batch, channels, 16, 16))
        return self.last(torch.cat(features, 1))


class Turned(nn.Module):
    """Returns a view of its input, of the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(2, 3)


class Views(nn.Module):
    """Modules that return views of their inputs, which others read as well; dense layers last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.turned = Turned()
        self.dense = nn.Sequential(
            nn.Flatten(), nn.Linear(512, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.turned(x)
        return self.dense(self.second(y + 2 * x))


NETWORKS = {
    "views": Views,
    "residual": lambda: resnet8(width=4),
    "skips": lambda: unet(3, 4),
    "in place": InPlace,
    "shared": Shared,
}


def seen(model: nn.Module, layer: nn.Module, run: object) -> list[Tensor]:
    found: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _m, inputs, out: found.append(inputs[0].clone()))
    try:
        run()
    finally:
        hook.remove()
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_a_layer_sees_what_it_sees_in_a_whole_pass(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    batches = [torch.randn(2, 3, 16, 16) for _ in range(2)]
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    computed: list[int] = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: computed.append(1))
    with torch.no_grad():
        replay = Replay(model, batches[0][:1], 4)
        for layer in layers:
            for number, batch in enumerate(batches):

                def again(number: int = number, batch: Tensor = batch, layer: nn.Module = layer):
                    with replay.passing(number, replay.entered(layer), lambda _count: None):
                        model(batch)

                expected = seen(model, layer, lambda batch=batch: model(batch))
                found = seen(model, layer, again)
                assert len(found) == len(expected) > 0
                for ours, theirs in zip(found, expected, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            layer.weight.mul_(1.1)  # as refitting does, in order
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_layers_that_are_done_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, image = resnet8(width=4).eval(), torch.randn(1, 3, 16, 16)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    computed: list[nn.Module] = []
    original = nn.Conv2d._conv_forward

    def counted(self: nn.Conv2d, *given: object) -> Tensor:
        computed.append(self)
        return original(self, *given)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", counted)
    counts: list[int] = []
    with torch.no_grad():
        replay = Replay(model, image, 1)
        for _ in range(2):
            computed.clear()
            with replay.passing(0, replay.entered(convolutions[-1]), lambda _count: None):
                model(image)
            counts.append(len(computed))
    assert counts == [len(convolutions), 1]


def test_without_room_all_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.prune.forward_passes.CACHE_MIB", 0)
    torch.manual_seed(0)
    model, image = resnet8(width=4).eval(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        replay = Replay(model, image, 1)
        for _ in range(2):
            with replay.passing(0, replay.entered(model.linear), lambda _count: None):
                torch.testing.assert_close(model(image), model(image), rtol=0, atol=0)
    assert not any(replay._kept[0].values())


class Followed(nn.Module):
    """Two layers with a BatchNorm each, and what becomes of the second one's answer."""

    def __init__(self, end: Callable[[Tensor, Tensor], object], inplace: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.after = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.end = nn.ReLU(inplace), end
        self.eval()

    def forward(self, x: Tensor) -> object:
        x = self.relu(self.norm(self.first(x)))
        return self.end(self.after(self.second(x)), x)


@pytest.mark.parametrize(
    ("end", "top", "is_joined"),
    [
        (lambda y, _: F.relu(y), math.inf, False),
        (lambda y, _: F.relu6(y).sum(), 6.0, False),
        (lambda y, x: F.relu(y + x), math.inf, True),
        (lambda y, x: F.relu_(y.add_(x)).mul(2), math.inf, True),
        (lambda y, x: (F.relu(y + x), F.relu(x)), math.inf, True),
        (lambda y, _: y, None, False),
        (lambda y, _: {"before": y, "after": F.relu(y)}, None, False),
        (lambda y, _: F.relu(y) + y.sigmoid(), None, False),
        (lambda y, x: F.relu(y + x) + y, None, True),
        (lambda y, x: F.relu(y + x) * (y + x).sum(), None, True),
        (lambda y, _: F.silu(y), None, False),
        (lambda y, _: F.hardtanh(y), None, False),
    ],
)
@pytest.mark.parametrize("inplace", [True, False])
def test_a_relu_counts_where_nothing_else_reads_what_it_reads(end, top, is_joined, inplace) -> None:
    model = Followed(end, inplace)
    layers = [model.first, model.second]
    with torch.no_grad():
        found = followers(model, layers, torch.randn(2, 3, 6, 6))
    assert (model.second in found.joins) == is_joined and model.first not in found.joins
    assert found.rectifiers[model.first] == Rectifier(math.inf, model.norm)
    assert found.norms == {model.first: model.norm, model.second: model.after}
    told = found.rectifiers.get(model.second)
    assert told == (None if top is None else Rectifier(top, model.after))


class RectifiedNorm(nn.BatchNorm2d):
    """A BatchNorm that has its activation in it, as those of some packages."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def test_a_norm_with_an_activation_in_it_is_followed_as_what_it_computes() -> None:
    model = Followed(lambda y, x: y + x, inplace=False)
    model.after = RectifiedNorm(4).eval()
    with torch.no_grad():
        found = followers(model, [model.second], torch.randn(2, 3, 6, 6))
    assert not found.joins and found.norms == {model.second: model.after}
    assert found.rectifiers == {model.second: Rectifier(math.inf, model.after)}


def test_a_norm_of_two_layers_is_nobodys_own() -> None:
    model = Followed(lambda y, _: y, inplace=False)
    model.after = model.norm
    with torch.no_grad():
        found = followers(model, [model.first, model.second], torch.randn(2, 3, 6, 6))
    assert not found.norms


@pytest.mark.parametrize("top", [math.inf, 1.0])
def test_what_a_relu_cuts_off_may_be_anything_that_it_cuts_off(top: float) -> None:
    norm = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -1.0, 0.0]))
        norm.bias.copy_(torch.tensor([0.5, 0.1, 0.3]))
        norm.running_mean.copy_(torch.tensor([0.2, -0.4, 0.0]))
    draw = torch.Generator().manual_seed(0)
    wanted, answer = (torch.randn(200, 3, generator=draw) for _ in range(2))
    asked = Rectifier(top, norm).asked(wanted, answer)

    def passed(rows: Tensor) -> Tensor:
        return norm(rows[:, :, None, None])[:, :, 0, 0].clamp(0, top)

    torch.testing.assert_close(passed(asked), passed(wanted))
    both = passed(answer) == passed(wanted)  # cut off on the same side: nothing is asked for
    both[:, 2] = False  # the BatchNorm hardly passes it on
    assert both[:, :2].any() and not both[:, :2].all()
    torch.testing.assert_close(asked[both], answer[both])
    assert torch.equal(asked[:, 2], wanted[:, 2])
