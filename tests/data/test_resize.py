"""Pictures are fitted to the input as torchvision's own transforms do it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2  # noqa: TID253  # the oracle

from compress.data._pictures import PADDING, Fit
from compress.errors import UsageError


def picture(height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(height * width).integers(0, 256, (height, width, 3))
    return Image.fromarray(noise.astype(np.uint8))


@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (64, 64), (20, 31), (301, 200)])
@pytest.mark.parametrize(("resize", "size"), [(256, 224), (232, 224), (48, 47), (64, 64)])
def test_short_side_is_torchvisions_resize_and_centre_crop(
    shape: tuple[int, int], resize: int, size: int
) -> None:
    image = picture(*shape)
    want = v2.Compose([v2.Resize(resize), v2.CenterCrop(size), v2.PILToTensor()])(image)
    got = Fit((size, size), crop=size / resize).pixels(image)
    assert torch.equal(got, want)


def test_the_default_keeps_224_of_256() -> None:
    image = picture(300, 400)
    want = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])(image)
    assert torch.equal(Fit((224, 224)).pixels(image), want)


@pytest.mark.parametrize("filter_", ["bilinear", "bicubic", "nearest"])
def test_squash_is_torchvisions_resize_to_both_sides(filter_: str) -> None:
    image = picture(90, 61)
    mode = v2.InterpolationMode(filter_)
    want = v2.Compose([v2.Resize((40, 72), interpolation=mode), v2.PILToTensor()])(image)
    got = Fit((40, 72), "squash", filter_).pixels(image)  # type: ignore[arg-type]
    assert torch.equal(got, want)


@pytest.mark.parametrize(("shape", "size"), [((40, 80), (64, 64)), ((80, 40), (48, 96))])
def test_letterbox_shows_the_whole_picture_and_fills_with_grey(
    shape: tuple[int, int], size: tuple[int, int]
) -> None:
    got = Fit(size, "letterbox").pixels(Image.new("RGB", (shape[1], shape[0]), (250, 0, 0)))
    red = np.argwhere(got[0].numpy() == 250)
    scale = min(size[0] / shape[0], size[1] / shape[1])
    height, width = red.max(0) - red.min(0) + 1
    assert (height, width) == (shape[0] * scale, shape[1] * scale)
    assert set(np.unique(got[1].numpy())) == {0, PADDING}
    assert abs(red.min(0) - (np.array(size) - 1 - red.max(0))).max() <= 1  # in the middle


def test_rectangles_are_covered_whatever_their_proportions() -> None:
    for shape in ((100, 30), (30, 100)):
        assert Fit((24, 32)).pixels(Image.new("RGB", shape[::-1], (9, 9, 9))).eq(9).all()


@pytest.mark.parametrize("rule", ["short side", "squash", "letterbox"])
def test_points_of_the_picture_lie_where_the_placement_says(rule: str) -> None:
    fit = Fit((60, 90), rule)  # type: ignore[arg-type]
    image = Image.new("RGB", (200, 100))
    image.paste((255, 255, 255), (98, 40, 118, 60))  # its centre: x 108, y 50
    bright = np.argwhere(fit.pixels(image)[0].numpy() > 128)
    place = fit.place(100, 200)
    y, x = bright.mean(0) + 0.5
    assert x == pytest.approx(108 * place.scale[1] + place.left, abs=0.6)
    assert y == pytest.approx(50 * place.scale[0] + place.top, abs=0.6)


@pytest.mark.parametrize("rule", ["short side", "squash", "letterbox"])
def test_arrays_are_fitted_as_pictures_are(rule: str) -> None:
    image = picture(45, 70)
    fit = Fit((32, 40), rule)  # type: ignore[arg-type]
    array = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    assert (fit.tensor(array)[0].int() - fit.pixels(image).int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rule": "stretch"}, "no resize 'stretch'"),
        ({"interpolation": "cubic"}, "no interpolation 'cubic'"),
        ({"crop": 1.5}, "crop 1.5"),
        ({"crop": 0.0}, "crop 0"),
        ({"rule": "letterbox", "crop": 0.9}, "letterbox"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Fit((8, 8), **given)  # type: ignore[arg-type]
