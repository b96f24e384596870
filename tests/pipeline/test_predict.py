"""`compress predict` answers as a program written by hand does, for every task and every file."""

import json

import numpy as np
import pytest
import torch
from networks_of_tasks import BOXES, FACTS, HEIGHT, WIDTH, network
from PIL import Image

import compress as package
from compress.data import load_data
from compress.recipe.settings import DataSettings
from compress.runtimes import build_engine

TALL, WIDE = 60, 100  # of the picture: its proportions are not those of the input


@pytest.fixture
def picture(tmp_path):
    """A photo-like picture: a ramp, with a light and a dark part."""
    rows, columns = np.mgrid[:TALL, :WIDE]
    pixels = np.stack([2 * columns, 255 - 3 * rows, 100 + columns - rows], 2)
    pixels[:, WIDE // 2 :] = pixels[:, WIDE // 2 :] // 2
    path = tmp_path / "picture.png"
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
    return path


def pixels_of(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def fed_by_hand(path, facts=FACTS):
    """Prepare a picture with torchvision: cover 32 x 48 over the crop, cut the centre out."""
    from torchvision.transforms.v2 import functional

    big = [round(side / facts["crop"]) for side in (HEIGHT, WIDTH)]
    scale = max(big[0] / TALL, big[1] / WIDE)
    size = [max(big[0], int(TALL * scale)), max(big[1], int(WIDE * scale))]
    small = functional.resize(pixels_of(path), size, antialias=True)
    cut = functional.center_crop(small, [HEIGHT, WIDTH]).float() / 255
    return functional.normalize(cut, facts["mean"], facts["std"])[None].numpy()


def run_by_hand(path, fed):
    import onnxruntime

    return onnxruntime.InferenceSession(path).run(None, {"x": fed})[0][0]


def answers(compress, tmp_path, *arguments):
    code, out, err = compress("predict", *arguments, "--json", tmp_path / "answers.json")
    assert (code, err) == (0, ""), err
    return json.loads((tmp_path / "answers.json").read_text()), out


def rows_of(compress, tmp_path, *arguments):
    return answers(compress, tmp_path, *arguments)[0]["images"][0]["answer"]


@pytest.mark.parametrize("nhwc", [False, True])
def test_classes_are_those_of_a_program_written_by_hand(compress, tmp_path, picture, nhwc):
    path = network(tmp_path / "net.onnx", "classes", FACTS | {"task": "classification"}, nhwc=nhwc)
    rows = rows_of(compress, tmp_path, path, picture)
    by_hand = fed_by_hand(picture)
    fed = by_hand.transpose(0, 2, 3, 1) if nhwc else by_hand
    logits = run_by_hand(path, fed)
    chances = torch.from_numpy(logits).softmax(0).numpy()
    assert [row["class"] for row in rows] == [FACTS["labels"][k] for k in np.argsort(-logits)]
    # Pillow rounds between the two directions of a resize, torchvision does not
    assert [row["probability"] for row in rows] == pytest.approx(
        np.sort(chances)[::-1].tolist(), abs=2e-3
    )


def test_probabilities_are_not_made_probabilities_again(compress, tmp_path, picture):
    facts = FACTS | {"task": "classification"}
    logits = rows_of(compress, tmp_path, network(tmp_path / "a.onnx", "classes", facts), picture)
    softmax = rows_of(compress, tmp_path, network(tmp_path / "b.onnx", "softmax", facts), picture)
    wanted = [row["probability"] for row in logits]
    assert [row["probability"] for row in softmax] == pytest.approx(wanted, abs=1e-5)


def test_a_file_that_a_stage_is_exported_to_carries_what_the_stage_says(
    compress, tmp_path, picture
):
    model = package.load_model("compress.models.cifar:resnet8", num_classes=3).eval()
    package.save_model(model, tmp_path / "stage", reference="compress.models.cifar:resnet8")
    example = torch.zeros(1, 3, HEIGHT, WIDTH)
    facts = FACTS | {"task": "classification", "image_size": [HEIGHT, WIDTH]}
    package.export_onnx(model, example, tmp_path / "stage" / "model.onnx", metadata=facts)
    out = tmp_path / "net.onnx"
    code, _, err = compress(
        "export", tmp_path / "stage", "--input-size", f"3,{HEIGHT},{WIDTH}", "--out", out
    )
    assert code == 0, err
    torch_too = answers(compress, tmp_path, tmp_path / "stage", picture, "--runtime", "pytorch")[0]
    assert torch_too["artifact"] == str(tmp_path / "stage")
    own, _ = answers(compress, tmp_path, tmp_path / "stage", picture)
    assert own["artifact"] == str(tmp_path / "stage" / "model.onnx")  # runs no code of anybody
    wanted = torch_too["images"][0]["answer"]
    assert own["images"][0]["answer"] == [
        row | {"probability": pytest.approx(row["probability"], abs=1e-4)} for row in wanted
    ]
    got = rows_of(compress, tmp_path, out, picture)
    assert [row["class"] for row in got] == [row["class"] for row in wanted]
    chances = [row["probability"] for row in wanted]
    assert [row["probability"] for row in got] == pytest.approx(chances, abs=1e-4)


def test_the_table_says_how_it_was_fed_and_what_was_found(compress, tmp_path, picture):
    path = network(tmp_path / "net.onnx", "classes", FACTS | {"task": "classification"})
    _, out = answers(compress, tmp_path, path, picture, picture)
    assert "fed 32 x 48 pixels: resize short side, crop 0.875, RGB, mean 0.4,0.5,0.6" in out
    assert out.count("picture.png") == 2
    assert all(name in out for name in FACTS["labels"])


def test_the_likeliest_classes_are_written_onto_the_picture(compress, tmp_path, picture):
    path = network(tmp_path / "net.onnx", "classes", FACTS | {"task": "classification"})
    answers(compress, tmp_path, path, picture, "--out", tmp_path / "drawn")
    drawn = np.asarray(Image.open(tmp_path / "drawn" / "picture.png"))
    times = drawn.shape[0] // TALL
    assert drawn.shape == (times * TALL, times * WIDE, 3)  # small pictures are enlarged
    assert min(drawn.shape[:2]) >= 320
    assert (drawn[:12, :12] != np.asarray(Image.open(picture)).repeat(times, 0)[:12, :12]).any()


@pytest.mark.parametrize(
    ("resize", "to_picture"),
    [
        # x / scale - left; a 60 x 100 picture covers 37 x 55 as 37 x 61, the centre is cut out
        ("short side", lambda x, y: ((x + 6) / (61 / 100), (y + 2) / (37 / 60))),
        ("squash", lambda x, y: (x * 100 / 48, y * 60 / 32)),
        ("letterbox", lambda x, y: (x / 0.48, (y - 2) / (28 / 60))),
    ],
)
@pytest.mark.parametrize("size", [1, 5])
def test_boxes_are_in_pixels_of_the_picture_as_it_was(
    compress, tmp_path, picture, resize, to_picture, size
):
    crop = 0.875 if resize == "short side" else 1.0
    facts = FACTS | {"task": "detection", "resize": resize, "crop": crop}
    path = network(tmp_path / "net.onnx", "boxes", facts)
    if size > 1:  # the same picture, larger: boxes grow with it
        Image.open(picture).resize((WIDE * size, TALL * size)).save(picture)
    found = answers(compress, tmp_path, path, picture, "--out", tmp_path / "drawn")[0]
    rows = found["images"][0]["answer"]
    assert [(row["class"], round(row["score"], 3)) for row in rows] == [
        ("dark", 0.9),
        ("light", 0.6),
    ]
    for row, (x1, y1, x2, y2, *_) in zip(rows, BOXES, strict=False):
        wanted = np.array([*to_picture(x1, y1), *to_picture(x2, y2)]) * size
        wanted = np.clip(wanted, 0, np.array([WIDE, TALL] * 2) * size)
        got = [row[key] for key in ("x1", "y1", "x2", "y2")]
        assert got == pytest.approx(wanted.tolist(), abs=0.6 * size)
    drawn = np.asarray(Image.open(tmp_path / "drawn" / "picture.png"))
    times = drawn.shape[0] // (TALL * size)
    x, y = round(times * (rows[1]["x1"] + rows[1]["x2"]) / 2), round(times * rows[1]["y1"])
    before = np.asarray(Image.open(picture)).repeat(times, 0).repeat(times, 1)
    assert (drawn[y, x] != before[y, x]).any()  # the upper edge of the second box


def test_an_upright_photo_is_what_boxes_are_told_of(compress, tmp_path):
    """A phone's photo lies on its side in the file; EXIF says how it is held."""
    path = network(tmp_path / "net.onnx", "boxes", FACTS | {"task": "detection"})
    lying, upright = Image.new("RGB", (60, 100), "red"), Image.new("RGB", (100, 60), "red")
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "lying.jpg", exif=exif)
    upright.save(tmp_path / "upright.jpg")
    found, _ = answers(compress, tmp_path, path, tmp_path / "lying.jpg", tmp_path / "upright.jpg")
    one, two = (each["answer"] for each in found["images"])
    assert one == two


@pytest.mark.parametrize("nhwc", [False, True])
def test_a_class_map_lies_where_the_pixels_are(compress, tmp_path, nhwc):
    """Left of a picture is dark, right is light; what the crop cut away is not claimed."""
    path = network(tmp_path / "net.onnx", "class map", FACTS | {"task": "segmentation"}, nhwc=nhwc)
    pixels = np.zeros((TALL, WIDE, 3), np.uint8)
    pixels[:, 70:] = 255
    Image.fromarray(pixels).save(tmp_path / "halves.png")
    found, _ = answers(
        compress, tmp_path, path, tmp_path / "halves.png", "--out", tmp_path / "drawn"
    )
    shares = {row["class"]: row["pixels_pct"] for row in found["images"][0]["answer"]}
    # 48 of 61 columns are seen: from 6 / 0.61 = 9.8 to 54 / 0.61 = 88.5; 60.2 of 78.7 are dark
    assert shares["dark"] == pytest.approx(100 * 60.2 / 78.7, abs=2)
    assert sum(shares.values()) == pytest.approx(100)
    drawn = np.asarray(Image.open(tmp_path / "drawn" / "halves.png"))
    times = drawn.shape[0] // TALL
    low = (TALL - 8) * times  # below the legend
    assert (drawn[low, 2 * times] == 0).all()  # cropped: as it was
    assert (drawn[low, 97 * times] == 255).all()
    assert (drawn[low, 30 * times] != 0).any()
    assert (drawn[low, 80 * times] != 255).any()


@pytest.mark.parametrize("nhwc", [False, True])
def test_a_restored_image_is_the_picture_that_is_written(compress, tmp_path, picture, nhwc):
    facts = FACTS | {"task": "restoration", "mean": [0.0] * 3, "std": [1.0] * 3}
    path = network(tmp_path / "net.onnx", "image", facts, nhwc=nhwc)
    rows = answers(compress, tmp_path, path, picture, "--out", tmp_path / "drawn")[0]
    drawn = np.asarray(Image.open(tmp_path / "drawn" / "picture.png"))
    wanted = fed_by_hand(picture, facts)[0].transpose(1, 2, 0) * 255 / 2
    assert np.abs(drawn - wanted).max() <= 1.5
    assert rows["images"][0]["answer"][0]["shape"] == "3x32x48"


def test_alike_pictures_are_each_others_nearest(compress, tmp_path):
    path = network(tmp_path / "net.onnx", "embedding", FACTS | {"task": "embedding"})
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, shade in (("a", 40), ("b", 200), ("c", 50)):
        Image.new("RGB", (50, 50), (shade, shade, shade)).save(folder / f"{name}.png")
    found, _ = answers(compress, tmp_path, path, folder)
    nearest = [each["answer"][0]["nearest"][-5] for each in found["images"]]
    assert nearest == ["c", nearest[1], "a"]
    assert len(found["images"][0]["answer"]) == 2


def test_outputs_without_a_task_are_told_by_shape_and_range(compress, tmp_path, picture):
    path = network(tmp_path / "net.onnx", "classes")
    found, out = answers(compress, tmp_path, path, picture)
    logits = run_by_hand(path, fed_by_hand(picture))
    (row,) = found["images"][0]["answer"]
    assert row["shape"] == "3"
    assert row["lowest"] == pytest.approx(logits.min(), abs=0.02)
    assert row["highest"] == pytest.approx(logits.max(), abs=0.02)
    assert "--task NAME" in out


OWN = '''
from dataclasses import dataclass
from compress.tasks import Kind, Task

@dataclass(frozen=True)
class Brightness(Task):
    """How bright a picture is."""

    classes: tuple = ()
    kinds = {"error": Kind("")}
    primary = "error"

    def loss(self, model, images, targets):
        return model(images).mean()

    def predict(self, outputs):
        return [{"brightness": row.mean()} for row in next(iter(outputs.values()))]

    def describe(self, predictions, images):
        return [[{"brightness": float(each["brightness"])}] for each in predictions]

    def draw(self, image, prediction):
        return 255 - image
'''


def test_an_own_task_tells_and_draws_its_answer(compress, tmp_path, picture):
    path = network(tmp_path / "net.onnx", "classes")
    (tmp_path / "own.py").write_text(OWN)
    task = f"{tmp_path}/own.py:Brightness"
    found, out = answers(
        compress, tmp_path, path, picture, "--task", task, "--out", tmp_path / "drawn"
    )
    logits = run_by_hand(path, fed_by_hand(picture))
    assert found["images"][0]["answer"] == [{"brightness": pytest.approx(logits.mean(), abs=0.02)}]
    assert "brightness" in out
    drawn = np.asarray(Image.open(tmp_path / "drawn" / "picture.png"))
    stage = tmp_path / "run" / "00-original"  # a run of this task says so itself
    stage.mkdir(parents=True)
    network(stage / "model.onnx", "classes")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"recipe": {"task": task}}))
    again = answers(compress, tmp_path, tmp_path / "run", picture, "--trust")[0]
    assert again["images"][0]["answer"] == found["images"][0]["answer"]
    assert drawn[0, 0].tolist() == (255 - np.asarray(Image.open(picture))[0, 0]).tolist()


def test_engine_saved_network_and_run_answer_alike(compress, tmp_path, picture):
    facts = FACTS | {"task": "classification"}
    path = network(tmp_path / "net.onnx", "classes", facts)
    stage = tmp_path / "run" / "01-quantize"
    stage.mkdir(parents=True)
    network(stage / "model.onnxruntime.onnx", "classes", facts)
    network(stage / "model.openvino.onnx", "classes", facts)
    engine = build_engine(path, tmp_path / "net.xml", runtime="openvino")
    wanted = rows_of(compress, tmp_path, path, picture)
    for artifact, options in ((engine, ()), (tmp_path / "run", ()), (stage, ())):
        got = rows_of(compress, tmp_path, artifact, picture, *options)
        assert [row["class"] for row in got] == [row["class"] for row in wanted]
        chances = [row["probability"] for row in wanted]
        assert [row["probability"] for row in got] == pytest.approx(chances, abs=1e-3)
    found, _ = answers(compress, tmp_path, stage, picture, "--runtime", "openvino")
    assert (found["runtime"], found["artifact"]) == ("openvino", f"{stage}/model.openvino.onnx")


def test_a_saved_network_is_fed_by_flags(compress, tmp_path, picture):
    model = package.load_model("compress.models.cifar:resnet8", num_classes=3).eval()
    package.save_model(model, tmp_path / "saved", reference="compress.models.cifar:resnet8")
    flags = ["--image-size", f"{HEIGHT},{WIDTH}", "--mean", "0.4,0.5,0.6", "--std", "0.2,0.25,0.3"]
    rows = rows_of(
        compress, tmp_path, tmp_path / "saved", picture, *flags, "--task", "classification"
    )
    with torch.no_grad():
        chances = model(torch.from_numpy(fed_by_hand(picture))).softmax(1)[0]
    got = {row["class"]: row["probability"] for row in rows}
    assert [got[str(k)] for k in range(3)] == pytest.approx(chances.tolist(), abs=5e-3)


def test_flags_feed_a_foreign_file_as_its_own_metadata_would(compress, tmp_path, picture):
    named = FACTS | {"task": "classification", "resize": "letterbox", "crop": 1.0}
    wanted = rows_of(compress, tmp_path, network(tmp_path / "own.onnx", "classes", named), picture)
    foreign = network(tmp_path / "foreign.onnx", "classes", {})
    mean, std = (",".join(str(255 * each) for each in FACTS[key]) for key in ("mean", "std"))
    got = rows_of(
        compress, tmp_path, foreign, picture, "--task", "classification", "--resize", "letterbox",
        "--input-range", "0,255", "--mean", mean, "--std", std,
    )  # fmt: skip
    chances = [row["probability"] for row in wanted]
    assert [row["probability"] for row in got] == pytest.approx(chances, abs=1e-4)
    assert [row["class"] for row in got] != [row["class"] for row in wanted]  # it has no labels


def damaged(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "fine.png")
    network(tmp_path / "foreign.onnx", "classes", {})
    network(tmp_path / "net.onnx", "classes", FACTS | {"task": "classification"})
    network(tmp_path / "stranger.onnx", "classes", FACTS | {"task": "juggling"})
    free = network(tmp_path / "free.onnx", "image", FACTS)
    import onnx

    model = onnx.load(free)
    for dim in model.graph.input[0].type.tensor_type.shape.dim:
        dim.dim_param = "any"
    onnx.save(model, free)
    build_engine(tmp_path / "net.onnx", tmp_path / "net.xml", runtime="openvino")
    stage = tmp_path / "two"
    stage.mkdir()
    for target in ("openvino", "tensorrt"):
        network(stage / f"model.{target}.onnx", "classes", FACTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net.onnx", "broken.jpg"], "broken.jpg: is not a readable image"),
        (["net.onnx", "absent.jpg"], "absent.jpg: no such file. Expected a picture."),
        (["net.onnx", "fine.png", "net.onnx"], "net.onnx: is not a readable image"),
        (["net.onnx", "empty"], "empty: holds no pictures"),
        (["absent.onnx", "fine.png"], "absent.onnx: no such file"),
        (["fine.png", "fine.png"], "fine.png"),
        (
            ["foreign.onnx", "fine.png"],
            "does not say how its images are normalized. Expected --mean",
        ),
        (["foreign.onnx", "fine.png", "--mean", "0.5"], "Expected --std, or --input-range"),
        (["free.onnx", "fine.png"], "does not say which size of images it takes"),
        (["net.onnx", "fine.png", "--mean", "0,0,0"], "mean is 0,0,0 by the data's settings"),
        (["net.onnx", "fine.png", "--resize", "letterbox"], "resize is letterbox by the data's"),
        (["net.onnx", "fine.png", "--image-size", "20"], "image_size is 20,20 by the data's"),
        (["net.xml", "fine.png", "--runtime", "onnxruntime"], "is an engine of openvino"),
        (["net.onnx", "fine.png", "--runtime", "tensort"], "no such runtime 'tensort'"),
        (["net.onnx", "fine.png", "--task", "classificaton"], "no such task 'classificaton'"),
        (["net.onnx", "fine.png", "--task", "segmentation"], "task segmentation does not fit"),
        (["stranger.onnx", "fine.png"], "stranger.onnx: no such task 'juggling'"),
        (["two", "fine.png"], "holds 2 networks"),
        (["net.onnx", "fine.png", "--crop", "7"], "crop"),
        (["net.onnx", "fine.png", "--threads", "0"], "threads is 0"),
    ],
)
def test_what_cannot_be_answered_is_a_sentence(compress, tmp_path, monkeypatch, arguments, message):
    damaged(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = compress("predict", *arguments, "--out", "drawn")
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "drawn").exists()


def test_hostile_names_are_shown_not_obeyed(compress, tmp_path, picture):
    facts = FACTS | {"task": "classification", "labels": ["\x1b[31mred", "a\nb", "[bold]x"]}
    path = network(tmp_path / "net.onnx", "classes", facts)
    _, out = answers(compress, tmp_path, path, picture, "--out", tmp_path / "drawn")
    assert "\x1b" not in out
    assert "[bold]x" in out


def test_pictures_of_the_size_that_arrays_had_are_not_cropped(compress, tmp_path):
    """A file from arrays names no rule: a picture of its own size is fed pixel by pixel."""
    facts = {key: value for key, value in FACTS.items() if key not in ("resize", "crop")}
    facts |= {"task": "restoration", "mean": [0.0] * 3, "std": [1.0] * 3}
    path = network(tmp_path / "net.onnx", "image", facts)
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    answers(compress, tmp_path, path, tmp_path / "noise.png", "--out", tmp_path / "drawn")
    drawn = np.asarray(Image.open(tmp_path / "drawn" / "noise.png")).astype(int)
    assert np.abs(drawn - pixels / 2).max() <= 1


def test_data_of_arrays_says_that_its_images_are_not_cropped():
    facts = load_data(DataSettings(name="digits")).facts()
    assert (facts["resize"], facts["crop"]) == ("squash", 1.0)
