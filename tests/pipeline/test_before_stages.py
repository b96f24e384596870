"""What is found before the first stage, and folders of runs: free, numbered, moved."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml

from compress import pipeline
from compress.errors import RecipeError
from compress.export import export_onnx
from compress.models import load_model
from compress.quantize import quantize_onnx
from compress.recipe.loading import from_anywhere, validate_recipe
from compress.report.run_folder import RunFolder, default_folder

OWN = """
from torch import nn


def net(num_classes=10, channels=1):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, num_classes),
    )
"""
CUT = {"prune": {"criterion": "l1", "keep_macs": 0.6}}
QUICK = {"rounds": 3, "round_ms": 2, "test_images": 16}


def content(model, *stages, **changes):
    return {
        "model": {"name": model},
        "data": {"name": "digits", "calibration": 16},
        "stages": list(stages),
        "targets": [{"runtime": "onnxruntime", "precision": "fp32"}],
        "measure": QUICK,
    } | changes


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(OWN)
    return tmp_path


def exported(channels=1, classes=10):
    torch.manual_seed(0)
    model = load_model("net.py:net", num_classes=classes, options={"channels": channels})
    return export_onnx(model, torch.zeros(1, channels, 8, 8), Path(f"{channels}-{classes}.onnx"))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"name": "net.py:net", "options": {"channels": 3}}, "its forward pass fails on an input"),
        ({"name": "net.py:net", "num_classes": 7}, "the data has 10 classes"),
        ({"name": "1-7.onnx"}, "has 7 class outputs, the data has 10"),
    ],
)
def test_check_and_run_find_a_network_that_does_not_fit(here, compress, model, said):
    exported(1, 7)
    stage = {"quantize": {}}
    Path("r.yaml").write_text(yaml.safe_dump(content("", stage) | {"model": model}))
    for command in (["check", "r.yaml"], ["run", "r.yaml", "--out", "r"]):
        code, out, err = compress(*command, "--trust")
        assert (code, out) == (2, ""), err
        assert ": model: " in err or ": data: " in err
        assert said in err
    assert not Path("r").exists()


def test_check_builds_networks_that_fit(here, compress):
    exported()
    for model in ("net.py:net", "1-10.onnx"):
        Path("r.yaml").write_text(yaml.safe_dump(content(model, {"quantize": {}})))
        code, out, err = compress("check", "r.yaml", "--trust")
        assert (code, out) == (0, "r.yaml: can be run\n"), err


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"quantize": {"method": "nosuch"}}], "stages[0].quantize.method: no such method"),
        ([{"prune": {"keep_macs": 0.5, "exclude": ["fc"]}}], "stages[0].prune.exclude: no such la"),
        ([{"train": {"freeze_until": "fc"}}], "stages[0].train.freeze_until: no such layer 'fc'"),
        ([{"train": {"layer_lr": {"fc": 1}}}], "stages[0].train.layer_lr: no such layer 'fc'"),
        (
            [{"quantize": {"qat": {"freeze_until": "fc"}}}],
            "stages[0].quantize.qat.freeze_until: no such layer 'fc'",
        ),
        ([{"distill": {"teacher": "no.py:x"}}], "stages[0].distill.teacher: no.py: no such file"),
        (
            [{"distill": {"teacher": "net.py:net", "teacher_weights": "no.pt"}}],
            "stages[0].distill.teacher_weights: no.pt: no such file",
        ),
    ],
)
def test_names_are_known_before_the_first_stage(here, stages, said):
    chosen = validate_recipe(content("net.py:net", *stages), where="r")
    with pytest.raises(RecipeError) as error:
        pipeline.run(chosen, "out")
    assert said in str(error.value)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (
            {"prune": {"keep_macs": 0.5, "round_to": 1000}},
            ".prune: keep_macs = 0.5 cannot be reached",
        ),
        ({"prune": {"keep_macs": 0.5, "outputs": ["5"]}}, ".prune: .*has no output '5'"),
        ({"prune": {"keep_latency": 0.5, "outputs": ["5"]}}, ".prune: .*has no output '5'"),
        ({"prune": {"keep_channels": {"9": 0.5}}}, ".prune: .*there is no layer '9'"),
        (
            {"prune": {"keep_latency": 0.5, "runtime": "nosuch"}},
            ".prune.runtime: no such runtime 'nosuch'",
        ),
        ({"distill": {"teacher": "net.py:wide"}}, ".distill: .*the teacher has 12 class outputs"),
        (
            {"distill": {"teacher": "net.py:net", "teacher_weights": "other.pt"}},
            ".distill: other.pt",
        ),
        (
            {"distill": {"losses": [{"hint": {"layers": {"9": "2"}}}]}},
            ".distill: the student: no such layer .*'9'",
        ),
        ({"quantize": {"exclude": ["fc"]}}, ".quantize: no such node 'fc'. .*node_linear"),
    ],
)
def test_what_a_stage_would_refuse_is_found_before_the_training(here, stage, said):
    Path("net.py").write_text(OWN + "\n\ndef wide(num_classes=10):\n    return net(12)\n")
    torch.save({"0.weight": torch.zeros(1)}, "other.pt")
    given = content("net.py:net", {"train": {}}, stage)
    with pytest.raises(RecipeError, match=rf"stages\[1\]{said}"):
        pipeline.run(validate_recipe(given, where="r"), "out")
    assert not Path("out").exists()


def test_a_file_in_int8_and_nodes_that_it_lacks_are_found_before_the_first_stage(here, compress):
    path = exported()
    images = [np.random.default_rng(0).normal(size=(8, 1, 8, 8)).astype(np.float32)]
    quantize_onnx(path, images, "int8.onnx", method="plain")
    for name, options, said in (
        ("int8.onnx", (), "quantized already"),
        (str(path), ("--exclude", "fc"), "no such node 'fc'"),
        (str(path), ("--target", "pytorch"), "targets[0]: pytorch runs no int8 graph"),
    ):
        code, _, err = compress("quantize", name, "--data", "digits", "--out", "q", *options)
        assert (code, said in err, "00-" in err) == (2, True, False), err
        assert not Path("q").exists()


@pytest.mark.parametrize("wanting", [{"keep": "best"}, {"patience": 2}])
def test_validation_images_that_are_missing_are_found_before_the_first_stage(here, wanting):
    none = {"data": {"name": "digits", "validation": 0}}
    given = content("net.py:net", CUT, {"finetune": wanting}, **none)
    with pytest.raises(RecipeError, match=r"stages\[1\].finetune: .*no images are held back"):
        pipeline.run(validate_recipe(given, where="r"), "out")
    assert not Path("out").exists()


def test_too_few_calibration_images_are_found_before_the_first_stage(here):
    pixels, classes = np.zeros((32, 8, 8, 1), np.uint8), np.arange(32) % 10
    np.savez("few.npz", x_train=pixels[:12], y_train=classes[:12], x_test=pixels, y_test=classes)
    few = {"data": {"name": "npz", "root": "few.npz"}}
    chosen = validate_recipe(content("net.py:net", CUT, {"quantize": {}}, **few), where="r")
    with pytest.raises(RecipeError, match=r"stages\[1\].quantize: data 'npz' has 6 calibration im"):
        pipeline.run(chosen, "out")
    assert not Path("out").exists()


@pytest.mark.parametrize("command", [["prune", "--keep-macs", "0.5"], ["distill", "--teacher"]])
def test_an_onnx_file_is_not_trained_and_the_message_names_it(here, compress, command):
    exported()
    verb, *options = command
    given = [*options, "net.py:net"] if verb == "distill" else options
    code, _, err = compress(verb, "1-10.onnx", "--data", "digits", *given)
    assert code == 2
    assert "model.name is the ONNX file 1-10.onnx" in err
    assert "00-" not in err
    assert not Path("runs").exists()


def test_of_an_onnx_file_that_is_absent_only_that_is_said(here, compress):
    code, _, err = compress("prune", "net.onnx", "--data", "digits", "--num-classes", "3")
    assert code == 2
    (line,) = err.splitlines()
    assert "net.onnx: no such file" in line


def test_a_corrected_command_goes_on_in_the_same_folder(here, compress):
    exported()
    command = ["quantize", "1-10.onnx", "--data", "digits", "--samples", "16", "--out", "q"]
    quick = [f"measure.{key}={value}" for key, value in QUICK.items()]
    command += [part for each in quick for part in ("--set", each)]
    code, _, err = compress(*command, "--method", "plian")
    assert (code, "Did you mean 'plain'?" in err) == (2, True)
    code, _, err = compress(*command, "--method", "plain")
    assert code == 0, err


def test_the_default_folder_gets_a_number_when_it_is_taken(here):
    chosen = {n: validate_recipe({**content("net.py:net", CUT), "name": "p", "seed": n}, where="r")
              for n in (1, 2, 3)}  # fmt: skip
    assert default_folder(chosen[1]) == Path("runs/p")
    Path("runs/p-2").mkdir(parents=True)
    Path("runs/p-2/notes.txt").write_text("mine")
    for number, name in ((1, "p"), (2, "p-3"), (3, "p-4")):
        folder = default_folder(chosen[number])
        assert folder == Path("runs") / name
        opened = RunFolder.open(folder, from_anywhere(chosen[number]))
        opened.finish(opened.stage(0, "original"), {}, [])
    assert default_folder(chosen[2]) == Path("runs/p-3"), "an interrupted run goes on"


def test_paths_in_options_of_data_are_absolute_and_other_options_are_not(here):
    for name in ("train.json", "val.json", "mean.npy"):
        Path(name).write_text("{}")
    for name in ("split", "photos"):
        Path(name).mkdir()
    options = {"test": "val.json", "images": "photos"}
    inputs = {"mean.1": "mean.npy"}
    data = {"name": "coco", "root": "train.json", "options": options, "inputs": inputs}
    given = from_anywhere(validate_recipe(content("net.py:net", CUT, data=data), where="r")).data
    assert given.options == {"test": str(here / "val.json"), "images": str(here / "photos")}
    assert given.inputs == {"mean.1": str(here / "mean.npy")}
    data = {"name": "csv", "root": "train.json", "options": {"split": "split", "folder": "photos"}}
    given = from_anywhere(validate_recipe(content("net.py:net", CUT, data=data), where="r")).data
    assert given.options == {"split": "split", "folder": str(here / "photos")}


def test_a_run_works_from_any_directory_and_where_it_was_moved(here, monkeypatch):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (80, 8, 8, 1)).astype(np.uint8)
    labels = random.integers(0, 10, 60)
    np.savez("d.npz", x_train=pixels[20:], y_train=labels, x_test=pixels[:20], y_test=labels[:20])
    given = content("net.py:net", CUT, data={"name": "npz", "root": "d.npz", "calibration": 8})
    pipeline.run(validate_recipe(given, where="r"), "run")
    image = torch.zeros(1, 1, 8, 8)
    expected = load_model("run")(image)
    (here / "else").mkdir()
    monkeypatch.chdir(here / "else")
    torch.testing.assert_close(load_model(here / "run")(image), expected)
    stored = json.loads((here / "run" / "run.json").read_text())["recipe"]
    assert stored["data"]["root"] == str(here / "d.npz")
    assert stored["model"]["name"] == f"{here / 'net.py'}:net"
    shutil.move(here / "run", here / "else" / "moved")
    torch.testing.assert_close(load_model("moved")(image), expected)
    done = subprocess.run(
        [sys.executable, "-m", "compress", "run", "moved/recipe.yaml", "--out", "moved", "--trust"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_network_and_its_file_move_together(here, monkeypatch):
    from compress import save_model

    (here / "a" / "src").mkdir(parents=True)
    shutil.move("net.py", "a/src/net.py")
    save_model(load_model("a/src/net.py:net"), "a/runs/x", reference="a/src/net.py:net")
    shutil.move("a", "b")
    monkeypatch.chdir("/")
    assert isinstance(load_model(here / "b" / "runs" / "x"), torch.nn.Module)


MIXED = """
import torch
from torch import nn
from torch.nn import functional as F


class net(nn.Module):  # mixes kernels for each image: its groups are the images of a batch
    def __init__(self):
        super().__init__()
        self.first, self.route = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 2)
        self.kernels, self.last = nn.Parameter(torch.randn(2, 8 * 8 * 9) / 9), nn.Linear(8, 10)

    def forward(self, x):
        x = self.first(x).relu()
        count, channels, height, width = x.shape
        kernel = (self.route(x.mean((2, 3))).softmax(1) @ self.kernels).reshape(-1, 8, 3, 3)
        x = F.conv2d(x.reshape(1, -1, height, width), kernel, padding=1, groups=count)
        return self.last(x.reshape(count, -1, height, width).relu().mean((2, 3)))
"""


def test_a_network_that_no_free_batch_suits_runs_with_one_image_at_a_time(here):
    Path("mixed.py").write_text(MIXED)
    cut = {"prune": {"criterion": "l1", "keep_macs": 0.9}}
    recipe = content("mixed.py:net", cut, {"quantize": {"samples": 8, "method": "plain"}})
    recipe["targets"].append({"runtime": "onnxruntime", "precision": "int8"})
    report = pipeline.run(validate_recipe(recipe | {"name": "mixed"}, where="r"), here / "run")
    for variant in report.variants:
        graph = onnx.load(str(here / "run" / variant.artifact)).graph
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
        assert all(result.top1_pct is not None for result in variant.results)
    (told,) = [line for line in report.cautions if "one image at a time" in line]
    assert "another batch cannot be exported" in told


def test_check_takes_weights_of_losses_and_looks_at_options_of_data_and_task(here, compress):
    losses = [{"kd": {"weight": 0.5}}, {"hint": {"weight": 2}}]
    recipe = content("net.py:net", {"distill": {"losses": losses, "epochs": 1}})
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    assert compress("check", "r.yaml", "--trust")[0] == 0
    recipe["stages"][0]["distill"]["losses"] = [{"kd": {"weight": -1}}]
    recipe |= {
        "data": {"name": "digits", "options": {"sead": 1}},
        "task": {"segmentation": {"ignore": "x"}},
    }
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = compress("check", "r.yaml", "--trust")
    assert code == 2
    for told in (
        "data.options: kind of data 'digits' has no option 'sead'",
        "task: task 'segmentation': ignore is 'x'. Expected a whole number or null",
        "stages[0].distill.losses: loss 'kd': weight -1",
    ):
        assert told in err


@pytest.mark.parametrize("key", ["weights", "num_classes"])
def test_options_that_change_nothing_in_an_onnx_file_are_refused(here, compress, key):
    path = exported()
    Path("w.safetensors").touch()
    value = {"weights": "w.safetensors", "num_classes": "10"}[key]
    option = f"--{key.replace('_', '-')}"
    code, _, err = compress("quantize", path, "--data", "digits", option, value)
    assert code == 2
    assert f"model.{key}: changes nothing in the ONNX file" in err
    assert not Path("runs").exists()
