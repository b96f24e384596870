"""Pictures of every mode are read as they are meant, or refused by name."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from compress.data._annotated import image_size
from compress.data._images import decoded
from compress.data._pictures import MOST_PIXELS, Fit, opened_picture, to_8_bit, upright_size
from compress.data._targets import mask_values
from compress.errors import DataError

RAMP = np.linspace(0, 1, 64).reshape(8, 8)  # black to white


def read(path: Path, channels: int = 3) -> np.ndarray[Any, Any]:
    """Return (H, W, C)."""
    with opened_picture(path, where=str(path)) as image:
        return np.asarray(to_8_bit(image, channels, where=str(path)))


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bits_are_scaled_not_cut(tmp_path: Path, suffix: str) -> None:
    values = np.round(RAMP * 65535).astype(np.uint16)
    found = read(saved(tmp_path / f"x.{suffix}", Image.fromarray(values)), 1)
    np.testing.assert_allclose(found, RAMP * 255, atol=1)


def test_floats_from_0_to_1_are_scaled(tmp_path: Path) -> None:
    found = read(saved(tmp_path / "x.tiff", Image.fromarray(RAMP.astype(np.float32))), 1)
    np.testing.assert_allclose(found, RAMP * 255, atol=0.51)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((RAMP * 1e6).astype(np.int32), "32-bit integers from 0 to 1e\\+06"),
        ((RAMP * 255).astype(np.float32), "floating-point values from 0 to 255"),
        (np.full((8, 8), np.nan, np.float32), "floating-point values from nan"),
        ((-RAMP).astype(np.float32), "floating-point values from -1"),
    ],
    ids=["int32", "beyond 1", "nan", "negative"],
)
def test_numbers_without_a_known_white_are_refused_by_name(
    tmp_path: Path, values: Any, told: str
) -> None:
    path = saved(tmp_path / "x.tiff", Image.fromarray(values))
    with pytest.raises(DataError, match=rf"x\.tiff: holds {told}.*which is white is not known"):
        read(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpeg", "png", "tiff", "webp"])
def test_photos_stand_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    """What a viewer shows is the oracle: Pillow's own transposition, undone when it is written."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # white at the top left
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose
    image = Image.fromarray(upright)
    if orientation > 1:
        image = image.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"x.{suffix}", image, exif=exif)
    found = read(path)
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 6  # lossy
    with opened_picture(path, where="") as unread:
        assert upright_size(unread) == (32, 16) == image_size(path)


def test_a_mask_stands_upright_like_its_image(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.uint8).reshape(2, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    path = saved(tmp_path / "x.png", Image.fromarray(np.rot90(values)), exif=exif)
    np.testing.assert_array_equal(mask_values(path), values)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_is_shown_on_white(tmp_path: Path, mode: str) -> None:
    options: dict[str, Any] = {}
    if mode in {"RGBA", "LA"}:
        image = Image.new(mode, (4, 4), (0,) * len(mode))  # black, and not there
        image.paste((9,) * (len(mode) - 1) + (255,), (0, 0, 2, 4))
    else:
        image = Image.new(mode, (4, 4), 0)
        image.paste((9,) * 3 if mode == "RGB" else 9, (0, 0, 2, 4))
        if mode == "P":
            image.putpalette([0, 0, 0] * 9 + [9, 9, 9])
        options["transparency"] = (0, 0, 0) if mode == "RGB" else 0
    found = read(saved(tmp_path / "x.png", image, **options))
    assert (found[:, :2] == 9).all()
    assert (found[:, 2:] == 255).all()


def test_a_palette_is_looked_up_and_one_bit_is_black_and_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert read(saved(tmp_path / "x.gif", image))[0, 0].tolist() == [200, 100, 50]
    one = Image.new("1", (4, 4), 1)
    assert (read(saved(tmp_path / "x.png", one)) == 255).all()


def test_inks_are_converted_by_their_profile(tmp_path: Path) -> None:
    inks = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    plain = read(saved(tmp_path / "plain.tiff", inks))
    assert plain[0, 0].tolist() == [0, 255, 255]
    path = saved(tmp_path / "damaged.tiff", inks, icc_profile=b"no profile at all")
    with pytest.raises(DataError, match=r"damaged\.tiff: is not a readable image"):
        read(path)


def test_a_profile_that_is_not_for_inks_is_refused(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path / "x.tiff", Image.new("CMYK", (4, 4)), icc_profile=profile)
    with pytest.raises(DataError, match="is not a readable image"):
        read(path)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_several_frames_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), (k, 0, 0)) for k in (0, 90, 200)]
    path = saved(tmp_path / f"x.{suffix}", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=r"holds 3 frames or pages.*Expected one picture"):
        read(path)


def test_a_phones_photo_with_a_preview_behind_it_is_its_photo(tmp_path: Path) -> None:
    photo, preview = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (4, 4))
    path = saved(tmp_path / "x.jpg", photo, format="MPO", save_all=True, append_images=[preview])
    assert abs(int(read(path)[0, 0, 0]) - 200) < 4


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        Image.new("1", (13000, 13000)).save(path)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    begun = time.perf_counter()
    with pytest.raises(DataError, match=r"169000000 pixels|13000 x 13000 pixels"):
        decoded(path, Fit((8, 8), "squash"), 3, where=str(path))
    assert time.perf_counter() - begun < 1
    assert MOST_PIXELS < 13000**2


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(DataError, match="is no file"):
        decoded(tmp_path / "x.png", Fit((8, 8), "squash"), 3, where="x.png")


def test_members_of_archives_are_read_alike() -> None:
    file = io.BytesIO()
    Image.fromarray(np.round(RAMP * 65535).astype(np.uint16)).save(file, "png")
    file.seek(0)
    found = decoded(file, Fit((8, 8), "squash"), 1, where="shard, byte 0")
    np.testing.assert_allclose(found[0], RAMP * 255, atol=1)
