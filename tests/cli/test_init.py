"""compress init: what it finds, what it proposes, and that its recipe can be run."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from compress.cli import app
from compress.cli.contents import data_in
from compress.models import load_model
from compress.recipe.loading import load_recipe

FILE = '''
from torch import nn


class Part(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)

    def forward(self, x):
        return self.conv(x)


class Small(nn.Module):
    """For 20 x 20 pixels and nothing else."""

    def __init__(self, num_classes=10, width=4):
        super().__init__()
        self.part = Part(width)
        self.fc = nn.Linear(width * 9 * 9, num_classes)

    def forward(self, x):
        return self.fc(nn.functional.max_pool2d(self.part(x), 2).flatten(1))


def wide(num_classes=2):
    return Small(num_classes, width=6)


def helper(x, y):
    return x + y
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two networks in a file, and photos of two classes in a folder."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(FILE.replace("20 x 20", "20 x 20"))
    for shade, name in ((10, "dark"), (240, "light")):
        folder = tmp_path / "data" / "photos" / name
        folder.mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (24, 20), (shade, number, 0)).save(folder / f"{number}.png")
    return tmp_path


@pytest.fixture
def compress(monkeypatch, capsys):
    def call(*arguments, answers=None):
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        terminal = io.StringIO(answers or "")
        terminal.isatty = lambda: answers is not None
        monkeypatch.setattr(sys, "stdin", terminal)
        with pytest.raises(SystemExit) as ended:
            app.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


def test_the_checkpoint_says_which_network_and_the_network_which_size(here, compress):
    torch.save(load_model("net.py:wide").state_dict(), "trained.pt")
    code, out, err = compress("init", "--image-size", "20")
    assert code == 0, err
    assert "network net.py:wide with trained.pt" in out
    recipe = load_recipe("compress.yaml")
    assert recipe.data.root == "data/photos"
    assert [stage.verb for stage in recipe.stages] == ["prune", "distill", "quantize"]
    code, _, err = compress("check", "compress.yaml")
    assert code == 0, err
    text = Path("compress.yaml").read_text()
    assert "# the original teaches what is left of it" in text
    steps = 26 // recipe.stages[1].distill.batch_size
    assert steps >= 3
    assert recipe.stages[0].prune.round_to == "auto"


def test_weights_that_are_not_used_are_told_with_the_reason(here, compress):
    torch.save(load_model("net.py:wide"), "whole.pt")
    code, out, err = compress("init", "--image-size", "20")
    assert code == 0 and "with whole.pt" not in out
    assert "the weights that lie here are not used. whole.pt: refused" in err
    assert "Save its state_dict() again" in err


def test_of_several_weights_those_that_fit_are_taken_and_the_others_told(here, compress):
    Path("runs").mkdir()
    torch.save(load_model("net.py:wide", num_classes=2).state_dict(), "runs/best.pt")
    torch.save(load_model("net.py:Small", num_classes=7).state_dict(), "newer.pt")
    code, out, err = compress("init", "--image-size", "20")
    assert code == 0, err
    assert "network net.py:wide with runs/best.pt" in out
    assert "runs/best.pt is taken, not newer.pt" in err


def test_subclasses_are_not_taken_for_the_classes(tmp_path, monkeypatch, compress):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(FILE)
    for place in ("ants/small", "ants/large", "bees/small", "bees/large"):
        pictures(tmp_path / "photos" / place)
    code, _, err = compress("init")
    assert code == 2
    assert "imagefolder:photos/ants and imagefolder:photos/bees both hold classes" in err
    assert "--data imagefolder:photos if its folders are the classes" in err
    assert not Path("compress.yaml").exists()


def pictures(folder, count=8):
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (24, 20), (number, 9, len(folder.name))).save(folder / f"{number}.png")


@pytest.mark.parametrize(
    ("folders", "files", "found"),
    [
        (("set/train/ants/2019", "set/train/bees/2019", "set/val/ants/1"), (), "imagefolder:set"),
        (("set/images", "set/masks"), (), "masks:set"),
        (("set/images/train", "set/images/val", "set/masks/train"), (), "masks:set"),
        (("set/images", "set/labels"), (), "masks:set"),
        (("set/images/training", "set/annotations/training"), (), "masks:set"),
        (
            ("set/train2017", "set/val2017"),
            ("captions_train2017", "instances_train2017", "instances_val2017"),
            "coco:root=set/annotations/instances_train2017.json,"
            "test=set/annotations/instances_val2017.json",
        ),
        (("photos/2019",), (), "images:photos/2019"),
    ],
)
def test_kinds_of_data_are_known_by_their_folders(tmp_path, monkeypatch, folders, files, found):
    monkeypatch.chdir(tmp_path)
    for folder in folders:
        pictures(Path(folder))
    for name in files:
        Path("set/annotations").mkdir(exist_ok=True)
        Path("set/annotations", f"{name}.json").write_text("{}")
    assert next(data_in(Path())) == found


def test_pictures_without_labels_are_quantized_on(here, compress):
    from compress.export import export_onnx

    export_onnx(load_model("net.py:Small", num_classes=2), torch.zeros(1, 3, 20, 20), "net.onnx")
    Path("net.py").unlink()
    code, _, err = compress("init", "--data", "images:data", "--target", "openvino")
    assert code == 0, err
    recipe = load_recipe("compress.yaml")
    assert (recipe.task, [stage.verb for stage in recipe.stages]) == ("fidelity", ["quantize"])


@pytest.mark.parametrize(("count", "keep"), [(40, "best"), (12, "last")])
def test_without_labels_the_start_is_kept_where_distillation_worsens_it(
    here, compress, count, keep
):
    pictures(Path("seen"), count)
    assert compress("init", "--data", "images:seen", "--image-size", "20", "--yes")[0] == 0
    recipe = load_recipe("compress.yaml")
    assert [stage.verb for stage in recipe.stages] == ["prune", "distill", "quantize"]
    assert recipe.stages[1].distill.keep == keep  # of 12 none is held back


def test_without_weights_the_network_is_trained_first(here, compress):
    assert compress("init", "--image-size", "20", "--keep-macs", "0.7")[0] == 0
    recipe = load_recipe("compress.yaml")
    assert [stage.verb for stage in recipe.stages][:2] == ["train", "prune"]
    assert recipe.stages[1].prune.keep_macs == 0.7
    code, _, err = compress("init")
    assert (code, "compress.yaml is there already" in err) == (2, True)


def test_a_network_that_takes_one_size_is_given_it(here, compress):
    Path("net.py").write_text(FILE.replace("width * 9 * 9", "width * 15 * 15"))
    assert compress("init")[0] == 0
    assert load_recipe("compress.yaml").data.image_size == 32


SAME_SIZE = """
from torch import nn


class Any(nn.Sequential):
    def __init__(self, num_classes=2):
        super().__init__(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(16, num_classes))


class Halved(Any):
    def forward(self, x):
        if x.shape[2] % 4 or x.shape[3] % 4 or x.shape[2] < 32:
            raise ValueError("not a multiple of 4")
        return super().forward(x)
"""


@pytest.mark.parametrize(
    ("network", "sizes", "proposed"),
    [
        ("Any", [(24, 20)], (20, 24)),
        ("Halved", [(24, 20)], 32),
        ("Any", [(50, 40), (40, 60)], 64),
        ("Any", [(300, 250), (250, 300)], None),
    ],
)
def test_small_pictures_are_not_enlarged(tmp_path, monkeypatch, compress, network, sizes, proposed):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(SAME_SIZE)
    for name in ("dark", "light"):
        Path("photos", name).mkdir(parents=True)
        for number in range(20):
            picture = Image.new("RGB", sizes[number % len(sizes)], (number, len(name), 0))
            picture.save(Path("photos", name, f"{number}.png"))
    code, _, err = compress("init", "--model", f"net.py:{network}")
    assert code == 0, err
    assert load_recipe("compress.yaml").data.image_size == proposed


@pytest.mark.parametrize("images", [16, 26, 100, 1000])
def test_a_proposed_training_takes_enough_steps(images):
    from compress.cli.init import Proposal
    from compress.data import load_data
    from compress.pipeline.cautions import of_training
    from compress.recipe.loading import validate_recipe
    from compress.recipe.settings import DataSettings

    proposal = Proposal("m", None, {}, "", images, 0, "classification", "top-1", True, (), 0.5)
    settings = {"epochs": proposal.epochs, "batch_size": proposal.batch_size}
    content = {"model": {"name": "compress.models.cifar:resnet8"}, "data": {"name": "digits"},
               "stages": [{"train": settings}]}  # fmt: skip
    dataset = load_data(DataSettings(name="digits")).with_fewer("train", images)
    assert list(of_training(validate_recipe(content, where="it"), dataset)) == []


def test_what_is_missing_is_told_where_no_network_is_found(here, compress):
    state = load_model("net.py:wide").state_dict()
    Path("net.py").unlink()
    torch.save({"epoch": 3, "state_dict": state}, "best.pt")
    code, _, err = compress("init")
    assert code == 2 and "best.pt holds the weights of one, 4 tensors from part.conv.weight" in err
    assert "and not its code. Name it: --model FILE.py:NAME, torchvision:NAME" in err
    Path("best.pt").unlink()
    torch.save(nn.Linear(2, 2), "whole.pt")
    Path("net.py").write_text(FILE.replace("from torch", "from absent_package"))
    code, _, err = compress("init")
    assert code == 2 and "absent_package" in err and "whole.pt: refused" in err


def test_an_onnx_file_is_quantized_in_its_own_size(here, compress):
    from compress.export import export_onnx

    model = load_model("net.py:Small", num_classes=2)
    export_onnx(model, torch.zeros(1, 3, 20, 20), "net.onnx")
    Path("net.py").unlink()
    code, out, err = compress("init", "--target", "openvino")
    assert code == 0, err
    recipe = load_recipe("compress.yaml")
    assert (recipe.model.name, recipe.data.image_size) == ("net.onnx", 20)
    assert [stage.verb for stage in recipe.stages] == ["quantize"]
    assert [target.runtime for target in recipe.targets] == ["openvino"]
    assert "task classification, targets openvino" in out


def test_it_asks_on_a_terminal_and_proposes_what_it_found(here, compress):
    answers = "\nnet.py:Small\n0.25\n"
    code, out, err = compress("init", "--image-size", "20", answers=answers)
    assert code == 0, err
    assert "data [imagefolder:data/photos]" in err
    assert "network [net.py:" in err
    recipe = load_recipe("compress.yaml")
    assert recipe.model.name == "net.py:Small"
    assert recipe.stages[1].prune.keep_macs == 0.25
    assert "can be run" in out


def test_what_cannot_be_found_is_asked_for(tmp_path, monkeypatch, compress):
    monkeypatch.chdir(tmp_path)
    code, _, err = compress("init")
    assert (code, err) == (2, "compress: no data was found here. Name it: --data KIND:PLACE.\n")
    np.savez("d.npz", x_train=np.zeros((40, 8, 8), np.uint8), y_train=np.arange(40) % 2,
             x_test=np.zeros((4, 8, 8), np.uint8), y_test=np.arange(4) % 2)  # fmt: skip
    code, _, err = compress("init")
    assert code == 2 and "no network was found here. Name it: --model FILE.py:NAME" in err
    assert (
        compress("init", "--model", "compress.models.cifar:resnet8", "--data", "npz:d.npz")[0] == 2
    )
    assert not Path("compress.yaml").exists()


def test_masks_are_segmented_and_not_distilled(tmp_path, monkeypatch, compress):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 4)):
        for kind, shape in (("images", (16, 16, 3)), ("masks", (16, 16))):
            (tmp_path / "street" / part / kind).mkdir(parents=True)
            for n in range(count):
                pixels = random.integers(0, 3, shape).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "street" / part / kind / f"{n}.png")
    code, out, err = compress(
        "init", "--model", "compress.models.cifar:unet", "--image-size", "16", "--out", "s.yaml"
    )
    assert code == 0, err
    assert "task segmentation" in out
    recipe = yaml.safe_load(Path("s.yaml").read_text())
    assert [next(iter(stage)) for stage in recipe["stages"]] == [
        "train", "prune", "finetune", "quantize",
    ]  # fmt: skip


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path, compress):
    code, out, err = compress("init", tmp_path / "nowhere", "--yes")
    assert (code, out) == (2, "")
    assert "nowhere: no such folder. Expected the folder where network, weights and images" in err


@pytest.mark.parametrize(
    ("model", "said"),
    [("nope.py:Net", "nope.py: no such file"), ("net.py:Smal", "Did you mean 'Small'?")],
)
def test_a_network_that_is_not_there_is_told_once_and_before_images_are_read(
    here, compress, model, said
):
    torch.save(load_model("net.py:wide").state_dict(), "trained.pt")
    Path("data/photos/dark/0.png").write_bytes(b"no picture")
    code, out, err = compress("init", "--model", model)
    assert (code, out) == (2, "")
    assert err.count(said) == 1 and err.count("\n") == 1
    assert not Path("compress.yaml").exists()


def test_a_network_that_cannot_be_built_is_told_once(here, compress):
    torch.save(load_model("net.py:wide").state_dict(), "trained.pt")
    code, _, err = compress("init", "--model", "net.py:Part", "--image-size", "20")
    assert code == 2 and err.count("cannot be built") == 1 and "not used" not in err


BOX = "<object><name>cell</name><bndbox><xmin>{}</xmin><ymin>4</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"  # noqa: E501 - one line of XML


def test_boxes_that_are_none_are_left_out_and_told(tmp_path, monkeypatch, compress):
    monkeypatch.chdir(tmp_path)
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / "cells" / part).mkdir(parents=True)
    names = [str(number) for number in range(24)]
    for name in names:
        Image.new("RGB", (64, 64), (int(name), 0, 0)).save(f"cells/JPEGImages/{name}.jpg")
        boxes = BOX.format(3) + (BOX.format(9) if name == "7" else "")  # of no width
        Path(f"cells/Annotations/{name}.xml").write_text(f"<annotation>{boxes}</annotation>")
    for part, chosen in (("train", names[:16]), ("val", names[16:20]), ("test", names[20:])):
        Path(f"cells/ImageSets/Main/{part}.txt").write_text("\n".join(chosen))
    arguments = ("--model", "compress.models.detector:detector", "--image-size", "64")
    code, out, err = compress("init", *arguments)
    assert code == 0, err
    assert "task detection" in out
    assert "7.xml" in err and "has no area. The recipe leaves such boxes out" in err
    recipe = load_recipe("compress.yaml")
    assert recipe.data.options == {"invalid": "drop"}
    code, _, err = compress(
        "init", "--data", "voc:root=cells,invalid=refuse", *arguments, "--force"
    )
    assert code == 2 and "has no area" in err
