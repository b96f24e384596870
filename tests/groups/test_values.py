"""Networks whose program looks at values, keeps state between runs, or has hooks of the user's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from compress import apply_pruning, mask_pruning, plan_pruning
from compress.errors import PlanError
from compress.groups import trace
from compress.groups.proof import prove

TRACING = sys.modules[trace.__module__]


class Caching(zoo.Stages):
    """Keeps a map of places for the last image size, computed with values, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.size: tuple[int, ...] = ()
        self.places = torch.empty(0)
        self.register_buffer("seen", torch.zeros(1))
        self.sizes: list[Any] = []
        self.strides = torch.tensor([2.0])

    def between(self, x: Tensor) -> Tensor:
        self.sizes.append(x.shape[2:])
        if self.size != x.shape[2:]:
            self.size = tuple(x.shape[2:])
            self.places = x.new_full((x.shape[2], x.shape[3]), self.strides[0])
        self.seen = self.seen + 1
        return x * self.places


def plan_bytes(model: nn.Module, image: Tensor) -> str:
    return json.dumps(plan_pruning(model, image, criterion="l1", keep_macs=0.5).to_json())


def test_the_plan_does_not_depend_on_what_ran_before() -> None:
    torch.manual_seed(0)
    model, image = Caching().eval(), torch.randn(1, 3, 16, 16)
    fresh = plan_bytes(model, image)
    assert "by values" not in fresh and not model.sizes and not model.size
    with torch.no_grad():
        model(image)
        assert plan_bytes(model, image) == fresh
        model(torch.randn(1, 3, 24, 16))
    assert plan_bytes(model, image) == fresh
    assert len(model.sizes) == 2 and model.size == (24, 16)


def test_hooks_of_the_user_see_values_and_no_meta_tensors() -> None:
    model, image = zoo.build("Residual"), torch.randn(2, 3, 16, 16)
    plain = trace(model, image)
    seen: list[float] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        assert not output.is_meta
        seen.append(float(output.abs().mean()))

    handle = model.body[0].register_forward_hook(watch)
    watched = trace(model, image)
    assert seen and seen[0] == pytest.approx(float(model.body[0](model.stem(image)).abs().mean()))
    assert [g.name for g in watched.groups] == [g.name for g in plain.groups]
    assert dict(watched.frozen) == dict(plain.frozen)
    handle.remove()


class Capturing(nn.Module):
    """Hangs hooks on its layers when it first runs, and reads what they note: transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)])
        self.heads = nn.ModuleList([nn.Conv2d(8, 4, 1), nn.Conv2d(12, 4, 1)])
        self.is_watched = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_watched:
            for stage in self.stages:
                stage.register_forward_hook(lambda _layer, _given, answer: SEEN.append(answer))
            self.is_watched = True
        SEEN.clear()
        for stage in self.stages:
            x = stage(x)
        return sum(head(seen).mean((2, 3)) for head, seen in zip(self.heads, SEEN, strict=False))


SEEN: list[Tensor] = []


@pytest.mark.parametrize("has_run", [False, True])
def test_hooks_that_a_network_hangs_on_its_layers_hang_there_once(has_run: bool) -> None:
    model, image = Capturing().eval(), torch.rand(1, 3, 8, 8)
    if has_run:
        model(image)
    network = trace(model, image)
    assert sorted(group.size for group in network.groups) == [8, 12]
    plan = plan_pruning(model, image, criterion="l2", keep_macs=0.6)
    assert prove(model.double(), plan, image.double()) < 1e-12


def test_a_hook_that_changes_channels_is_part_of_the_network() -> None:
    model, image = zoo.build("Plain"), torch.randn(2, 3, 16, 16)
    model.stem.register_forward_hook(lambda module, args, output: output.flip(1))
    plan = plan_pruning(model, image, criterion="l1", keep_channels=0.5)
    assert prove(model.double(), plan, image.double()) < 1e-12


@pytest.mark.parametrize("name", ["Plain", "SpectralNormed", "WeightNormed", "FusedAttention"])
def test_ordinary_networks_are_traced_without_computing_anything(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computing(model: nn.Module) -> nn.Module:
        raise AssertionError("traced with values")

    monkeypatch.setattr(TRACING, "full_copy", computing)
    assert trace(zoo.build(name), zoo.inputs(name)).groups


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_the_trace_with_values_finds_what_the_one_without_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = zoo.build(name), zoo.inputs(name)
    plain = trace(model, inputs)
    monkeypatch.setattr(TRACING, "has_own_hooks", lambda model: True)
    valued = trace(model, inputs)
    assert [(g.name, g.size) for g in valued.groups] == [(g.name, g.size) for g in plain.groups]
    assert dict(valued.frozen) == dict(plain.frozen)
    assert valued.macs == plain.macs


class Answers(nn.Module):
    """Class scores, of which ``answer`` makes what the network returns."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.scores = zoo.conv_bn(3, 16), nn.Linear(16, 10)
        self.answer = answer
        self.register_buffer("ages", torch.linspace(0, 90, 10))

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.scores(self.body(x).mean((2, 3))), self.ages)


@pytest.mark.parametrize(
    "answer",
    [
        lambda scores, ages: float(scores.max()),
        lambda scores, ages: {"energy": -scores.logsumexp(1)[0].item()},
        lambda scores, ages: scores.softmax(1) @ ages,
        lambda scores, ages: scores.softmax(1) @ ages[:, None],
        lambda scores, ages: nn.functional.linear(scores.softmax(1), ages[None] / 2),
        lambda scores, ages: nn.functional.conv1d(
            scores.softmax(1)[..., None], ages[None, :, None]
        ),
    ],
    ids=["number", "numbers in a dict", "mv", "mm", "linear", "convolution"],
)
def test_classes_stay_where_a_number_or_a_constant_mean_of_their_scores_is_the_answer(
    answer: Callable[[Tensor, Tensor], Any],
) -> None:
    network = trace(Answers(answer).eval(), torch.randn(2, 3, 8, 8))
    assert {group.name for group in network.groups} == {"body.0"}
    assert "makes one number of its channels" in network.frozen["scores"]


class TwoStages(nn.Module):
    """A detector in small: a second head looks at the cells whose score is above a threshold."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold
        self.body, self.score = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 1, 1)
        self.hidden, self.head = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, images):
        images = torch.stack(images) if isinstance(images, list) else images
        x = torch.relu(self.body(images))
        cells = x.permute(0, 2, 3, 1)[self.score(x)[:, 0] > self.threshold]
        return self.head(torch.relu(self.hidden(cells)))


def counted(model, example):
    """Return multiply-accumulates by hooks: of convolutions and linear layers as they run."""
    total = []

    def hook(layer, _, output):
        total.append(output.numel() * layer.weight[0].numel())

    hooks = [m.register_forward_hook(hook) for m in model.modules() if hasattr(m, "weight")]
    with torch.no_grad():
        model(example)
    for one in hooks:
        one.remove()
    return sum(total)


def test_what_runs_on_chosen_values_is_counted():
    model, image = TwoStages(-1e9).eval(), torch.randn(3, 8, 8)
    for example in (image[None], ([image],)):
        plan = plan_pruning(model, example, criterion="l1", keep_macs=0.5)
        small = apply_pruning(model, plan)
        assert plan.macs_before == counted(model, image[None])
        assert plan.macs_after == counted(small, image[None])
        assert plan.macs_after == counted(small, image[None])
        assert plan.macs_after <= 0.5 * plan.macs_before


def test_a_layer_that_ran_on_nothing_is_no_part_of_a_budget_of_macs():
    model = TwoStages(1e9).eval()
    with pytest.raises(PlanError, match="hidden, head ran on empty tensors"):
        plan_pruning(model, torch.randn(1, 3, 8, 8), criterion="l1", keep_macs=0.5)
    plan = plan_pruning(model, torch.randn(1, 3, 8, 8), criterion="l1", keep_params=0.5)
    small = apply_pruning(model, plan)
    small.threshold = model.threshold = -1e9
    assert small(torch.randn(1, 3, 8, 8)).shape[1] == 4
    masked = mask_pruning(model, plan)
    masked.threshold = -1e9
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(small(x), masked(x))


class FreesWhatItRead(torch.autograd.Function):
    """As reversible networks do: ``set_`` comes to the tracer as an op, and as no call before."""

    @staticmethod
    def forward(ctx, x):
        y = x * 2
        part = x[:, :2].contiguous()
        part.set_()
        return y

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Reversible(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.middle(FreesWhatItRead.apply(self.first(x))).relu())


def test_a_tensor_that_is_freed_in_an_own_function_is_no_riddle():
    torch.manual_seed(0)
    model, x = Reversible().eval(), torch.rand(1, 3, 8, 8)
    plan = plan_pruning(model, x, criterion="l2", keep_macs=0.7)
    assert plan.macs_after <= 0.7 * plan.macs_before
    assert prove(model.double(), plan, x.double()) < 1e-12
