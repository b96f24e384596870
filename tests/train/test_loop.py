from __future__ import annotations

import copy
import itertools
import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import dataset, plain, same_weights
from torch import Tensor, nn
from torch.nn import functional as F

from compress.data._images import MemoryImages, Subset
from compress.errors import TrainingError, UnknownNameError, UsageError
from compress.modules.objective import CrossEntropy, Objective
from compress.recipe.settings import AugmentSettings, TrainSettings
from compress.train import TrainResult, shown_batches, train
from compress.train.batches import permutation, train_batches
from compress.train.optimizers import rate_factor
from compress.train.state import Training, fastest_format

DATA = dataset()


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(
        **{"epochs": 2, "batch_size": 32, "lr": 0.1, "precision": "fp32", **changes}
    )


def trained(model: nn.Module | None = None, *, data: Any = DATA, seed: int = 0, **changes: Any):
    model = model or plain()
    folder = changes.pop("folder", None)
    objective = changes.pop("objective", None)
    chosen = settings(**changes)
    result = train(model, data, chosen, seed=seed, folder=folder, objective=objective, device="cpu")
    return model, result


def by_hand(model: nn.Module, chosen: TrainSettings, seed: int = 0) -> nn.Module:
    """The same training as a script would write it."""
    images = DATA.splits["train"]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    rows = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 5e-4}]
    optimizer = torch.optim.SGD(rows, lr=0.1, momentum=0.9, nesterov=True)
    model.train()
    for epoch in range(chosen.epochs):
        order = permutation(images, seed, epoch)
        for step in range(3):
            rows = order[32 * step : 32 * (step + 1)]
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * rate_factor(epoch + (step + 0.5) / 3, chosen)
            logits = model(DATA.normalize(images.take(rows)))
            loss = F.cross_entropy(logits, torch.from_numpy(images.labels[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def test_a_function_is_no_objective():
    with pytest.raises(UsageError, match="the objective is a function"):
        trained(objective=lambda model, images, target: model(images).mean())


def test_equals_a_plain_script():
    ours, _ = trained(channels_last=False)
    wanted = by_hand(plain(), settings())
    for a, b in zip(ours.state_dict().values(), wanted.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


class InDict(nn.Module):
    """A network whose logits come second, in a dict, beside features of another shape."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": torch.relu(x), "logits": self.network(x)}


def test_logits_in_a_dict_are_trained_and_measured_like_bare_ones():
    bare, measured = trained(channels_last=False)
    inside, result = trained(InDict(plain()), channels_last=False)
    assert result.last_top1_pct == measured.last_top1_pct
    for a, b in zip(inside.state_dict().values(), bare.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("augment", [{}, {"crop_padding": 2, "flip": True}, {"mixup": 0.4}])
def test_shown_batches_are_those_that_training_shows(augment: dict[str, Any]):
    seen: list[Tensor] = []
    model = plain()
    model.register_forward_pre_hook(lambda _model, inputs: seen.append(inputs[0].clone()))
    _, result = trained(model, augment=AugmentSettings(**augment), epochs=1, seed=3)
    chosen = settings(augment=AugmentSettings(**augment))
    shown = [images for images, _ in shown_batches(DATA, chosen, 2, seed=3)]
    assert result.steps == 3
    assert len(shown) == 2
    assert all(torch.equal(a, b) for a, b in zip(shown, seen, strict=False))


def test_learns_and_says_how_well(tmp_path: Path):
    _, result = trained(epochs=8, folder=tmp_path)
    assert result.last_top1_pct == result.best_top1_pct == 100.0
    assert result.epochs == 8
    assert result.steps == 24
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(result.history)
    assert {"epoch", "step", "loss", "lr", "images_per_second"} <= set(lines[0])
    assert [row["epoch"] for row in lines if "validation_top1_pct" in row] == list(range(1, 9))


def test_same_seed_same_weights_other_seed_other_weights():
    augment = AugmentSettings(crop_padding=1, flip=True)
    first, again, other = (
        trained(plain(dropout=0.5), seed=seed, augment=augment)[0] for seed in (0, 0, 1)
    )
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_accumulating_parts_of_a_batch_gives_the_same_weights():
    whole, _ = trained(plain(norm=False), batch_size=30)
    parts, _ = trained(plain(norm=False), batch_size=30, accumulate=4)  # 8, 8, 7, 7 images
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "step", "one-cycle"])
def test_every_optimizer_and_schedule_lowers_the_loss(optimizer: str, schedule: str):
    lr = 0.1 if optimizer == "sgd" else 0.003
    _, result = trained(
        epochs=6, optimizer=optimizer, schedule=schedule, lr=lr, step_epochs=(4,), warmup_epochs=0.5
    )
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]


def test_weights_decay_but_biases_and_norms_do_not():
    class Zero(Objective):
        def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
            return sum((p * 0).sum() for p in model.parameters())  # no gradient but decay's

    before = plain()
    with torch.no_grad():
        before.norm1.bias.fill_(1.0)
    model, _ = trained(
        copy.deepcopy(before), objective=Zero(), schedule="constant", momentum=0.0, weight_decay=0.1
    )
    shrunk = (1 - 0.1 * 0.1) ** 6
    torch.testing.assert_close(model.conv1.weight, before.conv1.weight * shrunk)
    for name in ("norm1.weight", "norm1.bias", "linear.bias"):
        assert torch.equal(model.get_parameter(name), before.get_parameter(name))


def test_l1_pulls_weights_towards_zero_by_its_sign():
    before = plain()
    model, _ = trained(
        copy.deepcopy(before), epochs=1, data=dataset(32), l1=0.01, momentum=0.0, weight_decay=0.0,
        schedule="constant",
    )  # fmt: skip
    without, _ = trained(
        copy.deepcopy(before), epochs=1, data=dataset(32), momentum=0.0, weight_decay=0.0,
        schedule="constant",
    )  # fmt: skip
    expected = without.linear.weight - 0.1 * 0.01 * before.linear.weight.sign()
    torch.testing.assert_close(model.linear.weight, expected)
    torch.testing.assert_close(model.linear.bias, without.linear.bias)


def test_clipping_bounds_the_step():
    before = plain()
    model, _ = trained(
        copy.deepcopy(before), epochs=1, data=dataset(32), clip_norm=0.01, momentum=0.0,
        weight_decay=0.0, schedule="constant",
    )  # fmt: skip
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    moved = math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in pairs))
    assert moved == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_average_follows_its_definition():
    seen: list[Tensor] = []

    class Watching(CrossEntropy):
        def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
            seen.append(model.linear.bias.detach().clone())
            return super().__call__(model, images, target)

    start = plain().linear.bias.detach()
    averaged, _ = trained(ema=0.9, objective=Watching())
    plainly, _ = trained()
    after = [*seen[1:], plainly.linear.bias.detach()]
    mean = start
    for step, value in enumerate(after):
        decay = min(0.9, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * value
    torch.testing.assert_close(averaged.linear.bias.detach(), mean)


def test_best_weights_are_kept_on_request(tmp_path: Path):
    for folder in (None, tmp_path):
        model, result = trained(epochs=6, lr=0.5, keep="best", folder=folder)
        scores = [
            row["validation_top1_pct"] for row in result.history if "validation_top1_pct" in row
        ]
        assert result.best_top1_pct == max(scores)
        assert result.best_epoch == 1 + int(np.argmax(scores))
        right = 0
        model.eval()
        for images, target in DATA.batches("validation"):
            right += int((model(images).argmax(1) == target).sum())
        assert 100 * right / 48 == pytest.approx(result.best_top1_pct)


class Unlearn(CrossEntropy):
    """Takes away what the network knows."""

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        return -super().__call__(model, images, target)


@pytest.mark.parametrize("changes", [{}, {"ema": 0.5}])
def test_the_network_before_training_is_kept_where_every_epoch_left_it_worse(
    tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    start, known = trained(epochs=8)
    assert known.last_top1_pct == 100
    for folder in (None, tmp_path):
        model, result = trained(
            copy.deepcopy(start), keep="best", lr=5, objective=Unlearn(), folder=folder, **changes
        )
        assert same_weights(model, start)
        assert (result.best_epoch, result.best_top1_pct) == (0, 100.0)
        assert max(row.get("validation_top1_pct", 0.0) for row in result.history) < 100
        said = "every epoch left the network worse than it came (top-1 100.00 % on validation"
        assert said in result.notes[-1] and said in caplog.text
    objective = Unlearn()
    again, repeated = trained(
        plain(seed=5), keep="best", lr=5, objective=objective, folder=tmp_path, **changes
    )
    assert same_weights(again, start) and repeated.best_epoch == 0
    last, _ = trained(copy.deepcopy(start), objective=objective, **changes)
    assert not same_weights(last, start)


def test_a_training_that_only_equals_the_start_is_kept():
    start, _ = trained(epochs=8)
    model, result = trained(copy.deepcopy(start), keep="best", lr=1e-6)
    assert (result.best_epoch, result.best_top1_pct, result.notes) == (1, 100.0, ())
    assert not same_weights(model, start)


def test_patience_watches_the_epochs_and_not_the_start(monkeypatch: pytest.MonkeyPatch):
    scores = iter([90.0, 50.0, 60.0, 70.0, 65.0, 64.0, 63.0])
    monkeypatch.setattr(Training, "_score", lambda self: (next(scores), None))
    _, result = trained(epochs=6, patience=2, keep="best")
    assert (result.epochs, result.stopped_early, result.best_epoch) == (5, True, 0)


def test_stops_early_when_validation_no_longer_improves():
    _, result = trained(epochs=30, patience=2)
    assert result.stopped_early
    assert result.epochs == result.best_epoch + 2


def test_layers_before_the_named_one_keep_weights_and_statistics():
    before = plain()
    model, _ = trained(copy.deepcopy(before), freeze_until="conv2")
    state, old = model.state_dict(), before.state_dict()
    for name, value in state.items():
        frozen = name.startswith(("conv1", "norm1"))
        assert torch.equal(value, old[name]) == frozen, name
    assert all(p.requires_grad for p in model.parameters())


def test_layer_rates_scale_what_a_layer_moves():
    before = plain()
    options: dict[str, Any] = {
        "epochs": 1, "data": dataset(32), "momentum": 0.0, "weight_decay": 0.0,
    }  # fmt: skip
    slow, _ = trained(copy.deepcopy(before), layer_lr={"conv1": 0.25}, **options)
    usual, _ = trained(copy.deepcopy(before), **options)
    ratio = (slow.conv1.weight - before.conv1.weight) / (usual.conv1.weight - before.conv1.weight)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.25), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(slow.linear.weight, usual.linear.weight)


def test_mixing_and_smoothing_train_on_soft_targets():
    augment = AugmentSettings(mixup=0.2, cutmix=1.0, erasing=0.2)
    _, result = trained(epochs=10, augment=augment, label_smoothing=0.1)
    assert result.last_top1_pct > 80


def test_fixed_augmentation_shows_an_image_the_same_way_in_every_epoch():
    chosen = settings(augment=AugmentSettings(crop_padding=2, fixed=True))

    def by_image(epoch: int) -> dict[int, Tensor]:
        return {
            int(index): row
            for batch in train_batches(DATA, chosen, epoch, 0)
            for index, row in zip(batch.index, batch.chances, strict=True)
        }

    first, second = by_image(0), by_image(1)
    assert list(first) != list(second)  # another order
    for index, row in first.items():
        assert torch.equal(row, second[index])


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_a_step_without_gaps_or_repetitions(world: int):
    chosen = settings(augment=AugmentSettings(flip=True))
    alone = list(train_batches(DATA, chosen, 0, 0))
    shared = [list(train_batches(DATA, chosen, 0, 0, rank=r, world=world)) for r in range(world)]
    for step, whole in enumerate(alone):
        parts = [rank[step] for rank in shared]
        assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
        assert torch.equal(torch.cat([part.chances for part in parts]), whole.chances)
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


@dataclass(frozen=True)
class Decoding(MemoryImages):
    """Images that ask for processes to decode them."""

    workers: int = 2


def test_images_decoded_by_other_processes_come_in_the_same_order():
    plainly = DATA.splits["train"]
    decoded = replace(
        DATA, splits={"train": Subset(Decoding(plainly.pixels, plainly.labels), np.arange(90))}
    )
    alone = replace(DATA, splits={"train": Subset(plainly, np.arange(90))})
    pairs = zip(
        train_batches(decoded, settings(), 1, 0), train_batches(alone, settings(), 1, 0),
        strict=True,
    )  # fmt: skip
    for batch, expected in pairs:
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.target, expected.target)


@pytest.mark.slow
def test_a_compiled_network_learns_the_same():
    compiled, _ = trained(compile=True)
    plainly, _ = trained()
    for a, b in zip(compiled.parameters(), plainly.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert not any("_orig_mod" in name for name in compiled.state_dict())


def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32():
    seen: list[torch.dtype] = []
    model = plain()
    handle = model.conv2.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    _, result = trained(model, precision="bf16")
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert result.precision == "bf16"
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_leaves_modes_hooks_gradients_layout_and_random_state_as_found():
    model = plain()
    model.norm1.eval()
    model.conv1.weight.requires_grad_(False)
    before = torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    flags = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    trained(model, deterministic=True, augment=AugmentSettings(randaugment=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == flags
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert all(p.is_contiguous() for p in model.parameters())


def test_leaves_everything_as_found_after_an_error_too():
    model = plain().eval()
    closed = []

    class Failing(CrossEntropy):
        def __call__(self, *args: Any) -> Tensor:
            raise ZeroDivisionError

        def close(self) -> None:
            closed.append(True)

    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        trained(model, objective=Failing())
    assert closed == [True]
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(m.training for m in model.modules())


def test_no_epochs_leave_the_weights_alone():
    model, result = trained(epochs=0)
    assert same_weights(model, plain())
    assert result.history == ()
    assert result.last_top1_pct is None


def test_auxiliary_heads_count_a_little():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    model, x, target = Two(), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    expected = F.cross_entropy(model.a(x), target) + 0.3 * F.cross_entropy(model.b(x), target)
    torch.testing.assert_close(CrossEntropy()(model, x, target), expected)


# -- bad input -----------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_with_step_and_rate_and_keeps_the_last_checkpoint(
    tmp_path: Path,
):
    class Breaking(CrossEntropy):
        calls = 0

        def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
            Breaking.calls += 1
            bad = math.nan if Breaking.calls == 5 else 1.0
            return bad * super().__call__(model, images, target)

    with pytest.raises(TrainingError) as caught:
        trained(epochs=3, objective=Breaking(), folder=tmp_path)
    text = str(caught.value)
    assert "train: the loss became nan at step 5, learning rate 0.05" in text
    assert f"The last good checkpoint is {tmp_path}/last.pt" in text
    assert "Try a lower rate: lr: 0.033" in text
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["epoch"] == 1
    assert all(torch.isfinite(v).all() for v in state["model"].values())


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path):
    trained(folder=tmp_path)
    with pytest.raises(TrainingError, match=r"belongs to another training \(lr: 0.1 there, 0.2"):
        trained(folder=tmp_path, lr=0.2)
    with pytest.raises(TrainingError, match="network: "):
        trained(plain(width=6), folder=tmp_path)
    with pytest.raises(TrainingError, match=r"data: 'pictures 96 0' there, 'pictures 96 1' here"):
        trained(folder=tmp_path, data=dataset(seed=1))


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path):
    trained(folder=tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save({**state, "version": 99}, tmp_path / "last.pt")
    with pytest.raises(TrainingError, match=r"checkpoint of version 99. Expected version 1"):
        trained(folder=tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(TrainingError, match=r"last.pt: cannot be read as a checkpoint"):
        trained(folder=tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path):
    class Evil:
        def __reduce__(self) -> Any:
            return print, ("run",)

    torch.save({"version": 1, "x": Evil()}, tmp_path / "last.pt")
    with pytest.raises(TrainingError, match="cannot be read as a checkpoint"):
        trained(folder=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_until": "conv3"}, r"freeze_until: no such layer 'conv3'. Did you mean 'conv"),
        ({"layer_lr": {"lineer": 0.1}}, r"layer_lr: no such layer 'lineer'. Did you mean 'linear'"),
    ],
)
def test_a_layer_that_is_not_there_is_named_with_its_neighbours(
    changes: dict[str, Any], message: str
):
    with pytest.raises(UnknownNameError, match=message):
        trained(**changes)


@pytest.mark.parametrize("changes", [{"keep": "best"}, {"patience": 2}])
def test_choosing_a_checkpoint_needs_validation_images(changes: dict[str, Any]):
    with pytest.raises(UsageError, match=r"no images are held back .* data.validation: 0.1"):
        trained(data=dataset(validation=0), **changes)


def test_processes_that_resume_from_different_places_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from compress.train.distributed import Processes

    monkeypatch.setattr(Processes, "sum", lambda self, values: values + 3)  # the other's steps
    with pytest.raises(TrainingError, match="checkpoint of step 0, another process found a diff"):
        trained(folder=tmp_path)


def test_nothing_left_to_train_is_an_error():
    model = plain().requires_grad_(False)
    with pytest.raises(UsageError, match="no parameter is left to train"):
        trained(model)


class Hungry(CrossEntropy):
    """Runs out of memory for more than eight images at once."""

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        if len(images) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().__call__(model, images, target)


def test_running_out_of_memory_says_what_to_set():
    with pytest.raises(TrainingError) as caught:
        trained(objective=Hungry())
    text = str(caught.value)
    assert "train: out of memory at step 1, 32 images in 1 part" in text
    assert "Set accumulate: 2" in text
    assert "halve_batch: true" in text


def test_on_request_batches_are_computed_in_more_parts_with_the_same_result(
    caplog: pytest.LogCaptureFixture,
):
    with caplog.at_level(logging.WARNING):
        halved, result = trained(plain(norm=False), objective=Hungry(), halve_batch=True)
    parts, _ = trained(plain(norm=False), accumulate=4)
    assert same_weights(halved, parts)
    assert result.notes[-1].endswith("batches of 32 images are now computed in 4 parts")
    assert "out of memory at step 1" in caplog.text


def test_validation_computes_no_more_images_at_once_than_training():
    model, seen = plain(), []
    model.register_forward_hook(
        lambda module, inputs, _: None if module.training else seen.append(len(inputs[0]))
    )
    trained(model, accumulate=4)
    assert max(seen) == 8
    assert sum(seen) == 2 * 48


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_of_cpus_runs_out_in_other_words(error: Exception):
    class Failing(CrossEntropy):
        def __call__(self, *args: Any) -> Tensor:
            raise error

    with pytest.raises(TrainingError, match="out of memory"):
        trained(objective=Failing())


def test_other_runtime_errors_are_not_taken_for_memory():
    class Failing(CrossEntropy):
        def __call__(self, *args: Any) -> Tensor:
            raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        trained(objective=Failing(), halve_batch=True)


def test_fewer_images_than_processes_are_refused():
    with pytest.raises(TrainingError, match="2 images in a step cannot be shared by 3 processes"):
        next(iter(train_batches(DATA, settings(batch_size=2), 0, 0, world=3)))


# -- resuming ------------------------------------------------------------------------------------


class StoppedError(Exception):
    """Stands for whatever ends a process."""


class StopsAt(CrossEntropy):
    """Ends the training when it has been called so often."""

    def __init__(self, call: int) -> None:
        super().__init__()
        object.__setattr__(self, "left", call)

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        object.__setattr__(self, "left", self.left - 1)
        if self.left < 0:
            raise StoppedError
        return super().__call__(model, images, target)


EVERYTHING: dict[str, Any] = {
    "epochs": 3,
    "ema": 0.9,
    "optimizer": "adamw",
    "lr": 0.01,
    "warmup_epochs": 0.5,
    "augment": AugmentSettings(crop_padding=1, flip=True, mixup=0.2),
    "checkpoint_minutes": 0.0,
}


@pytest.mark.parametrize("call", [1, 4, 7, 11])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_that_ended_anywhere_goes_on_to_the_same_weights(
    tmp_path: Path, call: int, optimizer: str
):
    options = {**EVERYTHING, "optimizer": optimizer, "data": dataset(128)}
    whole, result = trained(plain(dropout=0.3), objective=StopsAt(99), **options)
    with pytest.raises(StoppedError):
        trained(plain(dropout=0.3), folder=tmp_path, objective=StopsAt(call), **options)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["history"][-1]["step"] == call
    resumed, again = trained(
        plain(seed=99, dropout=0.3), folder=tmp_path, objective=StopsAt(99), **options
    )
    assert same_weights(whole, resumed)
    assert timeless(result) == timeless(again)


def timeless(result: TrainResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in result.history]


def test_a_finished_training_is_not_repeated(tmp_path: Path):
    first, result = trained(folder=tmp_path)
    again, repeated = trained(plain(seed=5), folder=tmp_path)
    assert same_weights(first, again)
    assert repeated.history == result.history


def test_only_whole_files_are_left_behind(tmp_path: Path):
    trained(folder=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt", "metrics.jsonl"]


# -- trackers ------------------------------------------------------------------------------------


def test_tensorboard_gets_the_rows(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, result = trained(folder=tmp_path, track="tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx([row["loss"] for row in result.history])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's database library
def test_mlflow_gets_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    _, result = trained(folder=tmp_path / "run", track="mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("compress")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    losses = [point.value for point in client.get_metric_history(run.info.run_id, "loss")]
    assert losses == pytest.approx([row["loss"] for row in result.history])


def test_an_absent_tracker_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    from compress import packages
    from compress.errors import MissingPackageError

    monkeypatch.setattr(packages, "is_installed", lambda name: False)
    with pytest.raises(
        MissingPackageError, match=r"track: mlflow needs .* pip install 'compress-cnn\[tr"
    ):
        trained(track="mlflow")


def test_the_batch_size_shrinks_to_a_small_data_set():
    _, result = trained(data=dataset(12), epochs=1)
    assert result.steps == 1


def test_a_loss_in_which_processes_meet_excludes_repeated_steps():
    from compress.recipe.settings import DistillSettings
    from compress.train import loop
    from compress.train.distill import build_objective
    from compress.train.distributed import Processes

    settings = DistillSettings(losses=("kd", "crd"), halve_batch=True)
    objective = build_objective(plain(), plain(), dataset(), settings)
    with pytest.raises(
        UsageError, match="halve_batch: with crd, the processes synchronize within a step"
    ):
        loop._check_repeatable(objective, settings, Processes(torch.device("cpu"), 0, 2))
    loop._check_repeatable(objective, settings, Processes(torch.device("cpu")))


def conv_and_norm(*widths: int) -> nn.Module:
    layers = [
        layer
        for taken, given in itertools.pairwise((3, *widths))
        for layer in (nn.Conv2d(taken, given, 3, padding=1), nn.BatchNorm2d(given), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3))


@pytest.mark.parametrize(
    ("widths", "options", "wanted"),
    [
        ((16, 32), {}, torch.channels_last),
        ((13, 27, 64), {}, torch.contiguous_format),
        ((13, 64, 128), {}, torch.channels_last),
        ((100, 200), {}, torch.channels_last),
        ((13, 27, 64), {"compile": True}, torch.channels_last),
        ((13, 27, 64), {"channels_last": False}, torch.preserve_format),
    ],
)
def test_few_channels_train_in_nchw_on_a_cpu(
    widths: tuple[int, ...], options: dict[str, Any], wanted: torch.memory_format
):
    model = conv_and_norm(*widths)
    assert fastest_format(model, settings(**options), torch.device("cpu")) is wanted
    assert fastest_format(model, settings(), torch.device("cuda")) is torch.channels_last


def test_strided_1x1_convolutions_of_few_channels_train_in_nchw_on_a_cpu():
    """oneDNN overwrites memory in their gradients, if in channels last: the process ended."""
    stems = {
        stem: nn.Sequential(nn.Conv2d(stem[0], 64, stem[1], stem[2]), nn.BatchNorm2d(64))
        for stem in ((3, 1, 2), (6, 1, 4), (3, 1, 1), (3, 3, 2), (16, 1, 2))
    }
    cpu = torch.device("cpu")
    in_nchw = {
        stem
        for stem, model in stems.items()
        if fastest_format(model, settings(), cpu) is torch.contiguous_format
    }
    assert in_nchw == {(3, 1, 2), (6, 1, 4)}
    compiled = fastest_format(stems[3, 1, 2], settings(compile=True), cpu)
    assert compiled is torch.contiguous_format


@pytest.mark.parametrize("widths", [(16, 32), (13, 27)])
def test_images_and_weights_are_laid_out_alike(widths: tuple[int, ...]):
    seen: list[bool] = []
    model = conv_and_norm(*widths)
    model.register_forward_pre_hook(
        lambda model, images: seen.extend(
            value.is_contiguous(memory_format=torch.channels_last)
            for value in (images[0], model[3].weight)
            if model.training
        )
    )
    trained(model, epochs=1)
    assert set(seen) == {widths[0] == 16}
