"""Operations that programs seldom use: between two convolutions, each is followed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
import zoo
from openvino_core import compiled
from torch import Tensor, nn

from compress import apply_pruning, export_onnx, plan_pruning
from compress.groups import trace
from compress.groups.calls import FollowedCalls, WatchedOps
from compress.groups.proof import prove
from compress.packages import is_installed

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between: nn.Module, conv: Callable[..., nn.Module] = nn.Conv2d) -> None:
        super().__init__()
        self.first, self.between = conv(3, 16, 3), between
        self.second, self.head = conv(16, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.between(self.first(x)))).mean((2, 3)))


class Last(nn.Module):
    """A normalization of the last dimension, as of channels."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OwnNorm(nn.Module):
    """A normalization whose program keeps the shape that it normalizes, as ConvNeXt's does."""

    def __init__(self, kind: str, channels: int = 16) -> None:
        super().__init__()
        self.kind, self.normalized_shape = kind, (channels,)
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return F.rms_norm(x, self.normalized_shape, self.weight, 1e-6)
        return F.layer_norm(x, self.normalized_shape, self.weight, None, 1e-6)


class Limited(nn.Conv2d):
    """Its filters have a norm of at most one, as those of networks for EEG have."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1.0)
        return super().forward(x)


class LimitedInPlace(nn.Conv2d):
    """The same, as a copy into its weight."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.copy_(self.weight.renorm(2, 0, 1.0))
        return super().forward(x)


class ResponseByPool(nn.Module):
    """A local response normalization by an average over neighbours, as ports of Caffe write it."""

    def __init__(self) -> None:
        super().__init__()
        self.average = nn.AvgPool3d((5, 1, 1), stride=1, padding=(2, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.average(x.pow(2).unsqueeze(1)).squeeze(1)
        return x / (1 + mean).pow(0.75)


def without_negatives(x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0] = 0
    return x


def with_rows_written(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, torch.tensor([0, 3])] = x[:, :, :2] * 2
    return x


def scattered(x: Tensor, name: str, **options: object) -> Tensor:
    numbers = torch.arange(x.shape[3]).flip(0).expand_as(x)
    return getattr(torch.zeros_like(x), name)(3, numbers, x, **options)


def weighed_by_itself(x: Tensor) -> Tensor:
    rows = x.flatten(2)
    return x * (rows @ rows.mT).diagonal(dim1=1, dim2=2)[..., None, None]


def halves(x: Tensor) -> Tensor:
    half = int(x.shape[1] // 2)
    return torch.cat([x[:, half:].relu(), x[:, :half]], 1)


def halves_rounded(x: Tensor) -> Tensor:
    width = int(x.size()[1])
    half = round(width * 0.5)
    return torch.cat([x[:, : width - half].relu(), x[:, half:]], 1)


def quarter(x: Tensor) -> Tensor:
    width = x.shape[1]
    first, second = x.split([int(width / 4), width - int(width / 4)], 1)
    return torch.cat([second, first.relu()], 1)


def shuffled(x: Tensor) -> Tensor:
    images, width, height, length = x.shape
    x = x.view(images, 2, int(width / 2), height, length).transpose(1, 2)
    return x.reshape(images, width, height, length)


def parts(x: Tensor) -> Tensor:
    first, second = torch.split(x, int(x.size(1) / 2), dim=1)
    return torch.cat([second, first.relu()], 1)


def attended(x: Tensor) -> Tensor:
    tokens = x.flatten(2).mT
    answer = F.scaled_dot_product_attention(query=tokens, key=tokens, value=tokens)
    return answer.mT.unflatten(2, x.shape[2:])


FIRST = torch.tensor([0, 1])


def circular(inputs: int, outputs: int, kernel: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, padding=1, padding_mode="circular")


NETS: dict[str, Callable[[], nn.Module]] = {
    "own layer norm": lambda: Net(Last(OwnNorm("layer"))),
    "own rms norm": lambda: Net(Last(OwnNorm("rms"))),
    "layer norm without weights": lambda: Net(Last(nn.LayerNorm(16, elementwise_affine=False))),
    "rms norm": lambda: Net(Last(nn.RMSNorm(16))),
    "rms norm without weights": lambda: Net(Last(nn.RMSNorm(16, elementwise_affine=False))),
    "limited": lambda: Net(nn.BatchNorm2d(16), Limited),
    "limited in place": lambda: Net(nn.BatchNorm2d(16), LimitedInPlace),
    "circular": lambda: Net(nn.BatchNorm2d(16), circular),
    "wider on one side": lambda: Net(zoo.Lambda(lambda x: F.pad(x, (2, 1, 0, 3), mode="circular"))),
    "largest so far": lambda: Net(zoo.Lambda(lambda x: x.cummax(2)[0])),
    "sums of exponentials": lambda: Net(zoo.Lambda(lambda x: x.logcumsumexp(3))),
    "triangle": lambda: Net(zoo.Lambda(torch.tril)),
    "local response": lambda: Net(nn.LocalResponseNorm(5, alpha=0.5)),
    "local response by pooling": lambda: Net(ResponseByPool()),
    "pooled in depth": lambda: Net(
        zoo.Lambda(lambda x: F.avg_pool3d(x.unsqueeze(1), (1, 2, 2)).squeeze(1))
    ),
    "largest of neighbours": lambda: Net(
        zoo.Lambda(lambda x: F.max_pool3d(x[:, None], (3, 1, 1), 1, (1, 0, 0))[:, 0])
    ),
    "scattered": lambda: Net(zoo.Lambda(lambda x: scattered(x, "scatter"))),
    "added where numbered": lambda: Net(zoo.Lambda(lambda x: scattered(x, "scatter_add"))),
    "largest where numbered": lambda: Net(
        zoo.Lambda(lambda x: scattered(x, "scatter_reduce", reduce="amax"))
    ),
    "a number scattered": lambda: Net(
        zoo.Lambda(lambda x: x.scatter(2, torch.zeros_like(x[:, :, :1], dtype=torch.long), 1.0))
    ),
    "rows added": lambda: Net(zoo.Lambda(lambda x: x.index_add(2, FIRST, x[:, :, 2:4]))),
    "rows copied": lambda: Net(zoo.Lambda(lambda x: x.index_copy(2, FIRST, x[:, :, 2:4]))),
    "rows filled": lambda: Net(zoo.Lambda(lambda x: x.index_fill(2, FIRST, 0.5))),
    "rows written": lambda: Net(zoo.Lambda(with_rows_written)),
    "rows replaced": lambda: Net(
        zoo.Lambda(lambda x: torch.slice_scatter(x, x[:, :, :2] * 2, 2, 0, 2))
    ),
    "half replaced": lambda: Net(
        zoo.Lambda(lambda x: x.slice_scatter(x[:, : x.shape[1] // 2] * 2, 1, 0, x.shape[1] // 2))
    ),
    "row replaced": lambda: Net(zoo.Lambda(lambda x: x.select_scatter(x[:, :, 0] * 2, 2, 1))),
    "diagonal": lambda: Net(zoo.Lambda(lambda x: x + x.diagonal(dim1=2, dim2=3).unsqueeze(3))),
    "weighed by itself": lambda: Net(zoo.Lambda(weighed_by_itself)),
    "without negatives": lambda: Net(zoo.Lambda(without_negatives)),
    "halves": lambda: Net(zoo.Lambda(halves)),
    "halves rounded": lambda: Net(zoo.Lambda(halves_rounded)),
    "a quarter": lambda: Net(zoo.Lambda(quarter)),
    "shuffled": lambda: Net(zoo.Lambda(shuffled)),
    "parts": lambda: Net(zoo.Lambda(parts)),
    "attention by keywords": lambda: Net(zoo.Lambda(attended)),
    "quantile by keywords": lambda: Net(
        zoo.Lambda(lambda x: x - torch.quantile(input=x, q=0.5, dim=1, keepdim=True))
    ),
    "turned": lambda: Net(zoo.Lambda(lambda x: torch.rot90(x, 1, (2, 3)))),
}


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETS[name]()
    zoo.randomize(model)
    model.eval()(IMAGES)  # a limit acts when it first runs
    return model


@pytest.mark.parametrize("name", NETS)
def test_it_is_cut_and_equals_the_masked_network(name: str) -> None:
    model = net(name)
    assert {group.name for group in trace(model, IMAGES[:1]).groups} == {"first", "second"}
    plan = plan_pruning(model, IMAGES[:1], criterion="l1", keep_macs=0.5)
    assert prove(model, plan, IMAGES) < 1e-5
    small = apply_pruning(model, plan)
    assert sum(p.numel() for p in small.parameters()) == plan.params_after < plan.params_before


def first_four(x: Tensor) -> Tensor:
    assert int(x.shape[1] / 2)  # a program that rounds
    return torch.cat([x[:, :4].relu(), x[:, 4:]], 1)


def test_a_constant_in_a_program_that_rounds_is_no_share_of_the_width() -> None:
    torch.manual_seed(0)
    model = Net(zoo.Lambda(first_four)).eval()
    reason = trace(model, IMAGES[:1]).frozen["first"]
    assert reason.startswith("4 of 16 channels: a slice has channel counts written")
    plan = plan_pruning(model, IMAGES[:1], criterion="l1", keep_macs=0.5)
    assert prove(model, plan, IMAGES) < 1e-5


@pytest.mark.parametrize("weight", [None, torch.rand(5) + 0.5], ids=["bare", "weighted"])
@pytest.mark.parametrize("eps", [None, 1e-3], ids=str)
def test_an_rms_norm_that_is_followed_computes_that_of_torch(
    weight: Tensor | None, eps: float | None
) -> None:
    x = torch.randn(2, 3, 5)
    want = F.rms_norm(x, (5,), weight, eps)
    with FollowedCalls(WatchedOps()):
        torch.testing.assert_close(F.rms_norm(x, (5,), weight, eps), want)
        with pytest.raises(ValueError, match="does not fit"):
            F.rms_norm(x, (4,), weight, eps)


@pytest.mark.parametrize("name", ["limited", "limited in place", "circular", "wider on one side"])
def test_it_is_exported_as_every_runtime_reads_it(name: str, tmp_path: Path) -> None:
    import onnxruntime as ort

    model = net(name)
    with torch.no_grad():
        want = model(IMAGES).numpy()
    file = export_onnx(model, IMAGES[:1], tmp_path / "net.onnx")
    assert not {"Pad", "Mod"} & {node.op_type for node in onnx.load(file).graph.node}
    answer = ort.InferenceSession(file).run(None, {"input": IMAGES.numpy()})[0]
    np.testing.assert_allclose(answer, want, atol=1e-5)
    if is_installed("openvino"):
        (answer,) = compiled(file)(IMAGES.numpy()).values()
        np.testing.assert_allclose(answer, want, atol=1e-3)
