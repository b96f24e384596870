from __future__ import annotations

import copy
import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress import plugins
from compress.data import Dataset
from compress.data._images import MemoryImages, Subset
from compress.errors import TrainingError, UnknownNameError, UsageError
from compress.modules.objective import TrainingProgress
from compress.recipe.settings import AugmentSettings, DistillSettings
from compress.tasks.fidelity import Fidelity
from compress.train import TrainResult, train
from compress.train.distill import build, build_objective
from compress.train.distill.build import Control, does_teacher_help, shortened
from compress.train.distill.features import Tap, pair_layers, survey, tapped
from compress.train.distill.objective import MOST_DB
from compress.train.losses import Taps


class Net(nn.Module):
    """Three stages of convolutions and a linear head."""

    def __init__(self, width: int = 4, classes: int = 3, stages: int = 3) -> None:
        super().__init__()
        widths = [3] + [width * 2**i for i in range(stages)]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1),
                    nn.BatchNorm2d(b),
                    nn.ReLU(),
                )
                for i, (a, b) in enumerate(itertools.pairwise(widths))
            )
        )
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.stages(x).mean((2, 3)))


class Other(nn.Module):
    """Another architecture: pooling between stages, a 1x1 convolution as its classifier."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.body = nn.Conv2d(5, 7, 3, padding=1)
        self.head = nn.Conv2d(7, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.stem(x)), 2)
        return self.head(torch.relu(self.body(x))).mean((2, 3))


def net(seed: int = 0, make: Any = Net, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(**options)


def dataset(classes: int = 3, count: int = 48) -> Dataset:
    generator = np.random.default_rng(0)

    def images(number: int) -> MemoryImages:
        labels = np.arange(number, dtype=np.int64) % classes
        pixels = generator.integers(0, 80, (number, 3, 8, 8), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[label % 3, :4, :4] += 120
        return MemoryImages(torch.from_numpy(pixels), labels)

    splits = {"train": images(count), "validation": images(24), "calibration": images(8)}
    names = tuple("abcdefgh"[:classes])
    return Dataset(
        "made up", names, (0.4,) * 3, (0.25,) * 3, {**splits, "test": images(8)}, fingerprint="x"
    )


DATA = dataset()


def settings(**changes: Any) -> DistillSettings:
    return DistillSettings(
        **{"epochs": 2, "batch_size": 16, "lr": 0.05, "precision": "fp32", **changes}
    )


def objective(student: nn.Module, teacher: Any, folder: Path | None = None, **changes: Any) -> Any:
    return build_objective(student, teacher, DATA, settings(**changes), folder=folder)


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    images = DATA.splits["train"]
    rows = np.arange(count)
    return DATA.normalize(images.take(rows)), torch.from_numpy(images.labels[rows])


def moment(model: nn.Module, epoch: float = 0.0, count: int = 6) -> TrainingProgress:
    return TrainingProgress(epoch, torch.arange(count), model)


# -- the sum -------------------------------------------------------------------------------------


def test_is_cross_entropy_plus_the_weighted_losses():
    student, teacher = net(1), net(2, width=6)
    images, target = batch()
    losses = ({"kd": {"temperature": 2.0, "weight": 0.5}}, {"dist": {"weight": 3}})
    value = objective(student, teacher, losses=losses, hard=0.25)(student, images, target)
    teacher.eval()
    mine, theirs = Taps(student(images)), Taps(teacher(images).detach())
    kd = plugins.create("losses", {"kd": {"temperature": 2.0}})
    dist = plugins.create("losses", "dist")
    expected = 0.25 * nn.functional.cross_entropy(mine.logits, target)
    expected += 0.5 * kd(mine, theirs, target) + 3 * dist(mine, theirs, target)
    torch.testing.assert_close(value, expected)


def test_logits_in_a_dict_teach_and_learn_like_bare_ones():
    class InDict(Net):
        def forward(self, x: Tensor) -> Any:
            features = self.stages(x)
            return {"features": features, "logits": self.linear(features.mean((2, 3)))}

    images, target = batch()
    losses = ({"kd": {}}, {"mgd": {}})
    values = []
    for kind in (Net, InDict):
        torch.manual_seed(0)  # the adapters of mgd are drawn
        student, teacher = net(1, kind), net(2, kind, width=6)
        values.append(objective(student, teacher, losses=losses)(student, images, target))
    torch.testing.assert_close(values[1], values[0])


def test_losses_fade_in_over_the_warm_up():
    student, teacher = net(1), net(2)
    images, target = batch()
    made = objective(student, teacher, losses=("kd",), hard=0.0, loss_warmup_epochs=4)
    values = []
    for epoch in (0.0, 1.0, 2.0, 4.0, 9.0):
        made.before(moment(student, epoch))
        values.append(float(made(student, images, target).detach()))
    assert values[0] == 0
    assert np.array(values[1:]) / values[-1] == pytest.approx([0.25, 0.5, 1, 1])


@pytest.mark.parametrize("name", plugins.names("losses"))
def test_every_loss_trains_a_student_of_another_architecture(name: str):
    student, teacher = net(1), net(2, Other)
    before = copy.deepcopy(teacher.state_dict())
    chosen = settings(losses=({name: {"weight": 0.01}},), epochs=1)
    made = build_objective(student, teacher, DATA, chosen)
    result = train(student, DATA, chosen, objective=made, device="cpu")
    assert np.isfinite(result.history[-1]["loss"])
    after = teacher.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_student_learns_from_the_teachers_logits_alone():
    teacher = net(2, width=8)
    chosen = settings(epochs=10)
    train(teacher, DATA, chosen, device="cpu")
    student = net(1)
    chosen = settings(epochs=10, losses=({"kd": {"weight": 1.0}},), hard=0.0)
    made = build_objective(student, teacher, DATA, chosen)
    result = train(student, DATA, chosen, objective=made, device="cpu")
    assert result.last_top1_pct > 90
    assert made.teacher_value == 100.0


# -- side effects --------------------------------------------------------------------------------


def trace_of(model: nn.Module) -> tuple[Any, ...]:
    return (
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [name for name, _ in model.named_modules()],
        [(p.requires_grad, p.is_contiguous()) for p in model.parameters()],
        [value.clone() for value in model.state_dict().values()],
    )


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[:4] == b[:4] and all(torch.equal(x, y) for x, y in zip(a[4], b[4], strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_networks_and_random_state_are_left_as_found(fails: bool):
    student, teacher = net(1), net(2)
    teacher.stages[1].eval()
    before = trace_of(student), trace_of(teacher), torch.get_rng_state()
    made = objective(student, teacher, losses=("hint", "crd", "kd"))
    assert same(trace_of(student), before[0])
    images, target = batch()
    made.before(moment(student))
    if fails:
        student.linear.forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            made(student, images, target)
        del student.linear.forward
    else:
        made(student, images, target)
    made.close()
    assert trace_of(student)[:4] == before[0][:4]
    assert same(trace_of(teacher), before[1])


def test_adapters_are_trained_and_not_saved_with_the_student(tmp_path: Path):
    student, teacher = net(1), net(2, width=6)
    names = set(student.state_dict())
    chosen = settings(losses=("hint",), epochs=1)
    made = build_objective(student, teacher, DATA, chosen)
    start = [p.detach().clone() for p in made.parameters()]
    assert start
    train(student, DATA, chosen, objective=made, folder=tmp_path, device="cpu")
    assert all(not torch.equal(a, b) for a, b in zip(start, made.parameters(), strict=True))
    assert set(student.state_dict()) == names
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert set(best["model"]) == names


def test_without_labels_validation_is_the_sqnr_of_outputs_to_the_teachers(
    caplog: pytest.LogCaptureFixture,
):
    student, teacher, task = net(1), net(2, width=6), Fidelity(of="classification")
    chosen = settings(losses=("kd",), keep="best", epochs=2, lr=1e-4)

    def run(network: nn.Module, chosen: DistillSettings) -> TrainResult:
        made = build_objective(network, teacher, DATA, chosen, task=task)
        return train(network, DATA, chosen, objective=made, task=task, device="cpu")

    def by_hand(network: nn.Module) -> float:
        images = torch.cat([images for images, _ in DATA.batches("validation")])
        with torch.no_grad():
            mine, theirs = (
                each.eval()(images).numpy().astype(float) for each in (network, teacher)
            )
        return 10 * np.log10((theirs**2).sum() / ((mine - theirs) ** 2).sum())

    before = by_hand(student)
    result = run(student, chosen)
    assert result.metric == "sqnr_db"
    assert result.best_top1_pct == pytest.approx(by_hand(student), abs=1e-4)
    assert result.best_top1_pct > before
    start = copy.deepcopy(student)
    result = run(student, chosen.model_copy(update={"lr": 50.0}))
    assert all(
        torch.equal(a, b) for a, b in zip(student.parameters(), start.parameters(), strict=True)
    )
    assert result.best_epoch == 0 and "it came (SQNR" in result.notes[-1]
    made = build_objective(teacher, copy.deepcopy(teacher), DATA, chosen, task=task)
    assert made.fidelity_db(teacher, DATA) == MOST_DB


@pytest.mark.parametrize("losses", [("kd", "hint"), ("crd",), ("mgd", "vid")])
def test_a_distillation_that_ended_anywhere_goes_on_to_the_same_weights(
    tmp_path: Path, losses: tuple[str, ...]
):
    teacher = net(2, width=6)
    chosen = settings(losses=losses, epochs=3, checkpoint_minutes=0.0)

    def student_after(stop: int | None, folder: Path | None, seed: int = 4) -> nn.Module:
        student = net(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of the adapters
            made = build_objective(student, teacher, DATA, chosen)
        call, calls = type(made).__call__, []

        class Stopping(type(made)):
            def __call__(self, *args: Any) -> Tensor:
                calls.append(1)
                if len(calls) == stop:
                    raise InterruptedError
                return call(self, *args)

        Stopping.__name__ = type(made).__name__
        made.__class__ = Stopping
        train(student, DATA, chosen, objective=made, folder=folder, device="cpu")
        return student

    whole = student_after(None, None)
    with pytest.raises(InterruptedError):
        student_after(6, tmp_path)
    resumed = student_after(None, tmp_path, seed=5)  # adapters come from the checkpoint
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


# -- taps and pairing ----------------------------------------------------------------------------


def test_taps_show_outputs_and_inputs_and_go_away():
    model = net(1)
    images, _ = batch()
    with tapped(model, [Tap("stages.1"), Tap("linear", "input")]) as seen:
        logits = model(images)
    torch.testing.assert_close(model.linear(seen[Tap("linear", "input")]), logits)
    torch.testing.assert_close(model.stages[2](seen[Tap("stages.1")]).mean((2, 3)),
                               seen[Tap("linear", "input")])  # fmt: skip
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_stages_of_equal_size_are_paired():
    made = objective(net(1), net(2, width=6), losses=("hint",))
    assert made.pairing() == [
        "hint: stages.0 (4x8x8) - stages.0 (6x8x8)",
        "hint: stages.1 (8x4x4) - stages.1 (12x4x4)",
        "hint: stages (16x2x2) - stages (24x2x2)",
    ]


def test_stages_without_a_counterpart_are_left_out():
    made = objective(net(1), net(2, Other), losses=("hint",))
    assert made.pairing() == [
        "hint: stages.0 (4x8x8) - stem (5x8x8)",
        "hint: stages.1 (8x4x4) - head (3x4x4)",
    ]


def test_with_other_input_sizes_stages_are_paired_from_the_deepest_backwards():
    made = objective(net(1), net(2, stages=4), losses=("hint",), teacher_image_size=32)
    assert made.pairing() == [
        "hint: stages.0 (4x8x8) - stages.1 (8x16x16)",
        "hint: stages.1 (8x4x4) - stages.2 (16x8x8)",
        "hint: stages (16x2x2) - stages (32x4x4)",
    ]
    images, target = batch()
    assert torch.isfinite(made(net(1), images, target))


def test_embeddings_are_what_the_classifiers_are_fed_with():
    made = objective(net(1), net(2, width=6), losses=("rkd",))
    assert made.pairing() == ["rkd: input of linear - input of linear"]


def test_layers_can_be_named():
    layers = {"stages.0": "stages.1"}
    made = objective(net(1), net(2), losses=({"hint": {"layers": layers}},))
    assert made.pairing() == ["hint: stages.0 (4x8x8) - stages.1 (8x4x4)"]
    made = objective(net(1), net(2), losses=({"attention": {"layers": ["stages.1"]}},))
    assert made.pairing() == ["attention: stages.1 (8x4x4) - stages.1 (8x4x4)"]


def test_torchvision_networks_pair_by_their_stages():
    from torchvision.models import mobilenet_v2, resnet18, resnet34, squeezenet1_1, vgg11

    example = torch.zeros(1, 3, 64, 64)
    makes = (resnet18, resnet34, mobilenet_v2, vgg11, squeezenet1_1)
    seen = {make.__name__: survey(make(num_classes=5), example) for make in makes}

    def pairs(student: str, teacher: str) -> list[str]:
        return list(map(str, pair_layers(seen[student], seen[teacher], "auto", "stages", "hint")))

    assert pairs("resnet18", "resnet34") == [
        "relu (64x32x32) - relu (64x32x32)",
        "layer1 (64x16x16) - layer1 (64x16x16)",
        "layer2 (128x8x8) - layer2 (128x8x8)",
        "layer3 (256x4x4) - layer3 (256x4x4)",
        "layer4 (512x2x2) - layer4 (512x2x2)",
    ]
    assert pairs("mobilenet_v2", "vgg11") == [
        "features.1 (16x32x32) - features.4 (128x32x32)",
        "features.3 (24x16x16) - features.9 (256x16x16)",
        "features.6 (32x8x8) - features.14 (512x8x8)",
        "features.13 (96x4x4) - features.19 (512x4x4)",
        "features (1280x2x2) - features (512x2x2)",
    ]
    assert seen["mobilenet_v2"].head == Tap("classifier.1", "input")
    assert seen["squeezenet1_1"].head == Tap("classifier.1", "input")


# -- teachers ------------------------------------------------------------------------------------


def test_classes_are_mapped_by_name():
    student, teacher = net(1), net(2, classes=4)
    made = objective(student, teacher, teacher_classes=("c", "zebra", "a", "b"), losses=("kd",))
    images, _ = batch()
    teacher.eval()
    torch.testing.assert_close(made.answer(images), teacher(images)[:, [2, 3, 0]].detach())


def test_a_teacher_of_another_input_size_sees_resized_images():
    sizes = []
    teacher = net(2)
    teacher.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape[2:])))
    made = objective(net(1), teacher, teacher_image_size=24, losses=("kd",))
    images, target = batch()
    made(net(1), images, target)
    assert set(sizes) == {(24, 24)}


@pytest.fixture
def onnx_teacher(tmp_path: Path) -> tuple[nn.Module, Path]:
    from compress.export import export_onnx

    teacher = net(2).eval()
    path = tmp_path / "teacher.onnx"
    export_onnx(teacher, DATA.example, path)
    return teacher, path


def test_an_onnx_file_teaches_logits_like_the_network(onnx_teacher: tuple[nn.Module, Path]):
    teacher, path = onnx_teacher
    student = net(1)
    images, target = batch()
    made = objective(student, path, losses=("kd",))
    expected = objective(student, teacher, losses=("kd",))(student, images, target)
    torch.testing.assert_close(made(student, images, target), expected, rtol=1e-4, atol=1e-5)
    made.close()


@pytest.mark.slow
def test_a_compiled_teacher_answers_the_same():
    teacher, graphs = net(2), []
    plainly = objective(net(1), teacher, losses=("kd",))
    compiled = objective(net(1), teacher, losses=("kd",), compile=True)
    images, _ = batch()
    torch.testing.assert_close(compiled.answer(images), plainly.answer(images))
    teacher.register_forward_hook(lambda *_: graphs.append(torch.compiler.is_compiling()))
    objective(net(1), teacher, losses=("kd",), compile=True).answer(images)
    assert any(graphs)


def test_a_loss_on_features_refuses_a_teacher_from_a_file(onnx_teacher: tuple[nn.Module, Path]):
    with pytest.raises(TrainingError) as caught:
        objective(net(1), onnx_teacher[1], losses=("hint",))
    text = str(caught.value)
    assert "loss 'hint': it compares features, and a teacher from a file shows only its" in text
    assert "Expected one of: dist, dkd, kd, mse, nkd." in text


class Fixed:
    """A session that takes four images at a time, no more, no fewer."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.closed = model.eval(), 0
        self.inputs = [type("Spec", (), {"shape": (4, 3, 8, 8)})]

    @torch.no_grad()
    def run(self, array: np.ndarray) -> list[np.ndarray]:
        assert array.shape[0] == 4
        return [self.model(torch.from_numpy(array)).numpy()]

    def close(self) -> None:
        self.closed += 1


def test_an_engine_of_a_fixed_batch_answers_batches_of_any_size():
    teacher = net(2)
    session = Fixed(teacher)
    made = objective(net(1), session, losses=("kd",))
    images, _ = batch(6)
    torch.testing.assert_close(made.answer(images), teacher(images).detach())
    made.close()
    assert session.closed == 0  # whoever opened it closes it


# -- cache ---------------------------------------------------------------------------------------


def test_answers_are_kept_on_disk_and_equal_those_computed_anew(tmp_path: Path):
    calls = []
    teacher = net(2)
    teacher.register_forward_hook(lambda *a: calls.append(len(a[2])))
    cached, plainly = net(1), net(1)
    fixed = AugmentSettings(crop_padding=1, flip=True, fixed=True)
    chosen = settings(losses=("dkd",), cache_teacher=True, augment=fixed, epochs=3)
    made = build_objective(cached, teacher, DATA, chosen, folder=tmp_path)
    calls.clear()
    train(cached, DATA, chosen, objective=made, device="cpu")
    assert sum(calls) == 48  # each image once, not once an epoch
    assert len(list(tmp_path.glob("teacher-*.npy"))) == 1
    chosen = chosen.model_copy(update={"cache_teacher": False})
    train(plainly, DATA, chosen, objective=build_objective(plainly, teacher, DATA, chosen))
    for a, b in zip(cached.parameters(), plainly.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_another_teacher_gets_another_file(tmp_path: Path):
    for seed in (2, 3):
        objective(net(1), net(seed), tmp_path, losses=("kd",), cache_teacher=True).close()
    assert len(list(tmp_path.glob("teacher-*.npy"))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": AugmentSettings(flip=True)}, "cache_teacher: images change from epoch to"),
        ({"losses": ("hint",)}, "cache_teacher: 'hint' compares features, which are not kept"),
    ],
)
def test_a_cache_that_would_be_wrong_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(TrainingError, match=message):
        objective(net(1), net(2), tmp_path, **{"losses": ("kd",), **changes}, cache_teacher=True)


def test_a_cache_needs_a_folder():
    with pytest.raises(TrainingError, match="no folder to keep the teacher's logits in"):
        objective(net(1), net(2), losses=("kd",), cache_teacher=True)


# -- a teacher that hurts ------------------------------------------------------------------------


def test_some_images_of_every_class_are_compared(monkeypatch: pytest.MonkeyPatch):
    """Images of a folder come class by class: the first ones would all be of one."""
    images = DATA.splits["validation"]
    by_class = Subset(images, np.argsort(images.labels, kind="stable"))
    data = replace(DATA, splits={**DATA.splits, "validation": by_class})
    student = net(1)
    with torch.no_grad():
        student.linear.weight.zero_()
        student.linear.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))  # the first class, always
    monkeypatch.setattr(build, "CHECKED_IMAGES", 12)
    made = build_objective(student, net(2), data, settings(losses=("kd",)))
    assert made.student_value == pytest.approx(100 / 3)


def test_a_teacher_worse_than_the_student_is_reported(caplog: pytest.LogCaptureFixture):
    student = net(1)
    train(student, DATA, settings(epochs=10), device="cpu")
    with caplog.at_level(logging.WARNING):
        chosen = settings(losses=("kd",), epochs=1)
        made = build_objective(student, net(2), DATA, chosen)
    assert "is worse than the student before training (100.00 %)" in caplog.text
    result = train(student, DATA, chosen, objective=made, device="cpu")
    assert result.notes == tuple(made.notes)
    assert made.notes[0].startswith("the teacher (")


def test_a_better_teacher_is_not_complained_about():
    teacher = net(2)
    train(teacher, DATA, settings(epochs=10), device="cpu")
    assert objective(net(1), teacher).notes == []


def test_a_control_says_how_sure_it_is():
    control = Control(70.0, 60.0, 1000, 6)
    assert control.verdict == "helps"
    # error of a difference of two shares
    error = 196 * np.sqrt(0.7 * 0.3 / 1000 + 0.6 * 0.4 / 1000)
    assert control.difference_ci95 == pytest.approx((10 - error, 10 + error))
    assert control.to_json()["verdict"] == "helps"
    assert "70.00 % with the teacher, 60.00 % without, on 1000 images: helps" in str(control)


@pytest.mark.parametrize(
    ("with_pct", "without_pct", "verdict"),
    [(60.0, 70.0, "hurts"), (65.0, 65.5, "no difference seen")],
)
def test_the_verdict_of_a_control(with_pct: float, without_pct: float, verdict: str):
    assert Control(with_pct, without_pct, 1000, 3).verdict == verdict


def test_a_short_schedule_keeps_its_proportions():
    chosen = settings(epochs=30, warmup_epochs=5, step_epochs=(10, 20), cache_teacher=True)
    short = shortened(chosen, 6)
    assert (short.epochs, short.warmup_epochs, short.cache_teacher) == (6, 1.0, False)
    assert short.step_epochs == pytest.approx((2, 4))


def test_the_control_of_a_recipe_trains_copies():
    teacher, student = net(2, width=8), net(1)
    train(teacher, DATA, settings(epochs=10), device="cpu")
    before = copy.deepcopy(student.state_dict())
    control = does_teacher_help(student, teacher, DATA, settings(epochs=20, losses=("kd",)))
    assert (control.epochs, control.images) == (4, 24)
    assert control.verdict in {"helps", "hurts", "no difference seen"}
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_a_control_needs_validation_images():
    splits = {name: images for name, images in DATA.splits.items() if name != "validation"}
    with pytest.raises(TrainingError, match=r"without validation images.*data.validation: 0.1"):
        does_teacher_help(net(1), net(2), replace(DATA, splits=splits), settings())


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "teacher", "error", "message"),
    [
        ({}, {"classes": 5}, TrainingError,
         r"distill: the teacher has 5 class outputs, the student 3. Give the teacher's class n"),
        ({"teacher_classes": ("a", "b", "x")}, {}, TrainingError,
         "teacher_classes: the teacher lacks the classes c. Expected all of: a, b, c"),
        ({"teacher_classes": ("a", "b")}, {}, TrainingError,
         "teacher_classes: 2 names for 3 outputs of the teacher"),
        ({"losses": ("hint",), "compile": True}, {}, TrainingError,
         "loss 'hint': it compares features, and hooks do not reach into a compiled network"),
        ({"losses": ("dkk",)}, {}, UnknownNameError, "no such loss 'dkk'. Did you mean 'dkd'"),
        ({"losses": ({"kd": {"temprature": 1}},)}, {}, UsageError,
         "loss 'kd' has no option 'temprature'. Did you mean 'temperature'"),
        ({"losses": ({"kd": {"weight": -1}},)}, {}, UsageError,
         "loss 'kd': weight -1. Expected a number of at least 0"),
        ({"losses": ({"kd": {"weight": "much"}},)}, {}, UsageError, "weight 'much'"),
        ({"losses": ({"hint": {"layers": ["stages.9"]}},)}, {}, UnknownNameError,
         r"the student: no such layer that returns one tensor 'stages.9'. Did you mean 'stages"),
        ({"losses": ({"hint": {"layers": {"stages.0": "stage.0"}}},)}, {}, UnknownNameError,
         "the teacher: no such layer that returns one tensor 'stage.0'"),
        ({"losses": ({"hint": {"layers": "stages.0"}},)}, {}, UsageError,
         "loss 'hint': layers is 'stages.0'. Expected auto, a list or a mapping"),
        ({"losses": ({"hint": {"layers": [["stages.0", "stages.1"]]}},)}, {}, UsageError,
         r"layers is \[\['stages.0', 'stages.1'\]\]. Expected auto, a list"),
        ({"losses": ({"hint": {"layers": 3}},)}, {}, UsageError, "layers is 3. Expected auto"),
        ({"losses": ({"hint": {"layers": []}},)}, {}, TrainingError, "names no layers"),
        ({"losses": ({"crd": {"layers": ["stages.0", "stages.1"]}},)}, {}, TrainingError,
         "loss 'crd': crd compares one pair of layers, not 2"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_training(
    changes: dict[str, Any], teacher: dict[str, Any], error: type[Exception], message: str
):
    model = net(2, **teacher)
    before = trace_of(model)
    with pytest.raises(error, match=message):
        objective(net(1), model, **changes)
    assert same(trace_of(model), before)


def test_a_student_of_other_classes_than_the_data_is_refused():
    with pytest.raises(TrainingError, match="the student has 7 class outputs, the data has 3"):
        objective(net(1, classes=7), net(2))


def test_a_network_cannot_teach_itself():
    model = net(1)
    with pytest.raises(UsageError, match="cannot be its own teacher"):
        objective(model, model)


def test_layers_that_cannot_be_paired_are_to_be_named():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.mean((2, 3)))

    with pytest.raises(TrainingError, match="no features of student and teacher can be paired"):
        objective(net(1), Flat(), losses=("hint",))
