"""What criteria are shown equals what autograd, finite differences and direct sums say."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import DataError
from compress.groups import trace
from compress.prune.criteria import ChannelGroup
from compress.prune.criteria.fisher import Fisher
from compress.prune.loss import SampledAnswers
from compress.prune.saliency import evidence, scores

EXAMPLE = torch.zeros(1, 3, 6, 6)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(4 * 16, 3),
    ).eval()  # fmt: skip


def batches(count: int = 2, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(7)
    return [
        (torch.randn(size, 3, 6, 6, generator=draw), torch.arange(size) % 3) for _ in range(count)
    ]


def test_products_are_the_slope_of_the_loss_when_a_channel_fades(model: nn.Module) -> None:
    """Scaling the columns that read a channel by (1 + e) changes the loss by e x product."""
    data = batches()
    found = evidence(
        model, trace(model, EXAMPLE), "gradients", data, images_per_gradient=3
    ).products["6.weight", 1]
    assert found.shape == (4, 64)  # 2 batches of 6 images, 3 images for each gradient
    model = model.double()
    weight = model.get_parameter("6.weight")
    images, target = data[0][0][:3].double(), data[0][1][:3]
    for column in (0, 17, 63):
        losses = []
        for scale in (1 + 1e-5, 1 - 1e-5):
            changed = weight.detach().clone()
            changed[:, column] *= scale
            output = torch.func.functional_call(model, {"6.weight": changed}, (images,))
            losses.append(F.cross_entropy(output, target))
        slope = ((losses[0] - losses[1]) / 2e-5).item()
        assert found[0, column].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_curvature_is_close_to_the_exact_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).eval()
    images, target = torch.randn(32, 3, 2, 2), torch.arange(32) % 3
    repeated = [(images, target)] * 1500  # each with signs of its own
    network = trace(model, torch.zeros(1, 3, 2, 2))
    found = evidence(model, network, "hessian", repeated, images_per_gradient=32)
    weight = model.get_parameter("3.weight").detach()

    def loss(value: Tensor) -> Tensor:
        output = torch.func.functional_call(model, {"3.weight": value}, (images,))
        return F.cross_entropy(output, target)

    exact = torch.autograd.functional.hessian(loss, weight)
    diagonal = exact.reshape(weight.numel(), -1).diagonal().reshape(weight.shape)
    expected = (0.5 * diagonal * weight.square()).sum(0)
    error = (found.curvatures["3.weight", 1] - expected).norm() / expected.norm()
    assert error < 0.15


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_squared_products_of_drawn_answers_are_the_fisher_information(temperature: float) -> None:
    """Of a gate on the column that reads feature c: x_c^2 times the variance of W_kc, k ~ p."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).eval()
    images, no_labels = torch.randn(2, 3, 2, 2), torch.full((2,), -1)
    network = trace(model, torch.zeros(1, 3, 2, 2))
    found = evidence(
        model, network, "answers", [(images, no_labels)] * 1500,
        SampledAnswers(temperature=temperature), images_per_gradient=1,
    ).products["3.weight", 1]  # fmt: skip
    with torch.no_grad():
        features = model[:3](images)  # type: ignore[index, operator]
        chances = (model[3](features) / temperature).softmax(1)
        weight = model.get_parameter("3.weight")
        spread = chances @ weight.square() - (chances @ weight).square()
        exact = (features.square() * spread / temperature**2).mean(0)
    measured = found.square().mean(0)
    assert (measured - exact).norm() / exact.norm() < 0.1
    assert found.mean(0).abs().max() < 0.1 * found.abs().max()  # draws have no drift


@pytest.mark.parametrize("count", [1, 3, 20])
def test_few_images_are_scored_near_their_exact_fisher_information(count: int) -> None:
    """Classes are drawn for each of them several times, and few share a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 6)
    ).eval()  # fmt: skip
    x = torch.randn(count, 3, 6, 6)
    (found,) = scores(model, trace(model, EXAMPLE), Fisher(temperature=1.0), [(x,)])
    gates = torch.ones(count, 12, requires_grad=True)
    chances = model[2:](model[:2](x) * gates[:, :, None, None]).softmax(1)
    exact = torch.zeros(count, 12)
    for k in range(6):
        (change,) = torch.autograd.grad(chances[:, k].log().sum(), gates, retain_graph=True)
        exact += chances[:, k, None].detach() * change.square()
    likeness = F.cosine_similarity(torch.as_tensor(found), exact.mean(0).double(), dim=0)
    assert likeness > 0.97


def test_drawn_answers_need_no_labels_and_follow_their_seed(model: nn.Module) -> None:
    def products(seed: int, label: int) -> Tensor:
        data = [(images, torch.full((6,), label)) for images, _ in batches()]
        found = evidence(model, trace(model, EXAMPLE), "answers", data, seed=seed)
        return found.products["6.weight", 1]

    assert torch.equal(products(0, -1), products(0, 99))
    assert not torch.equal(products(0, -1), products(1, -1))


def test_answers_are_drawn_for_every_pixel_of_a_segmentation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()
    images = torch.randn(1, 3, 6, 6)
    data = [(images, torch.zeros(1, 6, 6))] * 1500
    network = trace(model, EXAMPLE)
    found = evidence(model, network, "answers", data, images_per_gradient=1)
    found = found.products["2.weight", 1]
    with torch.no_grad():
        pixels = model[:2](images).movedim(1, -1).flatten(0, 2)  # type: ignore[index, operator]
        weight = model.get_parameter("2.weight").flatten(1)
        chances = (pixels @ weight.T + model.get_parameter("2.bias")).softmax(1)
        spread = chances @ weight.square() - (chances @ weight).square()
        exact = (pixels.square() * spread).sum(0) / len(pixels) ** 2  # the loss is a mean
    assert (found.square().mean(0) - exact).norm() / exact.norm() < 0.1


class TwoOutputs(nn.Module):
    """A map of three channels of unequal spread, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.maps = nn.Conv2d(8, 3, 1)
        self.vector = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, 3, 4, 4) and (B, 5)."""
        features = self.body(x).relu()
        scale = torch.tensor([1.0, 30.0, 0.1]).reshape(1, 3, 1, 1)
        return self.maps(features) * scale, self.vector(features.mean((2, 3)))


def relative_changes(model: nn.Module, images: Tensor, outputs: tuple[int, ...]) -> Tensor:
    """Return what each channel adds to the outputs, squared over their variance, by the Jacobian.

    The gate of a channel multiplies what the layers that read it are given; (8,).
    """

    def gated(gate: Tensor) -> tuple[Tensor, ...]:
        names = {"maps.weight": 1, "vector.weight": 1}
        own = dict(model.named_parameters())
        weights = {
            name: own[name] * gate.reshape(1, -1, *[1] * (own[name].ndim - 2)) for name in names
        }
        found: tuple[Tensor, ...] = torch.func.functional_call(model, weights, (images,))
        return found

    jacobians = torch.autograd.functional.jacobian(gated, torch.ones(8))
    total = torch.zeros(8)
    for index in outputs:
        output, jacobian = gated(torch.ones(8))[index].detach(), jacobians[index]
        over = [d for d in range(output.ndim) if d != 1 or output.ndim < 3]
        variance = output.var(over, keepdim=True, correction=0)
        squares = jacobian.square() / variance[..., None]  # (B, ..., 8)
        total += squares.flatten(0, -2).mean(0) / len(images)  # the loss is a mean over images
    return total


@pytest.mark.parametrize("outputs", [(0, 1), (0,), (1,)])
def test_other_outputs_are_gaussian_and_add_up_scaled_by_their_variance(outputs) -> None:
    torch.manual_seed(0)
    model = TwoOutputs().eval()
    images = torch.randn(3, 3, 6, 6)
    network = trace(model, EXAMPLE)
    own = SampledAnswers("numbers", tuple(map(str, outputs)))
    found = evidence(model, network, "answers", [images] * 3000, own)
    group = next(g for g in network.groups if "body" in g.name)
    tensors = dict(model.named_parameters())
    changes = ChannelGroup(group, tensors, evidence=found).loss_changes()
    exact = relative_changes(model, images, outputs)
    assert (changes.square().mean(0) - exact).norm() / exact.norm() < 0.1


def test_one_number_is_scored_as_a_number() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 1)).eval()
    data = [(torch.randn(2, 3, 6, 6), torch.zeros(2))]
    found = evidence(model, trace(model, EXAMPLE), "answers", data)
    assert found.products["2.weight", 1].abs().sum() > 0
    with pytest.raises(DataError, match="holds no logits of classes"):
        evidence(model, trace(model, EXAMPLE), "answers", data, SampledAnswers("classes"))


def test_activations_are_those_that_enter_the_layer(model: nn.Module) -> None:
    data = batches()
    network = trace(model, EXAMPLE)
    seen = evidence(model, network, "activations", data).activations
    with torch.no_grad():
        values = torch.cat([model[:3](images) for images, _ in data])  # type: ignore[index, operator]
        flat = torch.cat([model[:6](images) for images, _ in data])  # type: ignore[index, operator]
    # Two groups of four channels: position p of the weight reads channels p and p + 4.
    halves = values.movedim(1, 0).reshape(2, 4, -1).movedim(0, 1).flatten(1)
    torch.testing.assert_close(seen["3.weight"]["mean_abs"], halves.abs().mean(1))
    torch.testing.assert_close(seen["3.weight"]["nonzero"], (halves != 0).float().mean(1))
    torch.testing.assert_close(seen["6.weight"]["mean_square"], flat.square().mean(0))


def test_correlations_are_mean_products_of_channels_at_one_place(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["compress.prune.saliency"]
    monkeypatch.setattr(module, "PLACES", 64)  # all there are
    data = batches()
    network = trace(model, EXAMPLE)
    found = evidence(model, network, "correlations", data).correlations
    for tensor, entering in (("6.weight", 6), ("3.weight", 3)):
        readers = [
            (group.name, piece)
            for group in network.groups
            for piece in group.slices
            if piece.tensor == tensor and piece.role == "input"
        ]
        for name, piece in readers:
            if tensor == "3.weight":
                assert (tensor, name) not in found  # grouped: a position means several channels
                continue
            positions, matrix = found[tensor, name]
            seen = torch.cat([model[:entering](images) for images, _ in data])  # type: ignore[index]
            values = seen[:, torch.as_tensor(piece.index)].movedim(1, 2).flatten(0, 1)
            torch.testing.assert_close(matrix, values.T @ values / len(values))
            assert positions.tolist() == piece.index[:, 0].tolist()
    convolution = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3)).eval()
    found = evidence(convolution, trace(convolution, EXAMPLE), "correlations", data).correlations
    values = torch.cat([convolution[:2](images) for images, _ in data]).movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(found["2.weight", "0"][1], values.T @ values / len(values))


def test_hooks_are_removed_when_the_network_raises(model: nn.Module) -> None:
    with pytest.raises(DataError, match="does not run on a batch"):
        data = [(torch.randn(2, 5, 6, 6), torch.zeros(2))]
        evidence(model, trace(model, EXAMPLE), "activations", data)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_small_scores_beside_large_boxes_count() -> None:
    """A detector joins boxes in hundreds of pixels and scores near zero in one output."""
    boxes, rare = torch.randn(8, 4, 50) * 300, torch.rand(8, 1, 50) * 1e-3
    constant = torch.full((8, 1, 50), 5.0)
    output = torch.cat([boxes, rare, constant], 1).requires_grad_()
    SampledAnswers()(output, None).backward()
    assert output.grad is not None
    felt = output.grad.square().sum((0, 2)) * output.detach().var((0, 2))
    torch.testing.assert_close(felt[:5] / felt[0], torch.ones(5), rtol=0.05, atol=0)
    assert felt[5] == 0
