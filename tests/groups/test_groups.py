"""Tracing: which channels go together, which stay and why, and what layers cost."""

from __future__ import annotations

import inspect

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from einops import rearrange
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import compress
from compress.errors import ModelError, PlanError
from compress.groups import Group, Network, calls, trace

STAYS = {  # network -> layers, besides those that make an output, of which something must stay
    "ConstantSplit": {"body.wide.0"},
    "HardCodedView": {"body.wide.0"},
    "SpatialGate": {"body.gate"},
    "ChannelAttention": {"body.eca"},
    "KernelOfOne": {"mix"},
    "WidthAsserted": {"wide.0"},
    "WrittenWhereChosen": {"last"},
    "Deformable": {"places", "masks"},
    "DeformableInGroups": {"places"},
}


def line_of(kind: type, text: str) -> str:
    """Return "file:line (code)" of the line of a class that contains ``text``."""
    lines, start = inspect.getsourcelines(kind)
    number = next(i for i, line in enumerate(lines) if text in line)
    return f"test_groups.py:{start + number} ({lines[number].strip()})"


def group(network: Network, name: str) -> Group:
    return next(each for each in network.groups if each.name == name)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_only_what_must_stay_stays(name: str) -> None:
    network = trace(zoo.build(name), zoo.inputs(name))
    expected = ("output of the network", "state of a recurrent layer")
    stays = {k for k, why in network.frozen.items() if not any(e in why for e in expected)}
    assert stays == STAYS.get(name, set())


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_unit_owns_its_positions_alone(name: str) -> None:
    network = trace(zoo.build(name), zoo.inputs(name))
    seen: set[tuple[str, int, int]] = set()
    for group in network.groups:
        assert any(part.role == "output" for part in group.slices)
        for part in group.slices:
            assert part.index.shape[0] == group.size
            positions = {(part.tensor, part.dim, int(p)) for p in part.index.ravel()}
            assert len(positions) == part.index.size
            assert not positions & seen
            seen |= positions
            assert part.index.max() < network.shapes[part.tensor][part.dim]


NO_LAYERS_COST = {"Attention", "FusedAttention", "RecurrentLstm", "RecurrentGru"} | {
    "PackedAttention",
    "CrossAttention",
    "AttentionWithWeights",
    "ScaledAttention",
    "ChannelTokens",
    "Deformable",
    "DeformableInGroups",
}  # products of activations, recurrent steps: the flop counter counts what no layer costs


@pytest.mark.parametrize("name", sorted(zoo.ZOO.keys() - NO_LAYERS_COST))
def test_macs_agree_with_pytorchs_flop_counter(name: str) -> None:
    model, inputs = zoo.build(name), zoo.inputs(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    assert trace(model, inputs).macs * 2 * len(inputs[0]) == counter.get_total_flops()


def test_products_of_activations_are_not_a_layers_cost() -> None:
    network = trace(zoo.build("Attention"), zoo.inputs("Attention"))
    pixels = 16 * 16
    by_hand = (3 * 16 * 9 + 16 * (8 + 8 + 12) + 12 * 16) * pixels + 16 * 5
    assert network.macs == by_hand


def test_residual_outputs_are_one_group() -> None:
    network = trace(zoo.build("Residual"), zoo.inputs("Residual"))
    stream = group(network, "stem.0")
    made = {part.tensor for part in stream.slices if part.role == "output"}
    assert made == {"stem.0.weight", "body.0.conv2.weight", "body.1.conv2.weight"}
    assert {"body.0.bn2.running_mean", "stem.1.bias"} <= {part.tensor for part in stream.slices}
    assert [group.name for group in network.groups] == ["stem.0", "body.0.conv1", "body.1.conv1"]


class _Patches(nn.Module):
    """Layers of one width, each rearranged into patches and back by einops."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = zoo.conv_bn(3, 16), zoo.conv_bn(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            patches = rearrange(layer(x), "b c (h p) (w q) -> b c h w p q", p=4, q=4)
            x = rearrange(patches * 2, "b c h w p q -> b c (h p) (w q)")
        head: Tensor = self.head(x.mean((2, 3)))
        return head


def test_layers_of_one_width_are_cut_apart_whatever_einops_remembers() -> None:
    remembering = einops.einops._reconstruct_from_shape
    network = trace(_Patches().eval(), torch.randn(1, 3, 16, 16))
    assert [group.name for group in network.groups] == ["first.0", "second.0"]
    assert einops.einops._reconstruct_from_shape is remembering


def test_flattened_channels_take_all_their_places_along() -> None:
    network = trace(zoo.build("FlattenLinear"), zoo.inputs("FlattenLinear"))
    last = group(network, "features.2.0")
    taken = next(part for part in last.slices if part.tensor == "classifier.0.weight")
    assert taken.role == "input"
    np.testing.assert_array_equal(taken.index[3], np.arange(3 * 16, 4 * 16))


def test_many_small_groups_go_whole_and_few_large_ones_stay() -> None:
    many = trace(zoo.build("ManyGroups"), zoo.inputs("ManyGroups"))
    assert group(many, "body.0.0").width == 2
    assert [use.attribute.name for use in many.followers] == ["groups"]
    few = trace(zoo.build("FewGroups"), zoo.inputs("FewGroups"))
    assert group(few, "body.0.0").size == 12
    assert not few.followers


@pytest.mark.parametrize("name", ["Plain", "ChannelShuffle", "OptionAShortcut", "LayerNormed"])
def test_batch_and_kind_of_the_example_do_not_matter(name: str) -> None:
    model = zoo.build(name)
    pairs = trace(model, torch.zeros(2, 3, 16, 16))
    one, named = (
        trace(model, torch.zeros(1, 3, 16, 16)),
        trace(model, {"x": torch.zeros(3, 3, 16, 16)}),
    )
    assert pairs.macs == one.macs == named.macs
    for other in (one, named):
        assert [g.name for g in other.groups] == [g.name for g in pairs.groups]
        for mine, theirs in zip(pairs.groups, other.groups, strict=True):
            assert [(s.tensor, s.dim, s.role) for s in mine.slices] == [
                (s.tensor, s.dim, s.role) for s in theirs.slices
            ]
            assert all(
                np.array_equal(a.index, b.index)
                for a, b in zip(mine.slices, theirs.slices, strict=True)
            )


class Unknown(nn.Module):
    """An op that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.touched = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.touched(F.relu(self.free(x))).mean((2, 3))
        return self.head(x.masked_scatter(x > 0, x))


class FixedByConstant(nn.Module):
    """A constant vector with one entry for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.touched = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.touched(F.relu(self.free(x))).mean((2, 3))
        return self.head(x + torch.arange(6.0))


class TakenByNumber(nn.Module):
    """One channel taken by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.touched = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.touched(F.relu(self.free(x))).mean((2, 3))
        return self.head(x) + x[:, 2:3].sum() + x[:, 3].sum()


class CountedOutside(nn.Module):
    """The order of a norm depends on the channel count."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.touched = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.touched(F.relu(self.free(x))).mean((2, 3))
        return self.head(x / torch.linalg.vector_norm(x, len(x[0]), 1, keepdim=True))


@pytest.mark.parametrize(
    ("kind", "why", "text"),
    [
        (Unknown, "no rule for the operation masked_scatter at ", "masked_scatter"),
        (FixedByConstant, "add joins it with channels that are fixed at ", "arange"),
        (TakenByNumber, "select takes channels by number at ", "x[:, 3]"),
        (CountedOutside, "linalg_vector_norm is given a number that depends on the ", "len("),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_cannot_be_followed_stays_with_reason_and_line(
    kind: type[nn.Module], why: str, text: str
) -> None:
    network = trace(kind(), torch.zeros(2, 3, 9, 9))
    reason = network.frozen["touched"]
    assert reason.removeprefix("3 of 6 channels: ").startswith(why) or "a slice" in reason
    assert line_of(kind, text) in reason or "a slice" in reason
    assert {group.name for group in network.groups} == {"free"}


def test_an_output_of_the_network_is_never_cut() -> None:
    network = trace(zoo.build("TwoHeads"), zoo.inputs("TwoHeads"))
    made = {p.tensor for g in network.groups for p in g.slices if p.role == "output"}
    assert not made & {"left.0.weight", "head.weight"}
    assert "output of the network" in network.frozen["left.0"]


def test_layers_that_run_in_training_only_are_cut_along() -> None:
    network = trace(zoo.build("AuxiliaryHead"), zoo.inputs("AuxiliaryHead"))
    assert "aux.weight" in {part.tensor for part in group(network, "trunk.0").slices}


class KeepsItsGrid(nn.Module):
    """Keeps a grid for one shape of feature maps, as YOLO does anchors."""

    def __init__(self, step: float | Tensor) -> None:
        super().__init__()
        self.wide, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 1)
        self.step, self.shape = step, None

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x).relu()
        if self.shape != x.shape:
            self.grid = torch.arange(x.shape[-1]) + torch.full((1,), self.step)
            self.shape = x.shape
        return self.head(x) + self.grid


@pytest.mark.parametrize("step", [2.0, torch.tensor(2.0)], ids=["number", "tensor"])
def test_what_a_network_keeps_from_an_earlier_image_freezes_nothing(step: float | Tensor) -> None:
    model, example = KeepsItsGrid(step).eval(), torch.rand(1, 3, 8, 8)
    fresh = trace(model, example)
    with torch.no_grad():
        model(example)
    used = trace(model, example)
    assert [group.name for group in used.groups] == ["wide"] and used.frozen == fresh.frozen
    plan = compress.plan_pruning(model, example, keep_macs=0.5)
    pruned, masked = compress.apply_pruning(model, plan), compress.mask_pruning(model, plan)
    torch.testing.assert_close(pruned(example), masked(example))


class OneColumn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ self.weight


@pytest.mark.parametrize("last", [nn.ConvTranspose2d(8, 1, 2, 2), OneColumn()])
def test_a_weight_of_one_filter_in_its_second_dimension_takes_and_makes_none(
    last: nn.Module,
) -> None:
    network = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), last), (1, 3, 8, 8))
    assert network.frozen == {"2": "it has a single output channel"}
    roles = {part.tensor: part.role for part in network.groups[0].slices}
    assert roles == {"0.weight": "output", "0.bias": "channel", "2.weight": "input"}


def test_a_network_without_anything_to_cut_says_why() -> None:
    with pytest.raises(PlanError, match=r"nothing in this network can be cut.*0: its channels are"):
        trace(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.zeros(1, 3, 8, 8))
    with pytest.raises(PlanError, match="no convolution or linear layer with a weight"):
        trace(nn.Sequential(nn.ReLU()), torch.zeros(1, 3, 8, 8))


def prepared() -> nn.Module:
    """Return a network with observers and fake quantization, as PyTorch's preparation leaves it."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    network[0].weight_fake_quant = torch.ao.quantization.default_weight_fake_quant()
    return network


def test_a_network_prepared_for_pytorchs_quantization_is_refused_in_plain_words() -> None:
    with pytest.raises(ModelError, match=r"0\.weight_fake_quant.*prepared for.*before torch\.ao"):
        trace(prepared(), torch.zeros(1, 3, 9, 9))


class ReadyForQuantization(nn.Module):
    """A float network in the form that PyTorch's quantization asks for, as torchvision has them."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = torch.ao.quantization.QuantStub()
        self.dequant = torch.ao.quantization.DeQuantStub()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.sum, self.head = torch.ao.nn.quantized.FloatFunctional(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.quant(x))
        return self.dequant(self.head(self.sum.add_relu(x, self.second(x))))


def test_a_float_network_that_could_be_prepared_is_cut_as_any_other() -> None:
    model, x = ReadyForQuantization().eval(), torch.randn(2, 3, 9, 9)
    plan = compress.plan_pruning(model, x, criterion="l1", keep_macs=0.5)
    small, masked = compress.apply_pruning(model, plan), compress.mask_pruning(model, plan)
    torch.testing.assert_close(small(x), masked(x))
    assert small.first.out_channels == small.second.out_channels == small.head.in_channels < 8


def test_an_example_the_network_refuses_is_an_error() -> None:
    with pytest.raises(PlanError, match="Plain: the network does not run on the example input"):
        trace(zoo.build("Plain"), torch.zeros(1, 4, 16, 16))


@pytest.mark.parametrize("fails", [False, True], ids=["runs", "fails"])
def test_the_callers_network_and_generators_are_left_alone(fails: bool) -> None:
    model = zoo.build("Depthwise").train()
    model.body[0].eval()
    calls: list[int] = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    random, grad = torch.get_rng_state(), torch.is_grad_enabled()
    if fails:
        with pytest.raises(PlanError):
            trace(model, torch.zeros(1, 4, 16, 16))
    else:
        trace(model, torch.zeros(1, 3, 16, 16))
    assert torch.equal(random, torch.get_rng_state()) and torch.is_grad_enabled() == grad
    assert [module.training for module in model.modules()] == modes
    after = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert {n: set(d) for n, d in after.items()} == {n: set(d) for n, d in attributes.items()}
    assert type(model.body[0].depthwise.groups) is int
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class ChosenForward(nn.Module):
    """A network that picks its forward when it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.forward = self.pooled  # type: ignore[method-assign]

    def pooled(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).mean((2, 3)))


def test_a_forward_chosen_in_the_constructor_is_the_one_traced() -> None:
    model, image = ChosenForward(), torch.randn(1, 3, 9, 9)
    assert [group.name for group in trace(model, image).groups] == ["first"]


def test_a_wrapped_forward_does_not_reach_the_original() -> None:
    model, image = zoo.build("Plain"), torch.randn(1, 3, 16, 16)
    original, calls = model.forward, []

    def wrapper(x: Tensor) -> Tensor:
        calls.append(1)
        return original(x)

    model.forward = wrapper
    assert len(trace(model, image).groups) == 3
    assert not calls


def test_the_same_network_gives_the_same_groups() -> None:
    first, second = (trace(zoo.build("ShuffleNetUnit"), zoo.inputs("ShuffleNetUnit")) for _ in "ab")
    assert [g.name for g in first.groups] == [g.name for g in second.groups]
    for mine, theirs in zip(first.groups, second.groups, strict=True):
        for a, b in zip(mine.slices, theirs.slices, strict=True):
            assert (a.tensor, a.dim, a.role) == (b.tensor, b.dim, b.role)
            np.testing.assert_array_equal(a.index, b.index)


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("native_layer_norm", (meta(2, 7, 5), [5], meta(5), meta(5), 1e-5)),
        ("native_layer_norm", (meta(2, 7, 5), [7, 5], None, None, 1e-5)),
        ("addmm", (meta(6), meta(4, 3), meta(3, 6))),
        ("native_batch_norm", (meta(2, 3, 4), *(meta(3) for _ in range(4)), False, 0.1, 1e-5)),
        ("mul", (meta(2, 3), meta(2, 3))),
    ],
)  # fmt: skip
def test_shapes_known_beforehand_are_those_of_pytorch(op: str, args: tuple[object, ...]) -> None:
    packet = getattr(torch.ops.aten, op)
    func = packet.Tensor if op == "mul" else packet.default
    fast = calls._FAST[op](func, args)
    assert fast is not NotImplemented
    with torch.no_grad():
        expected = func(*args)
    found = [tuple(t.shape) for t in calls.tensors_in(fast)]
    assert found[:1] == [tuple(t.shape) for t in calls.tensors_in(expected)][:1]
    if op == "native_layer_norm":
        assert found == [tuple(t.shape) for t in calls.tensors_in(expected)]


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("native_layer_norm", (meta(2, 7, 5), [4], None, None, 1e-5)),
        ("addmm", (meta(6), meta(4, 3), meta(2, 6))),
    ],
)
def test_what_does_not_fit_is_left_for_pytorch_to_refuse(op: str, args: tuple[object, ...]) -> None:
    func = getattr(torch.ops.aten, op).default
    assert calls._FAST[op](func, args) is NotImplemented
    with pytest.raises(RuntimeError):
        calls.WatchedOps(torch.device("meta")).run(func, args, {})
