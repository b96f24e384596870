"""Data of one's own: a Dataset in a Python file, a table, a flat folder, a set saved to disk."""

import csv
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data import load_data, parse_reference
from compress.errors import CompressError
from compress.recipe.settings import DataSettings

FILE = '''
import sys

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset


class Shades(Dataset):
    """Squares whose grey says their class."""

    def __init__(self, count=40, form="pil", target="class", size=(12, 10), first=0):
        self.count, self.form, self.target, self.size = count, form, target, size
        self.first = first

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        label = i % 2
        array = np.full((*self.size, 3), 40 + 160 * label, np.uint8)
        array[0, 0] = i + self.first
        picture = {
            "pil": lambda: Image.fromarray(array),
            "hwc": lambda: array,
            "chw": lambda: torch.from_numpy(array).permute(2, 0, 1),
            "float": lambda: torch.from_numpy(array).permute(2, 0, 1) / 255,
            "normalized": lambda: torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1,
            "grey": lambda: array[..., 0],
            "random": lambda: torch.randint(0, 255, (3, 8, 8), dtype=torch.uint8),
        }[self.form]()
        target = {
            "class": label,
            "name": ("dark", "light")[label],
            "tensor": torch.tensor(label),
            "hot": [label, 1, 1 - label],
            "mask": np.full(self.size, label, np.uint8),
            "picture": array[..., :1].repeat(3, 2),
            "resized": np.full((5, 5), label, np.uint8),
            "ragged": [label] * (2 + (i == 7)),
            "turning": "dark" if i == 5 else label,
            "beyond": np.full(self.size, 9 if i == 4 else label, np.uint8),
            "boxes": {"boxes": torch.zeros(1, 4), "labels": torch.zeros(1)},
        }[self.target]
        return picture, target


class Odd(Shades):
    """Item 11 is not what the others are."""

    def __init__(self, how, target="class"):
        super().__init__(target=target)
        self.how = how

    def __getitem__(self, i):
        picture, target = super().__getitem__(i)
        if i != 11:
            return picture, target
        grey = torch.full((3, 12, 10), 0.5)
        if self.how == "one NaN":
            grey[1, 3, 3] = float("nan")
        return {
            "NaN": lambda: (grey * float("nan"), target),
            "one NaN": lambda: (grey, target),
            "infinite": lambda: (grey / 0, target),
            "no rows": lambda: (grey[:, :0], target),
            "none": lambda: (None, target),
            "a path": lambda: ("11.png", target),
            "complex": lambda: (grey.to(torch.complex64), target),
            "flipped": lambda: (np.array(picture)[:, ::-1], target),
            "exit": lambda: sys.exit(3),
            "mask NaN": lambda: (picture, np.full(self.size, np.nan)),
            "mask 0.5": lambda: (picture, np.full(self.size, 0.5)),
            "mask 300": lambda: (picture, np.full(self.size, 300)),
            "mask 77": lambda: (picture, np.full(self.size, 77)),
            "mask -7": lambda: (picture, np.full(self.size, -7)),
            "mask -1": lambda: (picture, np.full(self.size, -1)),
            "several NaN": lambda: (picture, np.array([0, 1, np.nan])),
            "several 2": lambda: (picture, [0, 2, 1]),
            "class -1": lambda: (picture, -1),
            "picture NaN": lambda: (picture, np.full((*self.size, 3), np.nan)),
        }[self.how]()


def odd_test(split):
    return Shades() if split == "train" else Odd("NaN") if split == "test" else None


class Uneven(Shades):
    """Item 11 is a tensor of another shape."""

    def __init__(self, shape):
        super().__init__(form="chw")
        self.shape = tuple(shape)

    def __getitem__(self, i):
        picture, target = super().__getitem__(i)
        return picture if i != 11 else torch.full(self.shape, 0.5), target


class Failing(Shades):
    def __getitem__(self, i):
        if i == 11:
            raise OSError("no such block")
        return super().__getitem__(i)


class Named(Shades):
    classes = ("dark", "light")


class AsDict(Shades):
    def __getitem__(self, i):
        picture, target = super().__getitem__(i)
        return {"image": picture, "label": target}


def by_split(split):
    held_back = {"validation": Shades(6, first=60), "test": Shades(10, first=80)}
    return Shades(40) if split == "train" else held_back[split]


def no_validation(split, count=20):
    return Shades(count) if split == "train" else Shades(4) if split == "test" else None


def torchvision_like(train=True):
    return Shades(30 if train else 8)


def whole():
    return Named(50)


def pair():
    return Shades(30), Shades(6)


def mapping():
    return {"train": Shades(30), "val": Shades(6)}


def loader():
    return DataLoader(Shades(30), batch_size=4, shuffle=True)


def broken(split):
    raise RuntimeError("no disk")


def generator():
    yield 1


instance = Shades(30)
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def load(reference, **options):
    return load_data(DataSettings(**{"calibration": 8, **options}, **as_parts(reference)))


def as_parts(reference):
    parts = parse_reference(str(reference))
    return {"name": parts.name, "root": parts.root}


def sizes(data):
    return {name: len(images) for name, images in data.splits.items()}


@pytest.mark.parametrize(
    ("name", "train", "validation", "test"),
    [
        ("by_split", 40, 6, 10),
        ("no_validation", 20, None, 4),
        ("torchvision_like", 30, None, 8),
        ("whole", 40, None, 10),
        ("pair", 30, None, 6),
        ("mapping", 30, None, 6),
        ("loader", 24, None, 6),
        ("instance", 24, None, 6),
        ("Shades", 32, None, 8),
    ],
)
def test_a_dataset_or_what_returns_one(file, name, train, validation, test):
    """Test and validation are the user's; what is missing is held back, of each class alike."""
    data = load(f"{file}:{name}")
    found = sizes(data)
    assert found["test"] == test
    assert found["train"] + found["calibration"] + (
        0 if validation else found["validation"]
    ) == train  # fmt: skip
    assert validation in (None, found["validation"])
    assert data.image_size == (12, 10)
    images = data.splits["train"].take(range(found["train"]))
    shades = images[:, 0, 5, 5].numpy()
    np.testing.assert_array_equal(shades, 40 + 160 * data.splits["train"].labels)


@pytest.mark.parametrize("form", ["pil", "hwc", "chw", "float", "grey"])
def test_pictures_of_any_form_keep_their_pixels(file, form):
    options = {"arguments": {"form": form}}
    data = load(f"{file}:Shades", options=options)
    pixels = data.splits["test"].take([0])
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (1, 1 if form == "grey" else 3, 12, 10)
    assert pixels[0, 0, 5, 5] == 40 + 160 * data.splits["test"].labels[0]
    assert load(f"{file}:Shades", options=options, image_size=20).image_size == (20, 20)


@pytest.mark.parametrize(
    ("target", "form", "classes"),
    [
        ("class", "class", ("0", "1")),
        ("tensor", "class", ("0", "1")),
        ("name", "class", ("dark", "light")),
        ("hot", "classes", ("0", "1", "2")),
        ("mask", "mask", ("0", "1")),
        ("picture", "image", ()),
    ],
)
def test_targets_say_what_the_data_is_for(file, target, form, classes):
    data = load(f"{file}:Shades", options={"arguments": {"target": target}})
    assert (data.target, data.classes) == (form, classes)
    _, targets = next(iter(data.batches("test", 2)))
    assert tuple(targets.shape[1:]) == {"class": (), "classes": (3,), "mask": (12, 10),
                                        "image": (3, 12, 10)}[form]  # fmt: skip


def test_classes_are_called_as_the_dataset_calls_them(file):
    assert load(f"{file}:whole").classes == ("dark", "light")
    named = load(f"{file}:Shades", options={"classes": ["a", "b"]})
    assert named.classes == ("a", "b")
    assert load(f"{file}:AsDict").classes == ("0", "1")


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("Nothing", {}, "no such data 'Nothing'"),
        ("broken", {}, "calling it with (split='train') fails: RuntimeError('no disk')"),
        ("generator", {}, "Expected a Dataset with a length and items by number"),
        ("Shades", {"form": "normalized"}, "pictures before normalization"),
        ("Shades", {"form": "random"}, "returns a different picture each time it is read"),
        ("Shades", {"target": "boxes"}, "Boxes are read by the kinds of data voc, coco and yolo"),
        ("Failing", {}, "item 11: raises OSError('no such block')"),
        ("Shades", {"target": "resized"}, "item 0: has a mask of 5 x 5 pixels and a picture of 12"),
        ("Shades", {"target": "ragged"}, "item 7: has an array of shape (3,) as its target"),
        ("Shades", {"target": "turning"}, "item 5: has a name as its target. Expected one int"),
        ("Shades", {"count": 0}, "holds no items"),
        ("Shades", {"colour": 3}, "colour"),
    ],
)
def test_what_is_no_data_is_refused_in_words(file, name, arguments, said):
    with pytest.raises(CompressError) as error:
        load(f"{file}:{name}", options={"arguments": arguments})
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("how", "target", "said"),
    [
        ("NaN", "class", "has pixels that are not finite numbers"),
        ("one NaN", "class", "has pixels that are not finite numbers"),
        ("infinite", "class", "has pixels that are not finite numbers"),
        ("no rows", "class", "has a picture of shape (3, 0, 10)"),
        ("none", "class", "has a picture that is NoneType, not of real numbers"),
        ("a path", "class", "has a picture that is str, not of real numbers"),
        ("complex", "class", "has a picture that is Tensor, not of real numbers"),
        ("exit", "class", "raises SystemExit(3)"),
        ("class -1", "class", "has the class -1. Expected one of the 2 classes 0, 1"),
        ("mask NaN", "mask", "has a mask with the values nan. Expected classes 0 to 254"),
        ("mask 0.5", "mask", "has a mask with the values 0.5"),
        ("mask 300", "mask", "has a mask with the values 300"),
        ("mask -7", "mask", "has a mask with the values -7"),
        ("mask 77", "mask", "holds the value 77, and no mask holds 2, 3, 4, ..."),
        ("several NaN", "hot", "has the target [0.0, 1.0, nan]. Expected 0 or 1 for each class"),
        ("several 2", "hot", "has the target [0, 2, 1]"),
    ],
)
def test_one_item_that_is_not_like_the_others_is_named(file, how, target, said):
    with pytest.raises(CompressError) as error:
        load(f"{file}:Odd", options={"arguments": {"how": how, "target": target}})
    assert f"{file}:Odd, train, item 11: {said}" in str(error.value)


@pytest.mark.parametrize("shape", [(3, 9, 10), (1, 12, 10)])
def test_a_tensor_of_another_shape_is_fitted_only_where_a_size_is_asked_for(file, shape):
    options = {"arguments": {"shape": shape}}
    with pytest.raises(CompressError) as error:
        load(f"{file}:Uneven", options=options)
    said = f"item 11: has a picture of shape {shape}. Expected (3, 12, 10), as the first items have"
    assert said in str(error.value)
    assert load(f"{file}:Uneven", options=options, image_size=(8, 8)).classes == ("0", "1")


def test_a_broken_picture_to_give_back_is_named(file):
    with pytest.raises(CompressError, match="train, target of item 11: has pixels that are"):
        load(f"{file}:Odd", options={"arguments": {"how": "picture NaN", "target": "picture"}})


def test_the_split_of_a_broken_item_is_said(file):
    with pytest.raises(CompressError, match="odd_test, test, item 11: has pixels"):
        load(f"{file}:odd_test")


def test_pixels_with_reversed_rows_and_masks_with_minus_one_are_read(file):
    data = load(f"{file}:Odd", options={"arguments": {"how": "flipped"}})
    assert sum(sizes(data).values()) == 40
    data = load(f"{file}:Odd", options={"arguments": {"how": "mask -1", "target": "mask"}})
    assert data.classes == ("0", "1")
    every = np.concatenate([images.labels for images in data.splits.values()])
    assert (every == 255).all((1, 2)).sum() == 1


def test_a_mask_with_a_value_beyond_the_named_classes_is_found(file):
    with pytest.raises(CompressError, match=r"item 4: has a mask with the values 9") as error:
        load(
            f"{file}:Shades",
            options={"arguments": {"target": "beyond"}, "classes": ["ground", "sky"]},
        )
    assert "classes 0 to 1" in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CompressError, match=r"none\.py: no such file"):
        load(f"{tmp_path}/none.py:x")


def test_the_seed_draws_the_test_set(file):
    first, again, other = (load_data(parse_reference(f"{file}:whole"), seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint


@pytest.fixture
def photos(tmp_path):
    """Twelve photos of each of two classes in a flat folder; returns it and its files."""
    files = []
    for shade, name in ((10, "dark"), (240, "light")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(12):
            path = tmp_path / "photos" / name / f"{number}.png"
            Image.new("RGB", (40, 30), (shade, number, 0)).save(path)
            files.append(path)
    return tmp_path / "photos", files


def test_a_flat_folder_is_split_by_seed(photos):
    data = load(f"imagefolder:{photos[0]}", image_size=8)
    assert sum(sizes(data).values()) == 24
    assert np.bincount(data.splits["test"].labels).tolist() == [2, 2]
    shades = data.splits["test"].take(range(4))[:, 0, 4, 4]
    assert (shades > 128).tolist() == data.splits["test"].labels.astype(bool).tolist()
    more = load(f"imagefolder:{photos[0]}", image_size=8, options={"test": 0.5})
    assert len(more.splits["test"]) == 12


def table(path, rows, comma=","):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=comma).writerows(rows)
    return path


@pytest.mark.parametrize("comma", [",", ";", "\t"])
def test_a_table_names_files_and_classes(photos, comma):
    root, files = photos
    rows = [[file.relative_to(root), file.parent.name] for file in files]
    data = load(f"csv:{table(root / 'x.csv', [['path', 'Label'], *rows], comma)}", image_size=8)
    assert data.classes == ("dark", "light")
    assert sum(sizes(data).values()) == 24
    shades = data.splits["test"].take(range(len(data.splits["test"])))[:, 0, 4, 4]
    assert (shades > 128).tolist() == data.splits["test"].labels.astype(bool).tolist()


def test_files_of_a_table_may_lie_in_a_folder_beside_it(photos):
    root, files = photos
    (root / "pictures").mkdir()
    for number, file in enumerate(files):
        file.rename(root / "pictures" / f"{number}.png")
    rows = [[f"{n}.png", n > 11] for n in range(24)]
    data = load(f"csv:{table(root / 'x.csv', [['filename', 'label'], *rows])}", image_size=8)
    assert sum(sizes(data).values()) == 24


def test_a_table_may_say_the_split_and_numbers_sort_as_numbers(photos):
    root, files = photos
    rows = [[f, i % 12, ("train", "val", "test")[i % 3 if i > 11 else 0]]
            for i, f in enumerate(files)]  # fmt: skip
    data = load(f"csv:{table(root / 'x.csv', [['image', 'y', 'split'], *rows])}", image_size=8)
    assert data.classes == tuple(map(str, range(12)))
    assert (len(data.splits["validation"]), len(data.splits["test"])) == (4, 4)


def test_several_columns_are_several_classes(photos):
    root, files = photos
    rows = [[f, int(i > 11), 1] for i, f in enumerate(files)]
    path = table(root / "x.csv", [["image", "cat", "dog"], *rows])
    data = load(f"csv:{path}", image_size=8, options={"label": "cat,dog"})
    assert (data.target, data.classes) == ("classes", ("cat", "dog"))
    assert data.splits["train"].labels[:, 1].all()


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([], {}, "holds no lines"),
        ([["a", "b"], ["x.png", "1"]], {}, "which of its columns is the image is not clear: a, b"),
        ([["image", "b"], ["x.png", "1"]], {"label": "c"}, "no column 'c'"),
        ([["image", "label"], ["x.png"]], {}, "line 2: has another number of cells"),
        ([["image", "label"], ["x.png", ""]], {}, "line 2: no label"),
        ([["image", "label", "split"], ["x.png", "1", "tset"]], {}, "line 2: the split 'tset'"),
        ([["image", "label"], *[["no.png", str(i % 2)] for i in range(9)]], {}, "no.png: lacks"),
        ([["image", "a", "b"], ["x.png", "1", "2"]], {"label": "a,b"}, "line 2: holds 1, 2"),
    ],
)
def test_a_wrong_table_is_refused_with_its_line(tmp_path, rows, options, said):
    with pytest.raises(CompressError) as error:
        load(f"csv:{table(tmp_path / 'x.csv', rows)}", options=options)
    assert said in str(error.value)


def test_a_set_of_hugging_face_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["dark", "light"])}
    )
    shades = [20 + 200 * (i % 2) for i in range(30)]
    rows = {
        "picture": [Image.new("RGB", (12, 10), (s, s, s)) for s in shades],
        "kind": [i % 2 for i in range(30)],
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "valid": made, "test": made}).save_to_disk(
        str(tmp_path / "three")
    )
    one, three = load(f"huggingface:{tmp_path / 'one'}"), load(f"huggingface:{tmp_path / 'three'}")
    assert one.classes == three.classes == ("dark", "light")
    assert (len(one.splits["test"]), len(three.splits["test"])) == (6, 30)
    assert len(three.splits["validation"]) == 30
    pixels = one.splits["test"].take(range(6))[:, 0, 5, 5]
    assert pixels.tolist() == (20 + 200 * one.splits["test"].labels).tolist()
    with pytest.raises(CompressError, match="no column 'x' of labels"):
        load(f"huggingface:{tmp_path / 'one'}", options={"label": "x"})
    with pytest.raises(CompressError, match="no such folder"):
        load(f"huggingface:{tmp_path / 'none'}")


def test_the_extra_is_named_where_datasets_is_absent(tmp_path, monkeypatch):
    from compress import packages

    monkeypatch.setattr(packages, "is_installed", lambda name: name != "datasets")
    with pytest.raises(CompressError, match=r"pip install 'compress-cnn\[huggingface\]'"):
        load(f"huggingface:{tmp_path}")


def test_a_run_says_how_many_images_there_are(file, monkeypatch, capsys, tmp_path):
    from compress.cli import app

    command = [
        "prune",
        "compress.models.cifar:resnet8",
        "--data",
        f"{file}:by_split",
        "--seed",
        "0",
    ]
    command += ["--keep-macs", "0.9", "--set", "measure.rounds=3", "--set", "data.calibration=8"]
    command += ["--set", "stages.0.prune.refit=false", "--set", "measure.round_ms=1"]
    monkeypatch.setattr(sys, "argv", ["compress", *command, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        app.main()
    said = capsys.readouterr().err
    assert ended.value.code == 0, said
    assert said.startswith(
        "data dataset: images 32 train, 6 validation, 8 calibration, 10 test, 3 x 12 x 10; "
        "2 classes: 0, 1"
    )
