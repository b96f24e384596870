"""Data with boxes, masks and several classes: read, fitted with the images, checked by line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import compress
from compress import tasks
from compress.data import load_data
from compress.data.masks import Masks as MaskKind
from compress.errors import DataError, UsageError
from compress.recipe import loading
from compress.recipe.settings import DataSettings
from compress.tasks import load_task

DATA = Path(os.environ.get("COMPRESS_DATA", Path(__file__).parents[3] / "shared" / "data"))
SIZE = (80, 60)  # width, height of every picture
RED, GREEN = (255, 0, 0), (0, 255, 0)


def objects(n: int) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Return one or two rectangles of picture ``n``."""
    first = ("red", (4 + n, 6, 24 + n, 26))
    return [first] if n % 3 == 0 else [first, ("green", (40, 20 + n, 70, 40 + n))]


def picture(n: int) -> Image.Image:
    image = Image.new("RGB", SIZE, (0, 0, 255))
    for name, (x1, y1, x2, y2) in objects(n):
        ImageDraw.Draw(image).rectangle(
            (x1, y1, x2 - 1, y2 - 1), fill=RED if name == "red" else GREEN
        )
    return image


def voc(root: Path, edit: str = "", by: str = "") -> DataSettings:
    for folder in ("Annotations", "JPEGImages", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    for kind in ("Main", "Segmentation"):
        lists = root / "ImageSets" / kind
        lists.mkdir(parents=True)
        for part, numbers in (("train", range(10)), ("val", (10, 11)), ("test", (12, 13))):
            (lists / f"{part}.txt").write_text("".join(f"im{n:02d}\n" for n in numbers))
    for n in range(14):
        picture(n).save(root / "JPEGImages" / f"im{n:02d}.png")
        mask = np.zeros(SIZE[::-1], np.uint8)
        body = ""
        for name, (x1, y1, x2, y2) in objects(n):
            mask[y1:y2, x1:x2] = 1 if name == "red" else 2
            corners = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
            body += f"<object>\n<name>{name}</name>\n<bndbox>{corners}</bndbox>\n</object>\n"
        mask[:2] = 255
        Image.fromarray(mask).save(root / "SegmentationClass" / f"im{n:02d}.png")
        text = f"<annotation>\n{body}</annotation>\n"
        if n == 1 and edit:
            text = text.replace(edit, by, 1)
        (root / "Annotations" / f"im{n:02d}.xml").write_text(text)
    return DataSettings(name="voc", root=str(root), image_size=64, calibration=8, validation=0.1)


def yolo(root: Path, edit: str = "", by: str = "") -> DataSettings:
    for part, numbers in (("train", range(10)), ("val", range(10, 14))):
        for kind in ("images", "labels"):
            (root / kind / part).mkdir(parents=True)
        for n in numbers:
            picture(n).save(root / "images" / part / f"im{n:02d}.png")
            text = ""
            for name, (x1, y1, x2, y2) in objects(n):
                centre = f"{(x1 + x2) / 2 / SIZE[0]} {(y1 + y2) / 2 / SIZE[1]}"
                text += f"{int(name == 'green')} {centre} "
                text += f"{(x2 - x1) / SIZE[0]} {(y2 - y1) / SIZE[1]}\n"
            if n == 1 and edit:
                text = text.replace(edit, by, 1)
            (root / "labels" / part / f"im{n:02d}.txt").write_text(text)
    names = "names: {0: red, 1: green}\ntrain: images/train\nval: images/val\n"
    (root / "data.yaml").write_text(names)
    return DataSettings(name="yolo", root=str(root / "data.yaml"), image_size=64, calibration=8)


def coco(root: Path, **changed: object) -> DataSettings:
    (root / "images").mkdir(parents=True)
    annotations: list[dict[str, object]] = []
    for n in range(14):
        picture(n).save(root / "images" / f"im{n:02d}.png")
        for name, (x1, y1, x2, y2) in objects(n):
            box = [x1, y1, x2 - x1, y2 - y1]
            entry = {"image_id": n, "category_id": 5 if name == "red" else 9, "bbox": box}
            annotations.append({"id": len(annotations), **entry})
    annotations[1].update(changed)
    content = {
        "images": [{"id": n, "file_name": f"im{n:02d}.png"} for n in range(14)],
        "annotations": annotations,
        "categories": [{"id": 9, "name": "green"}, {"id": 5, "name": "red"}],
    }
    (root / "instances.json").write_text(json.dumps(content))
    root = root / "instances.json"
    return DataSettings(name="coco", root=str(root), image_size=64, calibration=8)


def masks(root: Path) -> DataSettings:
    for part, numbers in (("train", range(10)), ("val", (10, 11)), ("test", (12, 13))):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for n in numbers:
            picture(n).save(root / part / "images" / f"im{n:02d}.png")
            mask = np.zeros(SIZE[::-1], np.uint8)
            for name, (x1, y1, x2, y2) in objects(n):
                mask[y1:y2, x1:x2] = 1 if name == "red" else 2
            mask[:2] = 7
            Image.fromarray(mask).save(root / part / "masks" / f"im{n:02d}.png")
    return DataSettings(
        name="masks",
        root=str(root),
        image_size=64,
        calibration=8,
        options={"void": 7, "classes": ["blue", "red", "green"]},
    )


BOXED = {"voc": voc, "yolo": yolo, "coco": coco}


@pytest.mark.parametrize("resize", [None, "squash", "short side"])
@pytest.mark.parametrize("kind", BOXED)
def test_boxes_lie_on_their_objects_in_the_fitted_image(tmp_path, kind, resize):
    settings = BOXED[kind](tmp_path)
    options = {} if resize is None else {"resize": resize}
    dataset = load_data(settings.model_copy(update={"options": options}))
    assert dataset.target == "boxes" and set(dataset.classes) == {"red", "green"}
    seen = 0
    for split in ("train", "test"):
        for index in range(len(dataset.splits[split])):
            image = dataset.splits[split].take([index])[0]
            (target,) = dataset.splits[split].labels[[index]].tensors()
            for box, label in zip(target["boxes"], target["labels"], strict=True):
                x1, y1, x2, y2 = box.round().int().tolist()
                colour = RED if dataset.classes[label] == "red" else GREEN
                inner = image[:, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].float().mean((1, 2))
                assert (inner - torch.tensor(colour).float()).abs().max() < 12
                seen += 1
    assert seen >= 10


@pytest.mark.parametrize("kind", BOXED)
def test_kinds_with_boxes_have_disjoint_splits(tmp_path, kind):
    dataset = load_data(BOXED[kind](tmp_path))
    assert all(len(split) for split in dataset.splits.values())
    images, target = next(dataset.batches("train", 3))
    assert images.shape == (3, 3, 64, 64) and len(target) == 3


def test_letterboxed_boxes_are_put_back_into_the_picture(tmp_path):
    from compress.data._pictures import Fit
    from compress.tasks.detection import Detection

    fit = Fit((64, 64), "letterbox")
    boxes = np.array([[4.0, 6, 24, 26]])
    place = fit.place(60, 80)
    moved = boxes * np.array([place.scale[1], place.scale[0]] * 2)
    moved += np.array([place.left, place.top] * 2)

    def in_picture(boxes: np.ndarray) -> np.ndarray:
        return Detection().in_picture({"boxes": boxes}, fit, (60, 80))["boxes"]

    assert in_picture(moved) == pytest.approx(boxes)
    assert in_picture(np.array([[-9.0, -9, 99, 99]])).tolist() == [[0, 0, 80, 60]]


@pytest.mark.parametrize("kind", ["masks", "voc"])
def test_masks_move_with_their_images(tmp_path, kind):
    if kind == "masks":
        settings = masks(tmp_path)
    else:
        settings = voc(tmp_path).model_copy(update={"options": {"labels": "masks"}})
    dataset = load_data(settings)
    assert dataset.target == "mask" and len(dataset.classes) == 3
    for images, target in dataset.batches("test"):
        assert target.dtype == torch.uint8 and target.shape == images.shape[:1] + images.shape[2:]
    images = dataset.splits["test"].take([0, 1])
    colours = torch.tensor([(0, 0, 255), RED, GREEN])
    distance = (images[:, None].float() - colours[None, :, :, None, None]).abs().sum(2)
    inside = target != 255
    agreement = (distance.argmin(1) == target)[inside].float().mean()
    assert agreement > 0.99
    assert (~inside).any() and (target[:, :6] == 255).all()  # padding of the letterbox is void
    assert set(target.unique().tolist()) <= {0, 1, 2, 255}


def test_evaluate_is_public_and_says_how_good_a_network_is(tmp_path):
    dataset = load_data(masks(tmp_path))
    mean, std = torch.tensor(dataset.mean), torch.tensor(dataset.std)
    colours = torch.tensor([(0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)])

    def nearest_colour(images):
        pixels = images * std[:, None, None] + mean[:, None, None]
        return -(pixels[:, None] - colours[None, :, :, None, None]).abs().sum(2)

    found = compress.evaluate(nearest_colour, dataset, "segmentation")
    assert found.images == 2 and found.primary == "miou"
    assert found.metrics["miou"].value > 97
    told = found.row()["metrics"]["miou"]
    assert told["unit"] == "pct" and told["ci95"][0] <= told["value"] <= told["ci95"][1]
    worse = compress.evaluate(lambda images: -nearest_colour(images), dataset, "segmentation")
    task = compress.load_task("segmentation", classes=dataset.classes)
    change = tasks.compare_metrics(task, found.scores, worse.scores)["miou"]
    assert change.value < -90 and change.verdict == "worse"


def test_evaluate_takes_a_detector_of_torchvision_and_leaves_it_as_it_was(tmp_path):
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    model.train()
    task = {"detection": {"background": True}}
    found = compress.evaluate(model, load_data(voc(tmp_path)), task)
    assert found.images == 2 and 0 <= found.metrics["map50_95"].value < 50
    assert model.training
    chosen = compress.load_task(task)
    images, targets = next(load_data(voc(tmp_path / "again")).batches("train", 2))
    assert torch.isfinite(chosen.loss(model, images, targets))


def test_a_task_that_needs_other_labels_is_refused(tmp_path):
    with pytest.raises(DataError, match="the labels are of the form 'boxes', the task needs 'mas"):
        compress.evaluate(lambda images: images, load_data(voc(tmp_path)), "segmentation")


def test_several_classes_for_each_image(tmp_path):
    settings = voc(tmp_path).model_copy(update={"options": {"labels": "classes"}})
    dataset = load_data(settings)
    assert dataset.target == "classes" and dataset.classes == ("green", "red")
    (_, target), *_ = dataset.batches("test")
    assert target.tolist() == [[0, 1], [1, 1]]


def test_a_kind_with_its_options_in_a_recipe(tmp_path):
    voc(tmp_path)
    content = {"model": {"name": "x:y"}, "data": {"voc": {"root": str(tmp_path), "labels": "boxs"}}}
    made = loading.validate_recipe(content, where="r")
    assert made.data.name == "voc" and made.data.options == {"labels": "boxs"}
    with pytest.raises(UsageError, match=r"labels 'boxs'. Did you mean 'boxes'"):
        load_data(made.data)


def test_an_option_the_kind_does_not_have(tmp_path):
    settings = masks(tmp_path).model_copy(update={"options": {"viod": 7}})
    with pytest.raises(UsageError, match=r"'masks' has no option 'viod'. Did you mean 'void'"):
        load_data(settings)


@pytest.mark.parametrize(
    ("edit", "by", "message"),
    [
        ("<xmax>25</xmax>", "<xmax>5</xmax>", r"im01.xml, line 2: the box .* has no area"),
        ("<xmax>25</xmax>", "<xmax>95</xmax>", r"line 2: the box .* lies outside its image of 80 "),
        (
            "<xmax>25</xmax>",
            "<xmax>nan</xmax>",
            r"line 2: the box .* is no finite number",
        ),
        (
            "<xmax>25</xmax>",
            "<xmax>inf</xmax>",
            r"line 2: the box .* is no finite number",
        ),
        ("<xmax>25</xmax>", "", r"im01.xml, line 2: the object has the corners .*None"),
        ("<name>green", "<name>grene", r"line 6: no such class 'grene'. Did you mean 'green'"),
        ("</annotation>", "", r"im01.xml: is not a readable annotation"),
    ],
)
def test_bad_voc_objects_are_refused_with_their_line(tmp_path, edit, by, message):
    settings = voc(tmp_path, edit, by)
    settings = settings.model_copy(update={"options": {"classes": ("green", "red")}})
    with pytest.raises(DataError, match=message):
        load_data(settings)


def test_invalid_boxes_can_be_dropped(tmp_path):
    settings = voc(tmp_path, "<xmax>25</xmax>", "<xmax>5</xmax>")
    dataset = load_data(settings.model_copy(update={"options": {"invalid": "drop"}}))
    assert len(dataset.splits["train"]) + len(dataset.splits["calibration"]) == 10


@pytest.mark.parametrize(
    ("edit", "by", "message"),
    [
        ("0 0.1", "7 0.1", r"im01.txt, line 1: no such class '7'"),
        ("0 0.1", "0 1.1", r"im01.txt, line 1: the box .* lies outside"),
        ("0 0.1", "0", r"im01.txt, line 1: .* is no object"),
        ("0 0.1", "nan 0.1", r"im01.txt, line 1: .* is no object"),
        ("0 0.1", "inf 0.1", r"im01.txt, line 1: .* is no object"),
        ("0 0.1875", "0 nan", r"im01.txt, line 1: the box .* is no finite number"),
        ("0 0.1875", "0 -inf", r"im01.txt, line 1: the box .* is no finite number"),
    ],
)
def test_bad_yolo_objects_are_refused_with_their_line(tmp_path, edit, by, message):
    with pytest.raises(DataError, match=message):
        load_data(yolo(tmp_path, edit, by))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bbox": [5, 5, 0, 3]}, r"instances.json, annotation 1: the box .* has no area"),
        ({"bbox": [5, 5, 300, 3]}, r"annotation 1: the box .* lies outside"),
        ({"bbox": [5, float("nan"), 3, 3]}, r"annotation 1: the box .* is no finite number"),
        ({"bbox": [5, 5, float("inf"), 3]}, r"annotation 1: the box .* is no finite number"),
        ({"category_id": 77}, r"annotation 1: no such class '77'"),
        ({"image_id": 99}, r"annotation 1: no image has the id 99"),
        ({"bbox": [5, 5]}, r"is no COCO annotation file"),
    ],
)
def test_bad_coco_annotations_are_refused_with_their_id(tmp_path, changed, message):
    with pytest.raises(DataError, match=message):
        load_data(coco(tmp_path, **changed))


@pytest.mark.parametrize(
    ("parts", "called"),
    [
        (("train", "val", "test"), "masks"),
        (("training", "validation", "testing"), "annotations"),
        (("", "", ""), "labels"),
    ],
)
def test_masks_beside_a_folder_of_images_are_read(tmp_path, parts, called):
    as_usual = load_data(masks(tmp_path / "a"))
    parted = any(parts)
    for kind, folder in (("images", "images"), ("masks", called)):
        for part, name in zip(("train", "val", "test"), parts, strict=True):
            place = tmp_path / "b" / folder / name
            place.mkdir(parents=True, exist_ok=True)
            for file in (tmp_path / "a" / part / kind).iterdir():
                file.rename(place / file.name)
    settings = masks(tmp_path / "c").model_copy(update={"root": str(tmp_path / "b")})
    found = load_data(settings)
    counts = [
        {name: len(split) for name, split in each.splits.items()} for each in (as_usual, found)
    ]
    assert (counts[0] == counts[1]) is parted
    assert sum(counts[0].values()) == sum(counts[1].values())
    image, target = next(found.batches("train", 1))
    assert image.shape[-2:] == target.shape[-2:]


def broken_mask(root: Path, how: str, name: str = "test/masks/im12.png") -> None:
    file = root / name
    if how == "value":
        Image.fromarray(np.full(SIZE[::-1], 9, np.uint8)).save(file)
    elif how == "size":
        Image.fromarray(np.zeros((5, 5), np.uint8)).save(file)
    elif how == "colour":
        picture(12).save(file)
    elif how == "text":
        file.write_text("no image")
    else:
        file.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("value", r"im12.png: holds the values 9. Expected classes 0 to 2, or 7 where"),
        ("size", r"im12.png: is 5 x 5 pixels, its image 80 x 60"),
        ("colour", r"im12.png: is a mask of mode RGB"),
        ("text", r"im12.png: is not a readable mask"),
        ("absent", r"'im12' has no mask"),
    ],
)
def test_bad_masks_are_refused_with_their_file(tmp_path, how, message):
    settings = masks(tmp_path)
    broken_mask(tmp_path, how)
    with pytest.raises(DataError, match=message):
        list(load_data(settings).batches("test"))


@pytest.mark.parametrize("how", ["value", "size"])
@pytest.mark.parametrize("name", ["train/masks/im03.png", "val/masks/im11.png"])
def test_bad_masks_are_refused_before_any_of_them_is_used(tmp_path, name, how):
    settings = masks(tmp_path)
    broken_mask(tmp_path, how, name)
    with pytest.raises(DataError, match=f"{name}: (holds the values 9|is 5 x 5 pixels)"):
        load_data(settings)


def test_masks_read_at_once_and_one_by_one_are_equal(tmp_path, monkeypatch):
    at_once = load_data(masks(tmp_path)).splits["test"].labels
    monkeypatch.setattr("compress.data._images.LARGEST_IN_MEMORY_BYTES", 0)
    images = load_data(masks(tmp_path / "again")).splits["test"]
    assert (images.labels.tensors().numpy() == at_once).all()


@pytest.mark.parametrize("kind", ["masks", "voc"])
def test_a_stray_value_in_masks_without_names_of_classes_is_no_class(tmp_path, kind):
    if kind == "masks":
        settings = masks(tmp_path).model_copy(update={"options": {"void": 7}})
    else:
        settings = voc(tmp_path).model_copy(update={"options": {"labels": "masks"}})
    assert load_data(settings).classes == ("0", "1", "2")
    file = tmp_path / ("train/masks" if kind == "masks" else "SegmentationClass") / "im03.png"
    mask = np.array(Image.open(file))
    mask[30, 30] = 77
    Image.fromarray(mask).save(file)
    with pytest.raises(DataError, match=r"im03.png: holds the value 77, and no") as caught:
        load_data(settings)
    assert "no mask holds 3, 4, 5" in str(caught.value)
    assert ("counts for nothing: void: 77" in str(caught.value)) == (kind == "masks")


def test_masks_of_black_and_white_say_which_value_is_which_class(tmp_path):
    settings = masks(tmp_path)
    for file in tmp_path.glob("*/masks/*.png"):
        mask = np.array(Image.open(file))
        Image.fromarray(np.where(mask == 1, 255, 0).astype(np.uint8)).save(file)
    alone = settings.model_copy(update={"options": {}})
    with pytest.raises(DataError, match=r"hold 0, 255, and 255 counts nowhere.*values: \[0, 255\]"):
        load_data(alone)
    for options in (
        {"values": [0, 255], "void": None},
        {"values": [0, 255], "classes": ["a", "b"]},
    ):
        dataset = load_data(settings.model_copy(update={"options": options}))
        assert len(dataset.classes) == 2
        _, target = next(dataset.batches("test"))
        assert set(target.unique().tolist()) == {0, 1, 255}  # 255: padding of the letterbox
        red = dataset.splits["test"].take([0, 1])[:, 0] > 200
        assert ((target == 1) == red).float().mean() > 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": [0, 300]}, "no pixel of value 300. Expected 0 to 255"),
        ({"void": -1}, "no pixel of value -1"),
        ({"values": [0, 255], "classes": ["a"]}, "2 values of 1 classes"),
    ],
)
def test_values_that_no_mask_can_hold(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        load_data(masks(tmp_path).model_copy(update={"options": options}))


needs = pytest.mark.skipif(not (DATA / "bccd").is_dir(), reason=f"{DATA} holds no bccd, camvid")


@needs
def test_blood_cells_are_read_and_their_own_boxes_score_perfectly():
    settings = DataSettings(name="voc", root=str(DATA / "bccd"), image_size=(96, 128))
    with pytest.raises(DataError, match=r"BloodImage_003\d\d.xml, line \d+: .* has no area"):
        load_data(settings)
    dataset = load_data(settings.model_copy(update={"options": {"invalid": "drop"}}))
    assert dataset.classes == ("Platelets", "RBC", "WBC")
    assert len(dataset.splits["test"]) == 72
    task = load_task("detection", classes=dataset.classes)
    targets = dataset.splits["test"].labels.tensors()
    sure = [{**each, "scores": torch.ones(len(each["labels"]))} for each in targets]
    found = [task.score(p, t) for p, t in zip(task.predict({"x": sure}), targets, strict=True)]
    assert tasks.metrics(task, found)["map50_95"].value == pytest.approx(100)


@needs
def test_street_scenes_are_read():
    settings = DataSettings(
        name="masks", root=str(DATA / "camvid"), image_size=(90, 120), options={"void": 11}
    )
    dataset = load_data(settings)
    assert len(dataset.classes) == 11
    assert {name: len(s) for name, s in dataset.splits.items() if name != "calibration"} == {
        "train": 294,
        "validation": 101,
        "test": 233,
    }
    images, target = next(dataset.batches("test", 4))
    assert images.shape == (4, 3, 90, 120) and target.shape == (4, 90, 120)
    assert set(target.unique().tolist()) <= {*range(11), 255}


def test_labels_that_lie_elsewhere_are_missed_before_training(tmp_path):
    settings = yolo(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "annotations")
    with pytest.raises(DataError, match=r"im00.txt: none of the 10 train images has an object"):
        load_data(settings)


def test_a_label_file_that_is_no_text_is_named(tmp_path):
    settings = yolo(tmp_path)
    (tmp_path / "labels" / "train" / "im02.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"im02.txt: is no readable text"):
        load_data(settings)


def test_a_value_of_masks_belongs_to_one_class() -> None:
    with pytest.raises(UsageError, match="one value twice"):
        MaskKind(root="somewhere", values=(0, 0))


def test_coco_is_found_as_it_comes(tmp_path):
    """Annotations of each part in annotations/instances_PART.json, its images in PART."""
    (tmp_path / "annotations").mkdir()
    for part in ("train2017", "val2017"):
        made = Path(coco(tmp_path / "made" / part).root)
        made.rename(tmp_path / "annotations" / f"instances_{part}.json")
        (made.parent / "images").rename(tmp_path / part)
    root, test = (str(tmp_path / f"annotations/instances_{n}2017.json") for n in ("train", "val"))
    data = load_data(
        DataSettings(name="coco", root=root, options={"test": test}, image_size=64, calibration=8)
    )
    assert len(data.splits["test"]) == 14
