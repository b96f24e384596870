"""Masks keep the share they promise, the right weights, and stay through training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from compress.errors import UsageError
from compress.sparsity import SparsityPlan, WithMasks, apply_sparsity, plan_sparsity

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
@pytest.mark.parametrize("ranking", ["global", "uniform"])
def test_magnitude_masks_drop_the_smallest(model: nn.Module, ranking: str) -> None:
    plan = plan_sparsity(model, EXAMPLE, keep_weights=0.4, ranking=ranking)  # type: ignore[arg-type]
    assert plan.keep_weights == pytest.approx(0.4, abs=0.02)
    for name, mask in plan.masks.items():
        weight = model.get_parameter(name).detach().abs()
        assert weight[~mask].max() <= weight[mask].min()
        if ranking == "uniform":
            assert mask.float().mean().item() == pytest.approx(0.4, abs=0.06)


@pytest.mark.parametrize("score", ["magnitude", "taylor"])
def test_two_of_every_four_stay_along_the_inputs(model: nn.Module, score: str) -> None:
    plan = plan_sparsity(model, EXAMPLE, pattern="2:4", score=score, batches=batches())  # type: ignore[arg-type]
    for name in ("0.weight", "2.weight"):
        mask = plan.masks[name]
        fours = mask.movedim(1, -1).reshape(-1, 4)
        assert (fours.sum(1) == 2).all()
    assert plan.masks["5.weight"].all()  # six inputs are no multiple of four
    if score == "magnitude":
        first = model.get_parameter("0.weight")[0, :, 1, 1].abs()
        assert set(plan.masks["0.weight"][0, :, 1, 1].nonzero().flatten().tolist()) == set(
            first.topk(2).indices.tolist()
        )


def test_taylor_masks_drop_weights_without_effect(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("5.weight")[:, 2] = 0  # so nothing before channel 2 matters
    plan = plan_sparsity(model, EXAMPLE, keep_weights=0.7, score="taylor", batches=batches())
    assert not plan.masks["2.weight"][2].any()
    assert plan.keep_weights == pytest.approx(0.7, abs=0.01)


def test_a_copy_is_zeroed_and_training_keeps_it_so(model: nn.Module) -> None:
    plan = plan_sparsity(model, EXAMPLE, pattern="2:4")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparse = apply_sparsity(model, plan)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    class Loss:
        def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model(images), target)

        def parameters(self) -> Iterator[nn.Parameter]:
            yield from ()

        def close(self) -> None:
            pass

    objective = WithMasks(Loss(), plan)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for images, target in batches():
            optimizer.zero_grad()
            objective(sparse, images, target).backward()
            optimizer.step()
    sparse = apply_sparsity(sparse, plan)
    for name, mask in plan.masks.items():
        assert not sparse.get_parameter(name)[~mask].any()
        assert not torch.equal(sparse.get_parameter(name)[mask], before[name][mask])
    objective.close()
    assert list(objective.parameters()) == []


def test_the_report_says_what_runtimes_make_of_it(model: nn.Module) -> None:
    told = plan_sparsity(model, EXAMPLE, pattern="2:4").to_json()
    assert "zeros cost as much as other weights" in told["runtimes"]["onnxruntime"]
    assert told["layers"]["0.weight"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "4:8"}, "pattern is '4:8'. Expected one of unstructured, 2:4"),
        ({"score": "l1", "keep_weights": 0.5}, "score is 'l1'"),
        ({}, "keep_weights is None with pattern 'unstructured'"),
        ({"pattern": "2:4", "keep_weights": 0.5}, "none for 2:4, which keeps half"),
        ({"keep_weights": 1.5}, "is 1.5. Expected the share that is kept"),
        ({"keep_weights": 0.5, "score": "taylor"}, "score 'taylor' needs images and labels"),
        ({"keep_weights": 0.5, "score": "taylor", "batches": []}, "batches holds no images"),
    ],
)
def test_bad_input_is_refused(model: nn.Module, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_sparsity(model, EXAMPLE, **options)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert SparsityPlan({}, "2:4", "magnitude").keep_weights == 0
