"""Every kind of data, its splits, and what is said when it is not what it should be."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data import _images, load_data, parse_reference
from compress.errors import CompressError, DataError, UsageError


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (100, 8, 8, 3), dtype=np.uint8),
        "y_train": np.arange(100) % 4,
        "x_test": rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8),
        "y_test": np.arange(20) % 4,
    }


@pytest.fixture
def npz(tmp_path, arrays):
    def saved(**changes):
        path = tmp_path / "data.npz"
        np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
        return f"npz:{path}"

    return saved


@pytest.fixture
def folder(tmp_path):
    """A folder of photos of two classes, wider than high, each of one colour."""
    for split, count in (("train", 20), ("val", 4)):
        for shade, name in ((0, "dark"), (255, "light")):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40, 30), (shade,) * 3).save(place / f"{number:02d}.png")
    return tmp_path


def load(reference, seed=0, **options):
    return load_data(parse_reference(reference, **options), seed)


def rows(images):
    """Return the images as a set, to see whether sets overlap."""
    return {pixels.numpy().tobytes() for pixels in images.take(range(len(images)))}


def test_splits_are_disjoint_and_cover_the_training_images(npz):
    data = load(npz(), calibration=10, validation=0.1)
    splits = data.splits
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 80,
        "validation": 10,
        "calibration": 10,
        "test": 20,
    }
    seen = [rows(split) for split in splits.values()]
    assert len(set.union(*seen)) == 120


def test_the_seed_decides_the_split_and_nothing_else_does(npz):
    reference = npz()
    same, again, other = load(reference, 1), load(reference, 1), load(reference, 2)
    assert rows(same.splits["calibration"]) == rows(again.splits["calibration"])
    assert rows(same.splits["calibration"]) != rows(other.splits["calibration"])
    assert rows(same.splits["test"]) == rows(other.splits["test"])


def test_a_small_set_keeps_most_images_for_training(npz):
    assert len(load(npz(), calibration=512).splits["calibration"]) == 20


@pytest.mark.parametrize("count", [16, 20, 39])
def test_a_very_small_set_leaves_enough_to_calibrate_on(npz, arrays, count):
    few = {name: arrays[name][:count] for name in ("x_train", "y_train")}
    sizes = {name: len(part) for name, part in load(npz(**few)).splits.items()}
    assert sizes["calibration"] == 8 and sizes["train"] == count - 8 - sizes["validation"]


def test_batches_are_normalized_and_in_order(npz, arrays):
    data = load(npz(), mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    batches = list(data.batches("test", 8, limit=12))
    assert [len(labels) for _, labels in batches] == [8, 4]
    pixels = arrays["x_test"][:12].transpose(0, 3, 1, 2) / 255
    mean, std = np.array([0.5, 0.25, 0.0]), np.array([0.5, 1.0, 2.0])
    expected = (pixels - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(torch.cat([x for x, _ in batches]), expected, atol=1e-6)
    assert torch.cat([y for _, y in batches]).tolist() == [i % 4 for i in range(12)]


def test_grey_is_repeated_and_colour_averaged_on_request(npz, arrays):
    assert load("digits", channels=3).example.shape == (1, 3, 8, 8)
    grey = load(npz(), channels=1)
    luma = arrays["x_test"][0] @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(grey.splits["test"].take([0])[0, 0], luma, atol=0.51)


def test_images_are_resized_on_request(npz):
    assert load(npz(), image_size=16).example.shape == (1, 3, 16, 16)


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    data = load("digits")
    assert data.classes == tuple("0123456789")
    assert len(data.splits["test"]) == 360
    first = load_digits().images[0]
    np.testing.assert_allclose(data.splits["test"].take([0])[0, 0] / 255 * 16, first, atol=0.04)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files_are_read_packed_or_not(tmp_path, ending):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        for name, array in (("images-idx3", pixels), ("labels-idx1", np.arange(50) % 10)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
            content = header + array.astype(np.uint8).tobytes()
            path = tmp_path / f"{prefix}-{name}-ubyte{ending}"
            path.write_bytes(gzip.compress(content) if ending else content)
    data = load(f"fashion-mnist:{tmp_path}")
    np.testing.assert_array_equal(data.splits["test"].take([3])[0, 0], pixels[3])
    assert data.splits["test"].labels.tolist() == [i % 10 for i in range(50)]


def test_a_damaged_idx_file_is_named(tmp_path):
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (tmp_path / name).write_bytes(b"\0\0\x08\x03\0\0")
    with pytest.raises(DataError, match="train-images-idx3-ubyte: is damaged"):
        load(f"mnist:{tmp_path}")


def test_folders_are_cropped_and_labelled_by_sorted_name(folder):
    data = load(f"imagefolder:{folder}", image_size=16, calibration=8)
    assert data.classes == ("dark", "light")
    assert data.example.shape == (1, 3, 16, 16)
    test = data.splits["test"]
    for pixels, label in zip(test.take(range(len(test))), test.labels, strict=True):
        assert (pixels == label * 255).all()


def test_a_large_folder_is_decoded_when_asked_for(folder, monkeypatch):

    whole = load(f"imagefolder:{folder}", image_size=16, calibration=8)
    monkeypatch.setattr(_images, "LARGEST_IN_MEMORY_BYTES", 0)
    lazy = load(f"imagefolder:{folder}", image_size=16, calibration=8)
    for split in whole.splits:
        indices = range(len(whole.splits[split]))
        assert torch.equal(whole.splits[split].take(indices), lazy.splits[split].take(indices))


def test_with_three_folders_one_is_for_choosing(folder):
    (folder / "val").rename(folder / "test")
    for name in ("dark", "light"):
        place = folder / "validation" / name
        place.mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(place / "0.jpg")
    data = load(f"imagefolder:{folder}", image_size=16, calibration=8)
    assert (len(data.splits["validation"]), len(data.splits["test"])) == (2, 8)


def test_a_corrupt_image_is_named(folder):
    (folder / "train" / "dark" / "03.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(DataError, match=r"train/dark/03.png: is not a readable image"):
        load(f"imagefolder:{folder}", image_size=16)


def test_a_truncated_image_is_named(folder):
    path = folder / "train" / "dark" / "03.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"03.png: is not a readable image"):
        load(f"imagefolder:{folder}", image_size=16)


def test_a_folder_without_images_is_named(folder):
    for path in (folder / "val").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"val: holds no images. Expected CLASS/"):
        load(f"imagefolder:{folder}")


def test_one_class_is_no_task(folder):
    import shutil

    for split in ("train", "val"):
        shutil.rmtree(folder / split / "light")
    with pytest.raises(DataError, match="only one class: dark"):
        load(f"imagefolder:{folder}")


def test_test_classes_that_train_has_not_are_named(folder):
    (folder / "val" / "grey").mkdir()
    with pytest.raises(DataError, match="classes that train has not: grey"):
        load(f"imagefolder:{folder}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None}, "lacks x_test; it holds x_train, y_train, y_test"),
        ({"x_test": np.zeros((20, 8, 8, 3))}, "x_test is float64 of shape"),
        ({"y_test": np.zeros(3, int)}, "x_test has 20 images and y_test has 3 labels"),
        ({"y_train": np.full(100, -1)}, "labels are not integers from 0"),
        ({"classes": np.array(["a", "b"])}, "2 class names for labels up to 3"),
        ({"y_train": np.zeros(100, int), "y_test": np.zeros(20, int)}, "only one class: 0"),
    ],
    ids=["lacks", "dtype", "count", "negative", "names", "one class"],
)
def test_archives_that_do_not_fit_are_refused(npz, changes, message):
    with pytest.raises(DataError) as caught:
        load(npz(**changes))
    assert message in str(caught.value)


def test_one_array_of_another_kind_is_no_images(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((8, 4), np.int64))
    with pytest.raises(DataError, match=r"one array of int64 of shape \(8, 4\), without labels"):
        load_data(parse_reference(f"npz:{tmp_path / 'x.npy'}"))
    np.save(tmp_path / "x.npy", np.full((8, 3, 4, 4), np.nan, np.float32))
    with pytest.raises(DataError, match="not finite"):
        load_data(parse_reference(f"npz:{tmp_path / 'x.npy'}"))


def test_an_archive_with_pickled_objects_is_refused(tmp_path, arrays):
    np.savez(tmp_path / "data.npz", **arrays | {"classes": np.array([{}, {}], dtype=object)})
    with pytest.raises(DataError, match="is not a readable NumPy archive"):
        load(f"npz:{tmp_path / 'data.npz'}")


def test_cifar10_is_found_as_an_archive(tmp_path, arrays):
    np.savez(tmp_path / "cifar10.npz", **arrays)
    assert load(f"cifar10:{tmp_path}").mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("npz", UsageError, "needs to know where its images are. Give the folder or file"),
        ("npz:/none", DataError, "/none: no such file or folder"),
        ("imagefolder:/none", DataError, "/none: no such folder"),
        ("mnist:/none", DataError, "/none: holds no train-images-idx3-ubyte"),
        ("cifar10:/none", DataError, "/none: holds no complete CIFAR10"),
        ("cifar100:/none", DataError, "/none: holds no complete CIFAR100"),
    ],
)
def test_missing_data_says_what_was_expected_where(reference, error, message):
    with pytest.raises(error) as caught:
        load(reference)
    assert message in str(caught.value)


def test_means_of_the_wrong_number_of_channels_are_refused(npz):
    with pytest.raises(UsageError, match="mean has 2 numbers"):
        load(npz(), mean=(0.5, 0.5))


def test_the_fingerprint_follows_the_pixels(npz, arrays):
    before = load(npz()).fingerprint
    changed = arrays["x_test"].copy()
    changed[0, 0, 0, 0] ^= 1
    assert load(npz(x_test=changed)).fingerprint != before
    assert load(npz()).fingerprint == before


def test_all_data_errors_are_of_the_family():
    assert issubclass(DataError, CompressError)


@pytest.fixture(scope="module")
def by_class(tmp_path_factory):
    """Pictures of three classes, sorted by class as folders are: 30 to test."""
    root = tmp_path_factory.mktemp("sorted")
    for split, count in (("train", 20), ("test", 10)):
        for name in "abc":
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (number, ord(name), 0)).save(folder / f"{number}.png")
    return root


def test_a_few_test_images_are_of_all_classes(by_class):
    from compress.pipeline.task import prepared
    from compress.recipe.loading import validate_recipe

    recipe = {
        "name": "few",
        "model": {"name": "compress.models.cifar:resnet8"},
        "data": {"name": "imagefolder", "root": str(by_class), "image_size": 8, "calibration": 8},
        "stages": [{"prune": {"keep_macs": 0.5}}],
        "targets": [],
        "measure": {"test_images": 6},
    }
    dataset, _ = prepared(validate_recipe(recipe, where="few"))
    assert dataset.splits["test"].labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_an_evaluation_with_a_limit_is_of_all_classes(by_class):
    from compress import evaluate

    data = load(f"imagefolder:{by_class}", image_size=8, calibration=8)
    seen = []

    def run(images):
        seen.extend(images[:, 1, 0, 0].tolist())  # green is the class
        return torch.zeros(len(images), 3)

    found = evaluate.of_task(run, data, "classification", limit=6)
    assert found.images == 6
    assert found.value == pytest.approx(found.accuracy.top1_pct) == pytest.approx(100 / 3)
    assert len({round(value, 4) for value in seen}) == 3


def test_a_file_that_is_no_array_is_refused_without_the_advice_to_load_objects(tmp_path):
    (tmp_path / "x.npy").write_text("x")
    with pytest.raises(DataError, match=r"neither \.npy nor \.npz") as caught:
        load_data(parse_reference(f"npz:{tmp_path / 'x.npy'}"))
    assert "allow_pickle" not in str(caught.value)
