"""Refitting makes the weights that are left take over what the lost channels did."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn

import compress
from compress.errors import UsageError
from compress.groups import trace
from compress.groups.plan import make_prune_plan
from compress.prune import refit
from compress.prune.forward_passes import Rectifier
from compress.prune.reconstruction import fitted_layers


def twins(first: nn.Conv2d, second: nn.Module, between: nn.Module | None = None) -> nn.Module:
    """Return a network whose channels 0 and 1 are equal, so that losing one loses nothing."""
    with torch.no_grad():
        first.weight[1] = first.weight[0]
        assert first.bias is not None
        first.bias[1] = first.bias[0]
    return nn.Sequential(first, nn.ReLU(), between or nn.Identity(), second).eval()


def without_channel_1(model: nn.Module, example: Tensor) -> tuple[nn.Module, compress.PrunePlan]:
    network = trace(model, example)
    group = network.groups[0]
    plan = make_prune_plan(network, {group.name: np.delete(np.arange(group.size), 1)})
    return compress.apply_pruning(model, plan), plan


def images(count: int = 4) -> list[tuple[Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [(torch.randn(16, 3, 9, 9, generator=draw),) for _ in range(count)]


def changed(layer: nn.Module, **sizes: object) -> nn.Module:
    """Return a layer whose sizes are others than those it was built with, as dilated backbones."""
    for name, value in sizes.items():
        setattr(layer, name, value)
    return layer


class Same(nn.Conv2d):
    """Pads as TensorFlow does: more behind than before, and by the size of the image."""

    def forward(self, input: Tensor) -> Tensor:
        sides = zip(reversed(input.shape[2:]), reversed(self.stride), strict=True)
        missing = [max(3 - (side % step or step), 0) for side, step in sides]
        padded = nn.functional.pad(input, [n for m in missing for n in (m // 2, m - m // 2)])
        return nn.functional.conv2d(padded, self.weight, self.bias, self.stride)


class Standardized(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


class ScaledStandardized(nn.Conv2d):
    """Filters of mean 0 and a size that is learned apart, as those of NFNets."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) - 0.5)

    def forward(self, input: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (variance + 1e-6).sqrt() * self.gain
        return self._conv_forward(input, weight, self.bias)


class Attentive(nn.Conv2d):
    """A weight that is made of what the layer reads."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight * input.mean(), self.bias)


class Activated(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu_()


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Paired(nn.Linear):
    """Gives its bias back apart, as parallel layers do."""

    def forward(self, input: Tensor) -> Any:
        return nn.functional.linear(input, self.weight), self.bias


class PairedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = Paired(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        answer, bias = self.last(x.mean((2, 3)))
        return answer + bias


class Named(nn.Linear):
    """Computes what any other linear layer does."""


CONSUMERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(6, 5, 3, padding=1),
    "strided": lambda: nn.Conv2d(6, 5, 3, stride=2, padding=(2, 1), bias=False),
    "dilated": lambda: nn.Conv2d(6, 5, 3, dilation=2),
    "same": lambda: nn.Conv2d(6, 5, (3, 1), padding="same"),
    "reflected": lambda: nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose2d(6, 5, 3),
    "enlarging": lambda: nn.ConvTranspose2d(6, 5, 4, 2, padding=(1, 0), bias=False),
    "uneven": lambda: nn.ConvTranspose2d(6, 5, (3, 2), (2, 1), output_padding=(1, 0), dilation=2),
    "cropping": lambda: nn.ConvTranspose2d(6, 5, 2, 2, padding=2),
    "dilated later": lambda: changed(
        nn.Conv2d(6, 5, 3, 2, padding=1), stride=(1, 1), dilation=(2, 2), padding=(2, 2)
    ),
    "by single numbers": lambda: changed(
        nn.Conv2d(6, 5, 3, padding=2), stride=2, dilation=1, padding=0
    ),
    "same, dilated later": lambda: changed(nn.Conv2d(6, 5, 3, padding="same"), dilation=(2, 1)),
    "of another weight": lambda: changed(
        nn.Conv2d(6, 5, 1), weight=nn.Parameter(torch.randn(5, 6, 3, 3)), padding=1
    ),
    "padded by itself": lambda: Same(6, 5, 3, stride=2),
    "standardized": lambda: ScaledStandardized(6, 5, 3, stride=2),
    "weight norm": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 5, 3)),
    "older weight norm": lambda: torch.nn.utils.weight_norm(nn.Conv2d(6, 5, 3)),
    "spectral norm": lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 5, 3)),
    "older spectral norm": lambda: torch.nn.utils.spectral_norm(nn.Conv2d(6, 5, 3)),
    "transposed later": lambda: changed(
        nn.ConvTranspose2d(6, 5, 3), stride=2, padding=(1, 1), output_padding=(1, 1), dilation=1
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_an_equal_channel_takes_over(consumer: str) -> None:
    torch.manual_seed(0)
    model = twins(nn.Conv2d(3, 6, 3), CONSUMERS[consumer]())
    x = torch.randn(2, 3, 9, 9)
    pruned, plan = without_channel_1(model, x[:1])
    before = (copy.deepcopy(pruned)(x) - model(x)).abs().max()  # it has not run itself
    assert refit(pruned, model, plan, images(16)) is pruned
    after = (pruned(x) - model(x)).abs().max()
    assert after < 0.06 * before  # the pull towards the old weights keeps it from being exactly 0


@pytest.mark.parametrize("kind", [Standardized, Attentive, Activated])
def test_a_class_that_computes_something_else_with_its_weight_is_left_alone(
    kind: type[nn.Conv2d],
) -> None:
    torch.manual_seed(0)
    model = twins(nn.Conv2d(3, 6, 3), kind(6, 5, 3))
    pruned, plan = without_channel_1(model, torch.randn(1, 3, 9, 9))
    weight = pruned.get_parameter("3.weight").clone()
    refit(pruned, model, plan, images())
    assert torch.equal(weight, pruned.get_parameter("3.weight"))


def test_a_weight_that_the_network_writes_itself_is_left_alone() -> None:
    """What is fitted would be gone with the next pass, and layers behind fitted to it in vain."""
    model = zoo.MergedWeight().eval()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    assert [name for name, _, _ in fitted_layers(model, torch.randn(2, 3, 9, 9))] == [
        "deep.0",
        "head",
    ]
    same = [torch.equal(each, before[n]) for n, each in model.named_parameters() if n[:2] != "me"]
    assert all(same)


@pytest.mark.parametrize(("kind", "is_fitted"), [(Named, True), (Doubled, False)])
def test_derived_linear_layers_are_fitted_where_they_are_linear(
    kind: type[nn.Linear], is_fitted: bool
) -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), kind(6, 4))
    model = twins(nn.Conv2d(3, 6, 3), head)
    pruned, plan = without_channel_1(model, torch.randn(1, 3, 9, 9))
    weight = pruned.get_parameter("3.2.weight").clone()
    refit(pruned, model, plan, images())
    assert torch.equal(weight, pruned.get_parameter("3.2.weight")) != is_fitted


def test_a_layer_that_gives_several_things_is_left_alone() -> None:
    torch.manual_seed(0)
    model = twins(nn.Conv2d(3, 6, 3), PairedHead())
    pruned, plan = without_channel_1(model, torch.randn(1, 3, 9, 9))
    weight = pruned.get_parameter("3.last.weight").clone()
    refit(pruned, model, plan, images())
    assert torch.equal(weight, pruned.get_parameter("3.last.weight"))


def test_linear_layers_and_depthwise_ones_are_fitted_too() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    between = nn.Conv2d(6, 6, 3, groups=6, padding=1)
    with torch.no_grad():
        between.weight[1] = between.weight[0]
        assert between.bias is not None
        between.bias[1] = between.bias[0]
    model = twins(nn.Conv2d(3, 6, 3), head, between)
    x = torch.randn(2, 3, 9, 9)
    pruned, plan = without_channel_1(model, x[:1])
    before = (pruned(x) - model(x)).abs().max()
    refit(pruned, model, plan, images(16))
    assert (pruned(x) - model(x)).abs().max() < 0.1 * before


def test_a_network_that_lost_nothing_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4))
    plan = compress.plan_pruning(model, torch.randn(1, 3, 9, 9), keep_channels=1.0)
    pruned = compress.apply_pruning(model, plan)
    refit(pruned, model, plan, images())
    for name, weight in pruned.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name], atol=1e-4, rtol=1e-3)


def test_no_matrix_has_more_sides_than_there_are_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sides: list[int] = []

    def decomposed(squares: Tensor) -> Any:
        sides.append(squares.shape[-1])
        return plain(squares)

    plain = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", decomposed)
    model = twins(nn.Conv2d(3, 6, 3), nn.Sequential(nn.Flatten(), nn.Linear(6 * 49, 4)))
    pruned, plan = without_channel_1(model, torch.randn(1, 3, 9, 9))
    refit(pruned, model, plan, images(1))  # 16 samples, 5 * 49 features: squares may take GiB
    assert sides == [3 * 9 + 1, 16]


def test_wide_layers_are_shown_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = twins(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3))
    pruned, plan = without_channel_1(model, torch.randn(1, 3, 9, 9))
    shown: list[torch.Size] = []

    def seen(layer: Any, x: Tensor, places: Any) -> Tensor:
        found: Tensor = plain(layer, x, places)
        shown.append(found.shape)
        return found

    module = sys.modules[refit.__module__]
    plain = module._seen
    monkeypatch.setattr(module, "_seen", seen)
    monkeypatch.setattr(module, "MOST_FEATURES", 5 * 9)  # and a bias
    refit(pruned, model, plan, images(2))
    rows = [shape[1] for shape in shown if shape[2] == 5 * 9 + 1]
    assert len(rows) == 2
    assert sum(rows) < 5 * 9 + 1 + 2 * 16  # as many as fit into the squares, by whole images


def test_the_original_modes_and_hooks_are_left_as_found() -> None:
    torch.manual_seed(0)
    model = twins(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)).train()
    pruned, plan = without_channel_1(model, torch.randn(1, 3, 9, 9))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refit(pruned, model, plan, images())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not any(m._forward_hooks for m in [*model.modules(), *pruned.modules()])


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm2d(4)])
@pytest.mark.parametrize("count", [1, 6])
def test_few_samples_help_on_images_that_were_not_among_them(
    norm: Callable[[], nn.Module], count: int
) -> None:
    torch.manual_seed(0)
    last = nn.Conv2d(6, 4, 7, bias=norm is nn.Identity)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), last, norm()).eval()
    plan = make_prune_plan(trace(model, images()[0][0][:1]), {"0": np.arange(3)})
    pruned = compress.apply_pruning(model, plan)
    (fresh,) = images(5)[-1]
    with torch.no_grad():
        before = (pruned(fresh) - model(fresh)).square().mean()
        refit(pruned, model, plan, images(count))  # 16 or 96 answers, and 147 weights
        assert (pruned(fresh) - model(fresh)).square().mean() < before * 0.85
    assert not torch.equal(pruned.get_parameter("2.weight"), model[2].weight[:, :3])


class Mixer(nn.Module):
    """Tokens are mixed by linear layers that run once for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 3, stride=3), nn.Linear(8, 4)
        self.mixed, self.folded = nn.Linear(9, 9), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(self.patches(x).flatten(2)).relu()  # (B, C, T)
        x = self.folded(x.flatten(0, 1)).unflatten(0, (len(x), -1))
        answer: Tensor = self.head(x.transpose(1, 2))
        return answer


def test_layers_that_run_over_channels_of_others_are_left_alone() -> None:
    torch.manual_seed(0)
    model, (x,) = Mixer().eval(), images()[0]
    plan = make_prune_plan(trace(model, x[:1]), {"patches": np.arange(5)})
    pruned = compress.apply_pruning(model, plan)
    with torch.no_grad():
        before = (pruned(x) - model(x)).square().mean()
        refit(pruned, model, plan, images())
        assert (pruned(x) - model(x)).square().mean() < before
    for name in ("mixed", "folded"):
        assert torch.equal(
            pruned.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.weight")
        )


class Branches(nn.Module):
    """Two branches of equal filters that are added: what one loses, the other can replace."""

    def __init__(self, norm: nn.Module, *, in_place: bool, first_last: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3))
        self.second = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3))
        self.second[0].load_state_dict(self.first[0].state_dict())
        self.norm, self.in_place, self.first_last = norm, in_place, first_last
        with torch.no_grad():
            for value in norm.state_dict().values():
                if value.is_floating_point():
                    value.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        branches = [lambda: self.first(x), lambda: self.norm(self.second(x))]
        ran = [branch() for branch in (branches[::-1] if self.first_last else branches)]
        if self.in_place:
            ran[1] += ran[0]
            return ran[1].relu_()
        return ran[0] + ran[1]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm2d(5)])
def test_what_one_branch_lost_the_one_that_runs_last_replaces(
    norm: Callable[[], nn.Module], in_place: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 9, 9)
    left = {}
    for first_last in (False, True):
        model = Branches(norm(), in_place=in_place, first_last=first_last).eval()
        network = trace(model, x[:1])
        plan = make_prune_plan(network, {"first.0": np.arange(2, 6)})
        pruned = compress.apply_pruning(model, plan)
        before = (pruned(x) - model(x)).abs().mean()
        refit(pruned, model, plan, images(16))
        left[first_last] = float((pruned(x) - model(x)).abs().mean() / before)
    assert left[False] < 0.05  # the second branch sees all that was lost, and runs last
    assert left[True] > 0.2  # what runs last sees only what is left


def test_statistics_become_those_of_training() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    model = twins(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), norm)
    x = torch.randn(2, 3, 9, 9)
    answers = []
    for training in (None, [(batch * 2 + 1,) for (batch,) in images(2)]):
        pruned, plan = without_channel_1(model, x[:1])
        refit(pruned, model, plan, images(), training_batches=training)
        seen = torch.cat([batch for (batch,) in training or images()])
        entering = pruned[1](pruned[0](seen))  # type: ignore[index]
        torch.testing.assert_close(pruned[2].running_mean, entering.mean((0, 2, 3)))  # type: ignore[index]
        answers.append(pruned(x))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)


class Gated(nn.Module):
    """A map of one channel is added to all, then the input is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 1, 1)
        self.second, self.third = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x) + self.gate(x))
        return self.third(self.second(y) + x)


def test_sums_are_the_same_ones_when_one_channel_is_left() -> None:
    torch.manual_seed(0)
    model = Gated().eval()
    x = torch.randn(8, 3, 9, 9)
    plan = make_prune_plan(trace(model, x[:1]), {"first": np.array([2])})
    pruned = compress.apply_pruning(model, plan)
    before = (pruned(x) - model(x)).square().mean()
    refit(pruned, model, plan, images(8))
    assert (pruned(x) - model(x)).square().mean() < before


class Tokens(nn.Module):
    """Two blocks of residual mlps on tokens, with a convolution over their map inside.

    With one image the last linear layer adds its bias apart there, with several it does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 3, stride=3)
        self.first = nn.ModuleList(nn.Linear(8, 12) for _ in range(2))
        self.mixed = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1, groups=12) for _ in range(2))
        self.second = nn.ModuleList(nn.Linear(12, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for first, mixed, second in zip(self.first, self.mixed, self.second, strict=True):
            places = mixed(first(x).transpose(1, 2).unflatten(2, (3, 3))).relu()
            x = second(places.flatten(2).transpose(1, 2)) + x
        return x


class Placed(nn.Module):
    """Adds one map of places to the answers for all images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 6, 3)
        self.third = nn.Conv2d(6, 4, 3)
        self.places = nn.Parameter(torch.randn(1, 6, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.third((self.second(self.first(x).relu()) + self.places).relu())
        return answer


@pytest.mark.parametrize("network", [Tokens, Placed])
def test_a_sum_is_found_again_with_several_images(network: type[nn.Module]) -> None:
    torch.manual_seed(1)
    model, batches = network().eval(), images()
    plan = compress.plan_pruning(model, batches[0][0][:1], criterion="l1", keep_macs=0.6)
    pruned = compress.apply_pruning(model, plan)
    with torch.no_grad():
        lost = [(pruned(x) - model(x)).square().mean() for (x,) in batches]
        refit(pruned, model, plan, batches)
        left = [(pruned(x) - model(x)).square().mean() for (x,) in batches]
    assert sum(left) < 0.5 * sum(lost)


@pytest.mark.parametrize("name", [name for name, one in zoo.ZOO.items() if len(one.shapes) == 1])
def test_every_difficulty_is_scored_by_obs_and_refitted(name: str) -> None:
    model, (x,) = zoo.build(name), zoo.inputs(name)
    data = [(x, torch.zeros(len(x), dtype=torch.int64))]
    plan = compress.plan_pruning(model, x[:1], criterion="obs", keep_channels=0.6, batches=data)
    pruned = compress.apply_pruning(model, plan)
    shifts = torch.randn(8, *x.shape, generator=torch.Generator().manual_seed(0))
    refit(pruned, model, plan, [(x + shift,) for shift in shifts])
    assert all(torch.isfinite(value).all() for value in pruned.state_dict().values())
    pruned(x)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_layer_before_a_relu_is_fitted_to_what_that_passes_on(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    ).eval()
    network = trace(model, images()[0][0])
    group = network.groups[0]
    plan = make_prune_plan(network, {group.name: np.arange(3)})

    def error() -> float:
        fitted = refit(compress.apply_pruning(model, plan), model, plan, images(8))
        with torch.no_grad():
            return sum(float((fitted(x) - model(x)).square().sum()) for (x,) in images(8))

    aware = error()
    passes: list[Tensor] = []
    monkeypatch.setattr(
        Rectifier, "asked", lambda self, wanted, answer: passes.append(wanted) or wanted
    )
    assert aware < 0.99 * error() and passes


def test_no_images_are_refused() -> None:
    model = twins(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3))
    pruned, plan = without_channel_1(model, torch.randn(1, 3, 9, 9))
    with pytest.raises(UsageError, match="batches holds no images"):
        refit(pruned, model, plan, [])
