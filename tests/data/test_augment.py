from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional  # noqa: TID253  # the oracle

from compress.data._augment import (
    CHANCES,
    Chance,
    augment,
    cropped,
    erased,
    half_mirrored,
    is_random,
    mixed,
    randaugmented,
    turned,
)
from compress.recipe.settings import AugmentSettings


def images(count: int = 6, height: int = 8, width: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def chances(count: int = 6, **columns: float) -> torch.Tensor:
    rows = torch.rand((count, CHANCES), generator=torch.Generator().manual_seed(5))
    for name, value in columns.items():
        rows[:, Chance[name]] = value
    return rows


def test_crop_equals_torchvisions_pad_and_crop_at_the_same_offsets():
    x, rows = images(), chances()
    out = cropped(x, rows, 2)
    padded = functional.pad(x, [2, 2])
    for i, image in enumerate(padded):
        top, left = int(rows[i, Chance.CROP_Y] * 5), int(rows[i, Chance.CROP_X] * 5)
        assert torch.equal(out[i], functional.crop(image, top, left, 8, 10))


def test_every_offset_of_a_crop_is_equally_likely():
    rows = torch.rand((20_000, CHANCES), generator=torch.Generator().manual_seed(1))
    offsets = (rows[:, Chance.CROP_Y] * 5).long().bincount(minlength=5)
    assert offsets.min() > 0.95 * 4000
    assert offsets.max() < 1.05 * 4000


def test_flip_mirrors_the_chosen_images_and_no_others():
    x, rows = images(), chances()
    out = half_mirrored(x, rows)
    for i in range(len(x)):
        mirrored = bool(rows[i, Chance.FLIP] < 0.5)
        assert torch.equal(out[i], functional.horizontal_flip(x[i]) if mirrored else x[i])


@pytest.mark.parametrize("degrees", [0.0, 30.0, 90.0])
def test_rotation_equals_torchvisions(degrees: float):
    x = images(2, 9, 9)
    out = turned(x, chances(2, ANGLE=1.0, ZOOM=0.0), degrees, (1.0, 1.0))
    wanted = functional.rotate(
        x.float(), degrees, interpolation=functional.InterpolationMode.BILINEAR
    )
    torch.testing.assert_close(out, wanted, atol=0.6, rtol=0)


def test_zoom_equals_torchvisions_affine():
    x = images(2, 9, 9)
    out = turned(x, chances(2, ANGLE=0.5, ZOOM=1.0), 0.0, (0.5, 1.5))
    wanted = functional.affine(
        x.float(), 0.0, [0, 0], 1.5, [0.0, 0.0],
        interpolation=functional.InterpolationMode.BILINEAR,
    )  # fmt: skip
    torch.testing.assert_close(out, wanted, atol=0.6, rtol=0)


def test_erasing_leaves_one_rectangle_of_zeros_of_the_wanted_area():
    x = torch.ones(200, 3, 32, 32)
    rows = torch.rand((200, CHANCES), generator=torch.Generator().manual_seed(2))
    out = erased(x, rows, 0.5)
    gone = (out == 0).all(1)
    touched = gone.flatten(1).any(1)
    assert torch.equal(touched, rows[:, Chance.ERASE] < 0.5)
    for mask in gone[touched]:
        ys, xs = mask.nonzero(as_tuple=True)
        box = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        assert box.all()
    shares = gone[touched].float().mean((1, 2))
    assert shares.min() > 0.01
    assert shares.max() < 0.36


def test_randaugment_is_a_function_of_its_chances_and_leaves_the_random_state():
    x, rows = images(), chances()
    before = torch.get_rng_state()
    out = randaugmented(x, rows, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(out, randaugmented(x, rows, 2))
    assert out.dtype == torch.uint8
    assert not torch.equal(out, x)


def test_mixup_blends_neighbours_and_their_targets_with_one_share():
    x = torch.rand(5, 3, 4, 4)
    target = torch.tensor([0, 1, 2, 0, 1])
    out, soft = mixed(x, target, chances(5), AugmentSettings(mixup=0.4), 3)
    share = soft[0, 0]
    torch.testing.assert_close(out[0], share * x[0] + (1 - share) * x[1])
    torch.testing.assert_close(out[1], share * x[1] + (1 - share) * x[0])
    torch.testing.assert_close(out[4], x[4])  # alone
    torch.testing.assert_close(soft.sum(1), torch.ones(5))
    assert soft[1, 1] == share


def test_several_classes_of_an_image_are_mixed_as_one_is():
    x, target = torch.rand(5, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    for settings in (AugmentSettings(mixup=0.4), AugmentSettings(cutmix=1.0)):
        out, soft = mixed(x, target, chances(5), settings, 3)
        again, several = mixed(x, torch.eye(3)[target], chances(5), settings, 3)
        assert torch.equal(out, again) and torch.equal(soft, several)


def test_cutmix_takes_targets_in_proportion_to_pixels():
    x = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 16, 16)
    out, soft = mixed(x, torch.tensor([0, 1]), chances(2), AugmentSettings(cutmix=1.0), 2)
    torch.testing.assert_close(out[0].mean(), soft[0, 1])
    assert 0 < out[0].mean() < 1


def test_shares_of_mixup_follow_the_beta_distribution():
    rows = torch.rand((4000, CHANCES), generator=torch.Generator().manual_seed(2))
    x, target = torch.zeros(4000, 1, 1, 1), torch.arange(4000) % 2
    _, soft = mixed(x, target, rows, AugmentSettings(mixup=0.2), 2)
    share = soft[::2, 0]
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1))
    assert abs(float(share.mean()) - 0.5) < 0.03
    assert abs(float(share.var()) - 1 / (4 * 1.4)) < 0.01


def test_mixup_and_cutmix_together_give_either_to_each_pair():
    x, target = torch.rand(64, 3, 8, 8), torch.arange(64) % 2
    rows = torch.rand((64, CHANCES), generator=torch.Generator().manual_seed(4))
    settings = AugmentSettings(mixup=1.0, cutmix=1.0)
    out, _ = mixed(x, target, rows, settings, 2)
    cut = rows[::2, Chance.MIX_KIND] < 0.5
    pasted = [bool(((out[i] == x[i]) | (out[i] == x[i + 1])).all()) for i in range(0, 64, 2)]
    assert pasted == cut.tolist()


def test_without_settings_images_are_only_normalized():
    x = images()
    out = augment(x, chances(), AugmentSettings(), lambda y: y.float() / 255)
    assert torch.equal(out, x.float() / 255)


def test_one_image_does_not_depend_on_the_others_of_its_batch():
    x, rows = images(), chances()
    settings = AugmentSettings(
        crop_padding=2, flip=True, randaugment=1, rotation_degrees=10, scale=(0.9, 1.1), erasing=0.5
    )
    whole = augment(x, rows, settings, lambda y: y.float())
    single = torch.cat(
        [augment(x[i : i + 1], rows[i : i + 1], settings, lambda y: y.float()) for i in range(6)]
    )
    np.testing.assert_allclose(whole.numpy(), single.numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (AugmentSettings(), False),
        (AugmentSettings(flip=True), True),
        (AugmentSettings(flip=True, fixed=True), False),
        (AugmentSettings(mixup=0.1, fixed=True), True),
    ],
)
def test_what_counts_as_random(settings: AugmentSettings, expected: bool):
    assert is_random(settings) is expected
