"""Accuracy against torchmetrics and scikit-learn; answers of modules, sessions and functions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from compress import evaluate
from compress.errors import CompressError, DataError, EngineError
from compress.evaluate import Predictions, accuracy, predict
from compress.runtimes import open_session


@dataclass
class Spec:
    name: str
    shape: tuple[Any, ...]
    dtype: str = "float32"
    batch: tuple[int, int] | None = None


class FixedSession:
    """A session of one batch size that takes the mean of each channel as a logit."""

    def __init__(self, batch: int | str, limits: tuple[int, int] | None = None) -> None:
        self.inputs = (Spec("input", (batch, 3, 4, 4), batch=limits),)
        self.seen: list[int] = []

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        self.seen.append(len(images))
        return [images.mean((2, 3)), images]


class LabellingSession(FixedSession):
    """A session that says its scores by label first, as classifiers of scikit-learn do."""

    outputs = (Spec("by_label", (), "map"), Spec("scores", ("batch", 3)), Spec("image", ("batch",)))

    def run(self, images: np.ndarray) -> list[Any]:
        scores, image = super().run(images)
        return [[dict(enumerate(row)) for row in scores], scores, image]


def test_outputs_that_are_no_tensors_are_left_out():
    images = np.random.default_rng(0).normal(size=(5, 3, 4, 4)).astype(np.float32)
    found = evaluate.run_session(LabellingSession("batch"), images)
    assert list(found) == ["scores", "image"]
    np.testing.assert_array_equal(found["image"], images)


def batches(sizes: list[int], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 4, 4, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for size in sizes
    ]


def random_predictions(total: int, classes: int, seed: int = 0) -> Predictions:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, total)
    logits = generator.normal(size=(total, classes)).astype(np.float32)
    logits[np.arange(total), labels] += 1.5
    return Predictions(logits, labels)


@pytest.mark.parametrize("classes", [6, 10, 40])
def test_accuracy_equals_torchmetrics(classes: int) -> None:
    from torchmetrics.functional import classification as oracle

    predictions = random_predictions(700, classes)
    measured = accuracy(predictions)
    logits, labels = torch.from_numpy(predictions.logits), torch.from_numpy(predictions.labels)
    about = {"num_classes": classes}
    top1 = oracle.multiclass_accuracy(logits, labels, average="micro", **about)
    top5 = oracle.multiclass_accuracy(logits, labels, average="micro", top_k=5, **about)
    ece = oracle.multiclass_calibration_error(logits.softmax(1), labels, n_bins=15, **about)
    confusion = oracle.multiclass_confusion_matrix(logits, labels, **about)
    assert measured.top1_pct == pytest.approx(100 * float(top1))
    assert measured.top5_pct == pytest.approx(100 * float(top5))
    assert measured.ece_pct == pytest.approx(100 * float(ece), abs=1e-3)
    assert measured.confusion == tuple(tuple(row) for row in confusion.tolist())


def test_each_class_equals_scikit_learn() -> None:
    from sklearn.metrics import precision_recall_fscore_support

    predictions = random_predictions(300, 7)
    names = list("abcdefg")
    measured = accuracy(predictions, names)
    precision, recall, f1, support = precision_recall_fscore_support(
        predictions.labels, predictions.answers, labels=range(7)
    )
    for k, row in enumerate(measured.per_class):
        assert (row.name, row.images) == (names[k], support[k])
        assert row.precision_pct == pytest.approx(100 * precision[k])
        assert row.recall_pct == pytest.approx(100 * recall[k])
        assert row.f1_pct == pytest.approx(100 * f1[k])


def test_a_class_that_never_occurs_has_no_accuracy_instead_of_zero() -> None:
    predictions = Predictions(np.eye(3, dtype=np.float32)[[0, 1]], np.array([0, 1]))
    absent = accuracy(predictions).per_class[2]
    assert (absent.images, absent.precision_pct, absent.recall_pct, absent.f1_pct) == (
        0,
        None,
        None,
        None,
    )


def test_top5_of_five_classes_is_absent() -> None:
    assert "top5_pct" not in accuracy(random_predictions(20, 5)).to_json()


def test_top1_interval_is_wilson_in_percent() -> None:
    from statsmodels.stats.proportion import proportion_confint

    measured = accuracy(random_predictions(123, 10))
    right = round(measured.top1_pct * 1.23)
    low, high = proportion_confint(right, 123, method="wilson")
    assert measured.top1_ci95 == pytest.approx((100 * low, 100 * high))


def test_subgroups_are_scored_each_on_its_own() -> None:
    predictions = random_predictions(200, 4)
    member = ["night" if i % 4 == 0 else "day" for i in range(200)]
    measured = accuracy(predictions, subgroups=member).per_subgroup
    night = predictions.correct[::4]
    assert measured["night"]["top1_pct"] == pytest.approx(100 * night.mean())
    assert measured["night"]["images"] + measured["day"]["images"] == 200


def test_predictions_survive_saving(tmp_path: Path) -> None:
    predictions = random_predictions(20, 4)
    predictions.save(tmp_path / "p.npz")
    loaded = Predictions.load(tmp_path / "p.npz")
    assert np.array_equal(loaded.logits, predictions.logits)
    assert np.array_equal(loaded.labels, predictions.labels)
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz"]


def test_a_damaged_file_of_predictions_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match=r"p\.npz: holds no predictions"):
        Predictions.load(tmp_path / "p.npz")
    np.savez(tmp_path / "q.npz", other=np.zeros(3))
    with pytest.raises(DataError, match=r"q\.npz: holds no predictions"):
        Predictions.load(tmp_path / "q.npz")
    with pytest.raises(DataError, match=r"r\.npz: holds no predictions"):
        Predictions.load(tmp_path / "r.npz")


class Noisy(nn.Module):
    """Dropout and BatchNorm tell evaluation from training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm2d(3), nn.Dropout(), nn.Linear(48, 3)
        self.norm.eval()  # frozen by its owner, while the rest trains

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(images).flatten(1)))


def test_a_module_is_evaluated_in_eval_mode_and_left_as_it_was() -> None:
    model = Noisy()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = predict(model, batches([5, 5])), predict(model, batches([5, 5]))
    assert np.array_equal(first.logits, second.logits)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_a_module_is_left_as_it_was_when_it_fails() -> None:
    model = Noisy()
    with pytest.raises(RuntimeError):
        predict(model, [(torch.zeros(2, 3, 9, 9), torch.zeros(2, dtype=torch.int64))])
    assert model.training
    assert not model.norm.training


@pytest.mark.parametrize("batch", [1, 4, 7, "batch"])
def test_a_session_of_any_batch_size_answers_every_image_once(batch: int | str) -> None:
    data = batches([7, 7, 2])
    session = FixedSession(batch)
    expected = torch.cat([images.mean((2, 3)) for images, _ in data]).numpy()
    predictions = predict(session, data)
    assert np.allclose(predictions.logits, expected, atol=1e-6)
    assert np.array_equal(predictions.labels, torch.cat([target for _, target in data]).numpy())
    if isinstance(batch, int):
        assert set(session.seen) == {batch}


def test_a_session_with_limits_gets_batches_within_them() -> None:
    session = FixedSession("batch", limits=(2, 4))
    data = batches([7, 1])
    expected = torch.cat([images.mean((2, 3)) for images, _ in data]).numpy()
    assert np.allclose(predict(session, data).logits, expected, atol=1e-6)
    assert session.seen == [4, 3, 2]


def test_a_function_may_return_several_outputs() -> None:
    data = batches([4])
    predictions = predict(lambda images: (images.mean((2, 3)), images), data)
    assert predictions.logits.shape == (4, 3)


def nan_in_the_second_batch(images: Tensor) -> Tensor:
    logits = images.mean((2, 3))
    if len(images) == 3:
        logits[1] = float("nan")
    return logits


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: predict(FixedSession("b"), []), r"no images to evaluate on"),
        (lambda: predict(lambda x: x, batches([2])), r"2 images with an output of shape \(2, 3, 4"),
        (lambda: predict(lambda x: x[:1, :, 0, 0], batches([2])), r"logits of shape \(2, classes"),
        (lambda: predict(nan_in_the_second_batch, batches([5, 3])), r"1 of 3.*first.*image 6"),
        (
            lambda: Predictions(np.zeros((2, 3), np.float32), np.array([0, 3])),
            r"labels reach from 0 to 3.*3 class outputs.*from 0 to 2",
        ),
        (lambda: Predictions(np.zeros((2, 3), np.float32), np.zeros(3, int)), r"do not fit"),
        (lambda: Predictions(np.zeros((0, 3), np.float32), np.zeros(0, int)), r"no images"),
        (lambda: accuracy(random_predictions(5, 3), ["a", "b"]), r"2 class names.*3 class outputs"),
        (lambda: accuracy(random_predictions(5, 3), subgroups=["a"]), r"1 subgroups for 5 images"),
    ],
)
def test_what_cannot_be_evaluated_is_explained(attempt: Any, message: str) -> None:
    with pytest.raises(CompressError, match=message) as caught:
        attempt()
    assert isinstance(caught.value, DataError | EngineError)


def test_calibration_bins_tell_every_image_once() -> None:
    measured = accuracy(random_predictions(200, 10))
    assert sum(measured.calibration["images"]) == 200
    assert len(set(map(len, measured.calibration.values()))) == 1


def test_logits_are_found_wherever_a_network_puts_them():
    class InDict(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"features": x.relu(), "logits": x.mean((2, 3))}

    images = torch.randn(6, 3, 4, 4)
    found = predict(InDict(), [(images, torch.arange(6) % 3)])
    np.testing.assert_allclose(found.logits, images.mean((2, 3)).numpy(), atol=1e-6)


def test_the_calibration_error_of_equal_confidence_is_its_distance_from_the_accuracy() -> None:
    logits = np.zeros((4, 3), np.float32)
    logits[range(4), [0, 1, 2, 0]] = 2.0
    sure = float(np.exp(2) / (np.exp(2) + 2))
    judged = accuracy(Predictions(logits, np.array([0, 1, 2, 1])))
    assert judged.ece_pct == pytest.approx(100 * abs(sure - 0.75))
    assert judged.calibration["confidence_pct"] == pytest.approx([100 * sure])
    assert (judged.calibration["accuracy_pct"], judged.calibration["images"]) == ([75.0], [4])


@pytest.mark.parametrize("images", [5, 8, 3])
def test_outputs_whose_first_dimension_is_time_are_asked_for_one_image_at_a_time(
    images: int, tmp_path: Path
) -> None:
    """As of a reader of text; eight images look like eight steps."""
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["steps"]),
        helper.make_node("Transpose", ["steps"], ["text"], perm=[1, 0, 2]),
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[2, 3], keepdims=0),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in [("x", ["N", 3, 8, 8]), ("text", [8, "N", 24]), ("mean", ["N", 3])]
    ]
    constants = [numpy_helper.from_array(np.array([0, 8, 24]), "shape")]
    graph = helper.make_graph(nodes, "reader", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "reader.onnx")
    x = np.random.default_rng(0).normal(size=(images, 3, 8, 8)).astype(np.float32)
    with open_session(tmp_path / "reader.onnx") as session:
        found = evaluate.run_session(session, x)
    np.testing.assert_array_equal(found["text"], x.reshape(images, 8, 1, 24))
    np.testing.assert_allclose(found["mean"], x.mean((2, 3)), atol=1e-6)
