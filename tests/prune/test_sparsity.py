"""Masks keep the share they promise, the right weights, and stay through training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compress.errors import UsageError
from compress.prune.sparsity import SparsityPlan, apply_sparsity, keeping_zeros, plan_sparsity

EXAMPLE = torch.zeros(1, 4, 8, 8)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def batches() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 4, 8, 8, generator=draw), torch.arange(8) % 3) for _ in range(2)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("ranking", "where"), [("global", "GLOBAL"), ("uniform", "LOCAL")])
def test_magnitude_masks_are_those_of_nncf(model: nn.Module, ranking: str, where: str) -> None:
    nncf = pytest.importorskip("nncf")
    plan = plan_sparsity(model, keep_weights=0.4, ranking=ranking)  # type: ignore[arg-type]
    mode = getattr(nncf.PruneMode, f"UNSTRUCTURED_MAGNITUDE_{where}")
    inside = nn.ModuleDict({"net": copy.deepcopy(model).eval()})
    inside.forward = inside["net"].forward  # type: ignore[method-assign]
    wrapped = nncf.prune(inside, mode, ratio=0.6, examples_inputs=EXAMPLE)
    theirs = {
        name.partition("net:")[2].rpartition("__")[0].replace(":", "."): mask.bool()
        for name, mask in wrapped.named_buffers()
        if name.endswith(".binary_mask")
    }
    assert theirs.keys() == plan.masks.keys()
    for name, mask in plan.masks.items():  # they round the number of weights otherwise
        assert int((mask != theirs[name]).sum()) <= 1


@pytest.mark.parametrize("ranking", ["global", "uniform"])
def test_magnitude_masks_drop_the_smallest(model: nn.Module, ranking: str) -> None:
    plan = plan_sparsity(model, keep_weights=0.4, ranking=ranking)  # type: ignore[arg-type]
    assert plan.keep_weights == pytest.approx(0.4, abs=0.002)
    for name, mask in plan.masks.items():
        weight = model.get_parameter(name).detach().abs()
        assert weight[~mask].max() <= weight[mask].min()
        if ranking == "uniform":
            assert mask.float().mean().item() == pytest.approx(0.4, abs=0.06)


@pytest.mark.parametrize("criterion", ["l1", "taylor"])
def test_two_of_every_four_stay_along_the_inputs(model: nn.Module, criterion: str) -> None:
    plan = plan_sparsity(model, pattern="2:4", criterion=criterion, batches=batches())  # type: ignore[arg-type]
    for name in ("0.weight", "2.weight"):
        mask = plan.masks[name]
        fours = mask.movedim(1, -1).reshape(-1, 4)
        assert (fours.sum(1) == 2).all()
    assert plan.masks["5.weight"].all()  # six inputs are no multiple of four
    if criterion == "l1":
        first = model.get_parameter("0.weight")[0, :, 1, 1].abs()
        assert set(plan.masks["0.weight"][0, :, 1, 1].nonzero().flatten().tolist()) == set(
            first.topk(2).indices.tolist()
        )


def test_taylor_masks_drop_weights_without_effect(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("5.weight")[:, 2] = 0  # so nothing before channel 2 matters
    plan = plan_sparsity(model, keep_weights=0.7, criterion="taylor", batches=batches())
    assert not plan.masks["2.weight"][2].any()
    assert plan.keep_weights == pytest.approx(0.7, abs=0.01)


def test_a_copy_is_zeroed_and_training_keeps_it_so(model: nn.Module) -> None:
    plan = plan_sparsity(model, pattern="2:4")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparse = apply_sparsity(model, plan)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
    with keeping_zeros(sparse):
        for _ in range(3):
            for images, target in batches():
                optimizer.zero_grad()
                nn.functional.cross_entropy(sparse(images), target).backward()
                optimizer.step()
    for name, mask in plan.masks.items():
        assert not sparse.get_parameter(name)[~mask].any()
        assert not torch.equal(sparse.get_parameter(name)[mask], before[name][mask])
    assert not sparse._forward_pre_hooks


def test_lamp_never_empties_a_layer(model: nn.Module) -> None:
    """The largest weight of every layer scores 1, however small it is beside other layers."""
    with torch.no_grad():
        model.get_parameter("5.weight").mul_(1e-6)
    plan = plan_sparsity(model, keep_weights=0.05, criterion="lamp")
    assert plan.keep_weights == pytest.approx(0.05, abs=0.01)
    weight = model.get_parameter("5.weight").detach().abs()
    assert plan.masks["5.weight"].flatten()[weight.argmax()]


def test_random_masks_follow_the_seed(model: nn.Module) -> None:
    first, again, other = (
        plan_sparsity(model, keep_weights=0.5, criterion="random", seed=seed).masks
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pattern": "4:8"},
            "'4:8', which has no meaning for single weights. Expected one of unstruct",
        ),
        ({"criterion": "bn_scale", "keep_weights": 0.5}, "has no meaning for single weights"),
        ({}, "keep_weights is None with pattern 'unstructured'"),
        ({"pattern": "2:4", "keep_weights": 0.5}, "none for 2:4, which keeps half"),
        ({"keep_weights": 1.5}, "is 1.5. Expected the share that is kept"),
        (
            {"keep_weights": 0.5, "criterion": "taylor"},
            "criterion 'taylor' needs images and labels",
        ),
        ({"keep_weights": 0.5, "criterion": "taylor", "batches": []}, "batches holds no images"),
    ],
)
def test_bad_input_is_refused(model: nn.Module, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_sparsity(model, **options)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert SparsityPlan({}, "2:4", "l1").keep_weights == 0
