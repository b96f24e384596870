"""Normalizations that programs write themselves, limits on weights and padding that wraps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
import zoo
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
        import openvino

        (answer,) = openvino.Core().compile_model(file, "CPU")(IMAGES.numpy()).values()
        np.testing.assert_allclose(answer, want, atol=1e-3)
