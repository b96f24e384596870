"""Whatever a network returns is seen: every tensor, number of a channel and sum over channels."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import compress
from compress.errors import CompressError, ModelError, PlanError, UsageError
from compress.groups import trace
from compress.groups.plan import PrunePlan
from compress.groups.proof import apply_pruning, mask_pruning, prove
from compress.modules.outputs import (
    chosen_outputs,
    heads_of,
    leaves,
    logits_of,
    named_tensors,
    tensors_of,
)

EXAMPLE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


@dataclasses.dataclass
class Record:
    """A dataclass."""

    logits: Any
    boxes: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    """A dataclass without a ``__dict__``."""

    logits: Any
    boxes: Any


class Pair(NamedTuple):
    """A named tuple."""

    logits: Any
    boxes: Any


class Own:
    """An object with attributes, one of them a list."""

    def __init__(self, logits: Any, boxes: Any) -> None:
        self.logits, self.rest = logits, [{"boxes": boxes}]


class OwnDict(dict[str, Any]):
    """A subclass of dict, which PyTorch's pytrees take for a leaf."""


class Lazy:
    """An object that gives its parts when it is iterated over."""

    def __init__(self, logits: Any, boxes: Any) -> None:
        self.parts = lambda: (logits, boxes)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts())


class Subclass(Tensor):
    """A tensor of another class."""


WAYS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list in tuple": lambda a, b: (a, [b]),
    "dict": lambda a, b: {"logits": a, "boxes": b},
    "dict subclass": lambda a, b: OwnDict(logits=a, boxes=b),
    "UserDict": lambda a, b: collections.UserDict(logits=a, boxes=b),
    "mapping proxy": lambda a, b: types.MappingProxyType({"logits": a, "boxes": b}),
    "namedtuple": Pair,
    "dataclass": Record,
    "slots": Slotted,
    "object": Own,
    "SimpleNamespace": lambda a, b: types.SimpleNamespace(logits=a, boxes=b),
    "generator": lambda a, b: (t for t in (a, b)),
    "map": lambda a, b: map(torch.clone, (a, b)),
    "deque": lambda a, b: collections.deque([a, b]),
    "iterable": Lazy,
    "closure": lambda a, b: lambda: (a, b),
    "partial": lambda a, b: functools.partial(torch.add, a.mean((1, 2)), other=b),
    "tensor subclass": lambda a, b: (a.as_subclass(Subclass), b.as_subclass(Subclass)),
    "ops on a subclass": lambda a, b: (a.as_subclass(Subclass).relu(), b.as_subclass(Subclass) * 2),
    "Parameter": lambda a, b: (nn.Parameter(a, False), nn.Parameter(b, False)),
    "distribution": lambda a, b: (torch.distributions.Normal(a, 1.0, validate_args=False), b),
}


class Detector(nn.Module):
    """Ten classes and four box numbers at every place, in whatever ``wrap`` makes of them."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.stem = nn.Sequential(zoo.conv_bn(3, 8), zoo.conv_bn(8, 12, stride=2))
        self.classes, self.boxes = nn.Conv2d(12, 10, 1), nn.Conv2d(12, 4, 1)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.wrap(self.classes(x), self.boxes(x))


def randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.4)
    zoo.randomize(model)
    return model.eval()


@pytest.mark.parametrize("way", WAYS)
def test_outputs_stay_whole_however_they_are_returned(way: str) -> None:
    model = randomized(Detector(WAYS[way]))
    plan = compress.plan_pruning(model, EXAMPLE, criterion="l1", keep_channels=0.5)
    small = apply_pruning(model, plan)
    assert set(plan.frozen) == {"classes", "boxes"}
    assert small.get_parameter("stem.0.0.weight").shape[0] == 4
    assert prove(model, plan, EXAMPLE) < 1e-5


def test_the_tensors_of_real_packages_are_seen() -> None:
    from torchvision import tv_tensors

    model = randomized(Detector(lambda a, b: (tv_tensors.Mask(a), tv_tensors.Image(b))))
    assert set(trace(model, EXAMPLE).frozen) == {"classes", "boxes"}


def test_channels_pass_through_a_tensor_subclass_inside_the_network() -> None:
    class Inside(zoo.Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(zoo.conv_bn(16, 16)))

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(self.stem(x).as_subclass(Subclass)).as_subclass(Tensor)
            return self.head(x.mean((2, 3)))

    model = randomized(Inside())
    plan = compress.plan_pruning(model, EXAMPLE, criterion="l1", keep_channels=0.5)
    assert set(plan.frozen) == {"head"}
    assert prove(model, plan, EXAMPLE) < 1e-5


def test_tensors_left_on_attributes_are_named(caplog: pytest.LogCaptureFixture) -> None:
    class Keeping(zoo.Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(zoo.conv_bn(16, 16)))
            self.level, self.calls = torch.zeros(1), 0

        def forward(self, x: Tensor) -> Tensor:
            self.features = [self.stem(x)]
            self.level, self.calls = self.features[0].mean(), self.calls + 1
            self.merged = self.head.weight * 2 + self.head.weight  # no image is in it
            self.scores = self.head(self.body(self.features[0]).mean((2, 3)))
            return self.scores

    plan = compress.plan_pruning(randomized(Keeping()), EXAMPLE, criterion="l1", keep_channels=0.5)
    assert plan.about["side_outputs"] == ["features"]
    assert "fewer channels: features; return them" in caplog.text
    bare = randomized(zoo.Classifier(zoo.conv_bn(16, 16)))
    assert "side_outputs" not in compress.plan_pruning(bare, EXAMPLE, keep_channels=0.5).about


def test_what_cannot_be_looked_into_is_refused_by_its_type() -> None:
    model = randomized(Detector(lambda a, b: (a, torch.Generator())))
    with pytest.raises(PlanError, match=r"output 1.*torch\._C\.Generator"):
        trace(model, EXAMPLE)


def test_a_proof_that_compares_nothing_fails() -> None:
    model = randomized(Detector(lambda a, b: (a, b)))
    plan = compress.plan_pruning(model, EXAMPLE, criterion="l1", keep_channels=0.5)
    model.wrap = lambda a, b: None
    with pytest.raises(PlanError, match="nothing can be compared"):
        prove(model, plan, EXAMPLE)


def test_numbers_are_compared_by_the_proof() -> None:
    model = randomized(Detector(lambda a, b: {"mean": a, "boxes": b}))
    plan = compress.plan_pruning(model, EXAMPLE, criterion="l1", keep_channels=0.5)
    model.wrap = lambda a, b: float(a.mean())
    assert prove(model, plan, EXAMPLE) < 1e-5


def test_leaves_have_places() -> None:
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    found = dict(named_tensors(Own(a, b)))
    assert list(found) == ["logits", "rest.0.boxes"]
    assert found["rest.0.boxes"] is b
    assert [place for place, _ in leaves({"x": (1, "text", a)})] == ["x.0", "x.1", "x.2"]
    loop: list[Any] = [a]
    loop.append(loop)
    assert tensors_of(loop) == [a]


def test_the_main_output_is_the_logits() -> None:
    loss, logits, extra = torch.tensor(1.0), torch.zeros(2, 3), torch.ones(2, 3)
    features = torch.zeros(2, 8, 4, 4)
    assert logits_of({"features": features, "logits": logits}) is logits
    assert logits_of((loss, logits, features)) is logits
    assert list(dict(named_tensors((loss, features, loss)))) == ["1", "0", "2"]
    assert [id(t) for t in heads_of((logits, extra, features))] == [id(logits), id(extra)]
    with pytest.raises(ModelError, match="holds no tensor of numbers"):
        logits_of({"text": "none"})


class Scores(nn.Module):
    """A classifier whose answer is what ``answer`` makes of its scores (B, 10)."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.stem = nn.Sequential(zoo.conv_bn(3, 8), zoo.conv_bn(8, 12, stride=2))
        self.classes = nn.Conv2d(12, 10, 1)
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.classes(self.stem(x)).mean((2, 3)))


ANSWERS: dict[str, Callable[[Tensor], Any]] = {
    "max": lambda s: s.softmax(1).max(1),
    "only the number of max": lambda s: s.max(1)[1],
    "min": lambda s: s.min(1).indices,
    "argmax": lambda s: s.argmax(1),
    "argmax of all": lambda s: s.argmax(),
    "argmin": lambda s: s.argmin(1),
    "median": lambda s: s.median(1),
    "nanmedian": lambda s: s.nanmedian(1).indices,
    "mode": lambda s: s.mode(1),
    "kthvalue": lambda s: s.kthvalue(2, 1),
    "topk": lambda s: s.topk(2, 1),
    "sort": lambda s: s.sort(1),
    "argsort": lambda s: s.argsort(1),
    "cummax": lambda s: s.cummax(1),
    "cummin": lambda s: s.cummin(1).indices[:, -1],
    "aminmax": lambda s: s.aminmax(dim=1),
    "searchsorted": lambda s: torch.searchsorted(s, torch.zeros(len(s), 1)),
    "bucketize": lambda s: torch.bucketize(torch.zeros(2), s[0]),
    "multinomial": lambda s: s.softmax(1).multinomial(1),
    "nonzero": lambda s: (s > 0).nonzero(),
    "unique": lambda s: s.unique(return_inverse=True),
    "pooling over classes": lambda s: F.max_pool1d(s[:, None], 10, return_indices=True),
    "confidence": lambda s: s.softmax(1).amax(1),
    "entropy": lambda s: -(s.softmax(1) * s.log_softmax(1)).sum(1),
    "logsumexp": lambda s: s.logsumexp(1),
    "ordinal": lambda s: s.sigmoid().sum(1),
    "count": lambda s: (s > 0).sum(1).float() + 1,
    "any": lambda s: (s > 0).any(1),
    "variance": lambda s: s.var(1),
    "norm": lambda s: s.norm(dim=1)[:, None].expand(-1, 3).clone(),
    "written in place": lambda s: s.new_zeros(len(s), 2).copy_(s.mean(1, keepdim=True)),
    "number of max weighed": lambda s: s.max(1)[1].float()[:, None] @ torch.ones(1, 3),
    "cosine": lambda s: F.cosine_similarity(s, s.flip(0)),
    "product with itself": lambda s: torch.einsum("bc,bc->b", s.softmax(1), s.softmax(1)),
    "normalized": lambda s: F.normalize(s).sum(1),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_classes_whose_number_or_reduction_is_the_answer_stay(name: str) -> None:
    model = randomized(Scores(ANSWERS[name]))
    network = trace(model, EXAMPLE)
    assert network.layers["classes.weight"].shape[0] == 10
    assert set(network.frozen) == {"classes"}
    assert {group.name for group in network.groups} == {"stem.0.0", "stem.1.0"}


def test_the_reason_names_the_line() -> None:
    network = trace(randomized(Scores(ANSWERS["confidence"])), EXAMPLE)
    said = "amax makes one number of its channels at modules/test_outputs.py"
    assert said in network.frozen["classes"]


@pytest.mark.parametrize("op", [torch.max, torch.min])
def test_numbers_of_channels_that_a_layer_weighs_keep_the_channels(op: Any) -> None:
    class Index(zoo.Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.weigh = nn.Conv2d(1, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            number = op(self.stem(x), 1, keepdim=True)[1]
            return self.head(self.weigh(number.float()).mean((2, 3)))

    assert "gives their numbers at" in trace(randomized(Index()), EXAMPLE).frozen["stem.0"]


HIDDEN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "CBAM": lambda m, x: (
        x * m.gate(torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], 1)).sigmoid()
    ),
    "mean gates all": lambda m, x: x * x.mean(1, keepdim=True).sigmoid(),
    "layer norm by hand": lambda m, x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),
    "global response": lambda m, x: (
        x * (g := x.norm(dim=(2, 3), keepdim=True)) / g.mean(1, keepdim=True)
    ),
    "softmax": lambda m, x: x.softmax(1),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_reductions_inside_the_network_are_cut_as_before(name: str) -> None:
    class Net(zoo.Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.gate = nn.Conv2d(2, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(HIDDEN[name](self, self.stem(x)).mean((2, 3)))

    model = randomized(Net()).double()
    network = trace(model, EXAMPLE.double())
    assert "stem.0" not in network.frozen
    plan = compress.plan_pruning(model, EXAMPLE.double(), criterion="l1", keep_channels=0.5)
    assert prove(model, plan, EXAMPLE.double()) < 1e-9


class ChannelTokens(nn.Module):
    """Attention whose tokens are channels: its softmax over keys is over channels."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.qkv = zoo.conv_bn(3, 8), nn.Conv2d(8, 24, 1)
        self.out, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (F.normalize(part.flatten(2), dim=-1) for part in self.qkv(x).chunk(3, 1))
        x = x + self.out(self.attend(q, k, v).reshape(x.shape))
        return self.head(x.mean((2, 3)))


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def in_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused(q[:, None], k[:, None], v[:, None])[:, 0]


@pytest.mark.parametrize("attend", [by_hand, fused, in_heads])
def test_attention_between_channels_sees_the_kept_ones_alone(attend: Any) -> None:
    model, x = randomized(ChannelTokens(attend)).double(), EXAMPLE.double()
    plan = compress.plan_pruning(model, x, criterion="l1", keep_channels=0.5)
    assert plan.macs_after < 0.5 * plan.macs_before
    assert prove(model, plan, x) < 1e-12
    with torch.no_grad():
        written = apply_pruning(randomized(ChannelTokens(by_hand)).double(), plan).eval()(x)
        torch.testing.assert_close(apply_pruning(model, plan).eval()(x), written)


def test_a_masked_network_says_so_where_an_operation_of_its_plan_did_not_run() -> None:
    model, x = randomized(ChannelTokens(by_hand)).double(), EXAMPLE.double()
    plan = compress.plan_pruning(model, x, criterion="l1", keep_channels=0.5)
    model.attend = lambda q, k, v: v
    with pytest.raises(PlanError, match=r"softmax.* was not made"):
        mask_pruning(model, plan).eval()(x)


class WithFeatures(nn.Module):
    """Boxes, and beside them the feature map that they are made of, as detectors return it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.neck = nn.Conv2d(16, 12, 3, padding=1)
        self.head = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Return (B, 6, H * W), and the feature map."""
        feature = self.neck(self.body(x))
        return self.head(feature.relu()).flatten(2), {"feats": [feature]}


def test_only_the_outputs_that_are_named_freeze_channels() -> None:
    model, example = WithFeatures().eval(), torch.randn(1, 3, 8, 8)
    whole = compress.plan_pruning(model, example, keep_macs=0.5)
    assert set(whole.frozen) == {"neck", "head"}
    plan = compress.plan_pruning(model, example, keep_macs=0.5, outputs=["0"])
    assert set(plan.frozen) == {"head"} and plan.outputs == ("0",)
    assert len(plan.tensors["neck.weight"][0]) < 12
    assert prove(model, plan, torch.randn(2, 3, 8, 8)) < 1e-5
    small = compress.apply_pruning(model, plan)
    masked = compress.mask_pruning(model, plan)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(small(images)[0], masked(images)[0])
    assert small(images)[1]["feats"][0].shape[1] < 12
    again = PrunePlan.from_json(plan.to_json())
    assert again.outputs == ("0",)


def test_an_output_that_is_not_there_is_refused_with_those_that_are() -> None:
    model, example = WithFeatures().eval(), torch.randn(1, 3, 8, 8)
    with pytest.raises(CompressError, match=r"no output .boxes.. Expected one of: 0 \(1, 6, 64\)"):
        compress.plan_pruning(model, example, keep_macs=0.5, outputs="boxes")


def test_the_one_tensor_of_a_network_is_output_0() -> None:
    found = [("", torch.zeros(1, 10))]
    assert chosen_outputs(found, ["0"]) == found
    with pytest.raises(UsageError, match=r"no output '1'. Expected one of: 0 \(1, 10\)"):
        chosen_outputs(found, ["1"])
