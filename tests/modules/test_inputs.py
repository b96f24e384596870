"""Batches as loaders give them become arguments and targets, or are refused in words."""

import numpy as np
import pytest
import torch
from torch import nn

import compress
from compress.errors import DataError, UsageError
from compress.evaluate import predict
from compress.modules.inputs import example_of, read_batch, read_batches

IMAGES, LABELS = torch.randn(6, 3, 8, 8), torch.arange(6)


class Small(nn.Module):
    """A network whose channels can be ranked, with a last layer that holds the classes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 6)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


class Two(Small):
    def forward(self, x, other):
        return super().forward(x + other)


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, LABELS),
        [IMAGES, LABELS],
        (IMAGES.numpy(), LABELS.numpy()),
        {"pixel_values": IMAGES, "labels": LABELS},
        {"image": IMAGES, "label": LABELS, "path": list("abcdef")},
        {"whatever": IMAGES, "target": LABELS},
        ({"images": IMAGES}, LABELS),
    ],
)
def test_images_and_targets_are_found(batch):
    found = read_batch(batch)
    (images,) = found.args
    assert torch.equal(images, IMAGES)
    assert torch.equal(found.target, LABELS)
    assert len(found) == 6


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES, None), [IMAGES], {"x": IMAGES}])
def test_images_alone_have_no_target(batch):
    found = read_batch(batch)
    assert torch.equal(found.args[0], IMAGES)
    assert found.target is None


def test_several_inputs_come_by_position_or_by_name():
    example = (IMAGES[:1], IMAGES[:1])
    for batch in ((IMAGES, IMAGES, LABELS), ((IMAGES, IMAGES), LABELS)):
        found = read_batch(batch, example)
        assert len(found.args) == 2
        assert torch.equal(found.target, LABELS)
    found = read_batch(
        {"other": IMAGES + 1, "x": IMAGES, "y": LABELS}, {"x": IMAGES[:1], "other": IMAGES[:1]}
    )
    assert list(found.kwargs) == ["x", "other"]
    assert torch.equal(found.kwargs["other"], IMAGES + 1)
    assert torch.equal(found.target, LABELS)


def test_a_batch_is_split_with_its_targets():
    parts = list(read_batch((IMAGES, {"boxes": list("abcdef")})).split(4))
    assert [len(part) for part in parts] == [4, 2]
    assert parts[1].target == {"boxes": ["e", "f"]}


@pytest.mark.parametrize(
    "batch", ["text", 3, (), {"a": 1}, (LABELS[0],), {"labels": LABELS, "ids": LABELS}]
)
def test_a_batch_without_images_is_refused(batch):
    with pytest.raises(DataError):
        read_batch(batch)


def test_one_tensor_is_one_batch_and_a_number_is_none():
    assert len(list(read_batches(IMAGES))) == 1
    with pytest.raises(UsageError, match="int"):
        list(read_batches(3))


def test_a_shape_is_an_example():
    assert example_of((1, 3, 8, 8)).shape == (1, 3, 8, 8)
    assert isinstance(example_of(np.zeros((1, 3))), torch.Tensor)
    with pytest.raises(UsageError, match="str"):
        example_of("cat.jpg")


@pytest.mark.parametrize("criterion", ["obs", "activation", "fisher"])
def test_criteria_without_labels_rank_alike_from_every_form(criterion):
    torch.manual_seed(0)
    model = Small().eval()
    plans = [
        compress.plan_pruning(
            model, (1, 3, 8, 8), criterion=criterion, keep_macs=0.5, batches=batches, seed=0
        ).to_json()
        for batches in (
            [(IMAGES, LABELS)],
            [IMAGES],
            IMAGES,
            [(IMAGES, None)],
            [{"pixel_values": IMAGES, "labels": LABELS}],
        )
    ]
    assert len({str(plan) for plan in plans}) == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("criterion", ["l1", "obs", "taylor"])
def test_plans_are_the_same_where_gradients_are_off(context, criterion):
    torch.manual_seed(0)
    model = Small().eval()
    options = {"criterion": criterion, "keep_macs": 0.5, "batches": [(IMAGES, LABELS)]}
    expected = compress.plan_pruning(model, IMAGES[:1], **options).to_json()
    with context():
        found = compress.plan_pruning(model, IMAGES[:1], **options)
        small = compress.apply_pruning(model, found)
    assert found.to_json() == expected
    assert next(small.parameters()).requires_grad
    assert not next(small.parameters()).is_inference()


def test_several_inputs_are_ranked_with_targets():
    torch.manual_seed(0)
    plan = compress.plan_pruning(
        Two().eval(),
        (IMAGES[:1], IMAGES[:1]),
        criterion="taylor",
        keep_macs=0.5,
        batches=[(IMAGES, IMAGES, LABELS)],
    )
    assert plan.macs_after <= 0.5 * plan.macs_before


def test_taylor_without_targets_says_what_is_missing():
    with pytest.raises(DataError, match="without targets"):
        compress.plan_pruning(
            Small(), IMAGES[:1], criterion="taylor", keep_macs=0.5, batches=[IMAGES]
        )


def test_batches_that_the_network_cannot_take_are_named():
    with pytest.raises(DataError, match="does not run on a batch"):
        compress.plan_pruning(
            Small(), IMAGES[:1], criterion="obs", keep_macs=0.5, batches=[IMAGES[:, :1]]
        )


class _Scaling(nn.Module):
    """A CNN that scales what it is given: in place, as some image-restoration networks do, or not.

    Source: RCAN's forward in the package spandrel multiplies its input by 255 in place.
    """

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_place = in_place
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_place:
            x *= 3.0
        else:
            x = x * 3.0
        x = torch.relu(self.stem(x))
        return self.last((x + self.block(x)).mean((2, 3)))


@pytest.fixture
def twins():
    """The network that writes into its input, and the same network that does not."""
    return [_Scaling(in_place=in_place).eval() for in_place in (True, False)]


@pytest.mark.parametrize("criterion", ["l2", "taylor", "obs", "activation"])
def test_pruning_a_network_that_writes_into_its_input_prunes_its_twin(twins, criterion):
    images = torch.rand(32, 3, 8, 8)
    batches = [(part.clone(), torch.arange(16) % 4) for part in images.split(16)]
    found = [
        compress.prune(
            twin,
            (1, 3, 8, 8),
            batches=batches,
            criterion=criterion,
            keep_macs=0.6,
            refit_steps=5,
        )
        for twin in twins
    ]
    assert torch.equal(torch.cat([batch for batch, _ in batches]), images)
    (writing, plan), (plain, same) = found
    assert plan.to_json() == same.to_json()
    for name, value in plain.state_dict().items():
        assert torch.equal(writing.state_dict()[name], value), name


def test_a_network_that_writes_into_its_input_is_evaluated_and_exported_as_its_twin(
    twins, tmp_path
):
    images = torch.rand(6, 3, 8, 8)
    kept = images.clone()
    with compress.open_session(twins[0], "pytorch") as session:
        mine = session.run(images.numpy())[0]
    np.testing.assert_array_equal(images, kept)
    want = twins[1](images).detach().numpy()
    np.testing.assert_allclose(mine, want, rtol=1e-5, atol=1e-6)
    found = predict(twins[0], [(images, torch.zeros(6, dtype=torch.long))])
    np.testing.assert_allclose(found.logits, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(images, kept)
    path = compress.export_onnx(twins[0], images[:1], tmp_path / "net.onnx")
    with compress.open_session(path) as session:
        np.testing.assert_allclose(session.run(images.numpy())[0], want, rtol=1e-4, atol=1e-5)


def test_a_teacher_that_writes_into_its_input_leaves_the_student_its_images(twins):
    images = torch.rand(4, 3, 8, 8)
    student = _Scaling(in_place=False)
    losses = []
    for teacher in twins:
        given = images.clone()
        with compress.distiller(student, teacher, ["kd"]) as distill:
            student(given)
            losses.append(distill.loss(given).item())
        assert torch.equal(given, images)
    assert losses[0] == losses[1]
