"""Data made from other data: pictures made worse, their codes, classes held back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data import load_data, targets_of
from compress.data._augment import CHANCES, Chance, augment_with_labels
from compress.errors import CompressError, UsageError
from compress.recipe.settings import AugmentSettings, DataSettings


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for n in range(24):
        small = Image.fromarray(random.integers(0, 256, (5, 5, 3)).astype(np.uint8))
        small.resize((30, 24), Image.Resampling.BICUBIC).save(root / f"{n:02d}.png")
    return root


def load(name: str, **options: object):
    return load_data(DataSettings(name=name, calibration=8, **options))


def test_the_input_is_the_target_made_smaller(root: Path) -> None:
    dataset = load("degraded", root=str(root), image_size=[8, 10], options={"scale": 2})
    images, targets = next(dataset.batches("test", 4))
    assert images.shape == (4, 3, 8, 10) and targets.shape == (4, 3, 16, 20)
    picture = Image.fromarray((255 * targets[0]).round().byte().permute(1, 2, 0).numpy())
    smaller = np.asarray(picture.resize((10, 8), Image.Resampling.BICUBIC))  # an oracle
    assert np.abs(255 * images[0].permute(1, 2, 0).numpy() - smaller).max() <= 1.01
    assert dataset.target == "image" and dataset.mean == (0,) * 3 and dataset.std == (1,) * 3


def test_noise_is_the_same_each_time_and_as_strong_as_told(root: Path) -> None:
    clean = load("degraded", root=str(root), image_size=24, options={"scale": 1, "noise": 1e-9})
    noisy = load("degraded", root=str(root), image_size=24, options={"scale": 1, "noise": 5})
    once, again = (load("degraded", root=str(root), image_size=24,
                        options={"scale": 1, "noise": 5}) for _ in range(2))  # fmt: skip
    assert torch.equal(once.splits["test"].take([1]), again.splits["test"].take([1]))
    assert torch.equal(noisy.splits["test"].take([2, 1])[1:], once.splits["test"].take([1]))
    both = [each.splits["train"].take(range(8)).float() for each in (clean, noisy)]
    middle = (both[0] > 20) & (both[0] < 235)  # where nothing is cut off
    assert (both[1] - both[0])[middle].std() == pytest.approx(5, rel=0.1)


def test_codes_have_a_variance_of_one_and_bring_the_picture_back(root: Path) -> None:
    dataset = load("codes", options={"of": "digits", "size": 24})
    codes = torch.cat([each for each, _ in dataset.batches("train")])[:, :, 0, 0]
    assert codes.shape[1] == 24
    assert torch.allclose(codes.var(0), torch.ones(24), atol=0.2)
    pictures = torch.cat([each for _, each in dataset.batches("train")]).flatten(1)
    known = torch.cat([codes, torch.ones(len(codes), 1)], 1)
    fitted = known @ torch.linalg.lstsq(known, pictures).solution
    error = (fitted - pictures).square().mean() / pictures.var(0).mean()
    assert error < 0.1  # what 24 of 64 components leave out


def test_test_classes_are_not_learned(root: Path) -> None:
    dataset = load("unseen", options={"of": "digits", "held_back": ["3", "8"]})
    assert set(dataset.splits["test"].labels) == {3, 8}
    for name in ("train", "validation", "calibration"):
        assert set(dataset.splits[name].labels) <= {0, 1, 2, 4, 5, 6, 7, 9}


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("degraded", {"options": {"scale": 1}}, "leave pictures as they are"),
        ("degraded", {"root": None}, "needs to know where its images are"),
        ("degraded", {"options": {"of": "imges"}}, "Did you mean 'images'"),
        ("codes", {"options": {"size": 500}}, "expected 1 to 17"),
        ("unseen", {"options": {"of": "digits", "held_back": ["3"]}}, "names 1 of 10 classes"),
        ("unseen", {"options": {"of": "digits", "held_back": ["3", "x"]}}, "held_back names 'x'"),
        ("unseen", {"options": {"of": "images", "held_back": ["3", "4"]}}, "held_back names '3'"),
    ],
)
def test_what_cannot_be_made_is_refused_in_words(root, name, options, said) -> None:
    with pytest.raises(CompressError, match=f"(?i){said}"):
        load(name, **({"root": str(root), "image_size": 12} | options))


def test_sides_that_cannot_be_divided_are_refused(root: Path) -> None:
    with pytest.raises(CompressError, match="cannot be made 3 times smaller"):
        load("degraded", options={"of": "digits", "scale": 3})


def test_a_crop_moves_the_picture_to_restore_as_much_further(root: Path) -> None:
    dataset = load("degraded", root=str(root), image_size=[8, 10], options={"scale": 2})
    index = np.arange(4)
    images, targets = (
        dataset.splits["train"].take(index),
        targets_of(dataset.splits["train"], index),
    )
    draws = torch.rand(4, CHANCES, generator=torch.Generator().manual_seed(0))
    draws[:, Chance.CROP_Y], draws[:, Chance.CROP_X] = 0.9, 0.1
    settings = AugmentSettings(crop_padding=2)
    moved, wanted = augment_with_labels(images, targets, draws, settings, torch.Tensor.float)
    assert torch.equal(wanted[:, :, :12, 4:], targets[:, :, 4:, :16])
    assert torch.equal(moved[:, :, :6, 2:], images.float()[:, :, 2:, :8])


def test_codes_cannot_be_changed_at_random() -> None:
    dataset = load("codes", options={"of": "digits", "size": 8})
    index = np.arange(4)
    images, targets = (
        dataset.splits["train"].take(index),
        targets_of(dataset.splits["train"], index),
    )
    with pytest.raises(UsageError, match="cannot be changed alike"):
        augment_with_labels(
            images, targets, torch.rand(4, CHANCES), AugmentSettings(flip=True), torch.Tensor.float
        )


def test_seeds_in_an_array_are_what_a_generator_takes(tmp_path: Path) -> None:
    seeds = np.random.default_rng(0).normal(size=(12, 32, 1, 1)).astype(np.float32)
    np.save(tmp_path / "seeds.npy", seeds)
    dataset = load("npz", root=str(tmp_path / "seeds.npy"))
    images, _ = next(dataset.batches("test", 1))
    assert dataset.target == "none" and torch.allclose(images[0], torch.from_numpy(seeds[3]))
