"""The command line: exit codes, messages, and that wrong input writes nothing."""

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml

from compress.recipe.loading import stage_settings

RECIPE = {
    "model": {"name": "compress.models.cifar:resnet8", "options": {"in_channels": 1, "width": 4}},
    "data": {"name": "digits", "calibration": 16},
    "stages": [{"train": {"epochs": 1, "precision": "fp32"}}],
    "targets": [{"runtime": "onnxruntime", "precision": "fp32"}],
    "measure": {"rounds": 3, "round_ms": 5, "test_images": 32},
}


@pytest.fixture
def recipe(tmp_path):
    def written(**changes):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(RECIPE | changes))
        return path

    return written


@pytest.mark.slow
def test_help_answers_in_half_a_second():
    import time

    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "compress", "--help"], check=True, stdout=subprocess.PIPE)
    assert time.perf_counter() - start < 0.5


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['compress', '--help']\n"
        "from compress.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'onnx', 'pydantic', 'rich') if m in sys.modules],"
        " file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "quantize" in done.stdout


def test_an_unknown_command_is_a_user_error(compress):
    code, out, err = compress("squeeze")
    assert (code, out) == (2, "")
    assert "No such command 'squeeze'" in err


def test_a_dry_run_prints_the_resolved_recipe_and_writes_nothing(compress, recipe, tmp_path):
    path = recipe()
    code, out, _ = compress("run", path, "--dry-run", "--set", "seed=7")
    assert code == 0
    resolved = yaml.safe_load(out)
    assert resolved["seed"] == 7
    assert resolved["stages"][0]["train"]["momentum"] == 0.9
    assert list(tmp_path.iterdir()) == [path]


def test_check_lists_the_problems_of_all_recipes(compress, recipe, tmp_path):
    good = recipe()
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(RECIPE | {"model": {"name": "torchvision:resnet81"}, "sed": 1}))
    worse = tmp_path / "worse.yaml"
    worse.write_text(
        yaml.safe_dump(
            RECIPE
            | {
                "model": {"name": "none.py:net", "weights": "none.pth"},
                "data": {"name": "npz", "root": "/none"},
            }
        )
    )
    code, out, err = compress("check", good)
    assert (code, out) == (0, f"{good}: can be run\n")
    code, out, err = compress("check", good, bad, worse)
    assert (code, out) == (2, "")
    assert f"{bad}: sed: no such key. Did you mean 'seed'?" in err
    assert f"{worse}: model.name: none.py: no such file." in err
    assert f"{worse}: model.weights: none.pth: no such file. Expected a weight file." in err
    assert f"{worse}: data: /none: no such file or folder." in err
    code, _, err = compress("run", worse, "--trust")
    assert code == 2
    assert f"compress: {worse}: model.name: none.py: no such file." in err


@pytest.mark.parametrize("kind", ["criteria", "losses", "observers", "runtimes", "data"])
def test_list_names_every_plugin_with_its_first_line(compress, kind):
    from compress import plugins

    code, out, _ = compress("list", kind)
    assert code == 0
    for name in plugins.names(kind):
        assert f" {name} " in out
        assert plugins.documentation(kind, name).split("\n")[0][:40] in out


def test_version_is_that_of_the_package(compress):
    import compress as package

    assert compress("--version") == (0, f"compress {package.__version__}\n", "")
    assert package.__version__[0].isdigit()


def test_list_names_the_recipes_of_the_package(compress):
    code, out, _ = compress("list", "recipes")
    assert code == 0
    assert " quickstart " in out
    assert "The main job in two minutes" in out


def test_show_prints_the_options_of_every_stage(compress):
    for name in stage_settings():
        code, out, err = compress("show", f"stages/{name}")
        assert (code, err) == (0, ""), name
    code, out, _ = compress("show", "stages/train")
    assert "  lr (default 0.05): Peak learning rate" in out


def test_show_prints_the_options_of_a_stage(compress):
    code, out, _ = compress("show", "stages/prune")
    assert code == 0
    assert "keep_macs (default null): Share of the multiply-accumulates to keep" in out
    code, _, err = compress("show", "stages/prun")
    assert (code, "Did you mean 'prune'?" in err) == (2, True)


@pytest.mark.parametrize(
    ("kind", "name"), [("criteria", "obs"), ("stages", "prune"), ("recipes", "quickstart")]
)
def test_show_of_a_kind_without_a_name_lists_its_names(compress, kind, name):
    code, _, err = compress("show", kind)
    assert code == 2
    assert f"{kind!r} alone is no plug-in. Expected {kind}/NAME" in err
    assert name in err


def test_show_prints_a_recipe_of_the_package(compress):
    text = Path("recipes/quickstart.yaml").read_text()
    assert compress("show", "recipes/quickstart") == (0, text, "")
    code, _, err = compress("show", "recipes/quikstart")
    assert (code, "Did you mean 'quickstart'?" in err) == (2, True)


def test_show_prints_documentation_and_options(compress):
    code, out, _ = compress("show", "data/npz")
    assert code == 0
    assert "Arrays in a NumPy archive" in out
    assert "root: required (text)" in out
    code, out, _ = compress("show", "losses/kd")
    assert out.count("Logits are divided by it") == 1
    assert "\n  temperature: 4.0 (a number) Logits are divided by it; higher shows more" in out
    assert "Args:" not in out
    code, out, _ = compress("show", "data/masks")
    assert (code, "values: null (a list or null)" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "critera"], "no such kind 'critera'. Did you mean 'criteria'?"),
        (["show", "criteria/l7"], "no such criterion 'l7'. Did you mean"),
        (["show", "l1"], "no such kind 'l1'. Did you mean criteria/l1?"),
        (["show", "masks"], "Did you mean data/masks?"),
        (["run", "none.yaml"], "none.yaml: no such file. Expected a recipe, YAML."),
        (["check", "none.yaml"], "none.yaml: no such file"),
        (["sensitivity", "x", "--data", "digits"], "Expected one of --prune and --quantize"),
        (
            ["export", "compress.models.cifar:resnet8", "--out", "x", "--input-size", "3,32"],
            "3 whole",
        ),
        (["lint", "none.onnx", "--target", "tensorrt"], "none.onnx"),
        (["lint", "x.onnx", "--target", "tensorrt", "--out", "y"], "x.onnx"),
        (["report", "/none"], "/none: no such folder"),
        (["report", "/none", "--track", "wandb"], "no such tracker 'wandb'"),
        (["report", "/none", "/none"], "Give --out DIR"),
        (["verify", "/none"], "/none"),
        (["build", "none.onnx", "--runtime", "onnxruntime", "--out", "x.onnx"], "none.onnx"),
        (["build", "none.onnx", "--runtime", "onnx", "--out", "x"], "no such runtime 'onnx'"),
        (["bench", "none.onnx"], "none.onnx"),
        (["compare", "none.onnx", "other.onnx", "--data", "digits"], "none.onnx"),
        (
            ["prune", "compress.models.cifar:resnet8", "--data", "digit"],
            "no such kind of data 'digit'",
        ),
        (["prune", "torchvision:resnet81", "--data", "digits"], "no such torchvision network"),
        (["prune", "a.b:c", "--data", "digits", "--max-drop", "1"], "Add --keep-channels FILE"),
        (["sparsify", "a.b:c", "--data", "digits"], "a.b: cannot be imported"),
        (
            ["sparsify", "a.b:c", "--data", "digits", "--pattern", "4:8"],
            "stages[0].sparsify.pattern: '4:8' is none of the choices",
        ),
        (["quantize", "none.onnx", "--data", "digits"], "none.onnx: no such file"),
        (
            ["prune", "compress.models.cifar:resnet8", "--data", "digits", "--keep-macs", "1.5"],
            "stages[0].prune.keep_macs: 1.5: Input should be less than or equal to 1",
        ),
        (
            ["prune", "a.b:c", "--data", "digits", "--teacher", "a.b:c"],
            "--teacher without training. Say how long: --epochs N",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_message_and_exit_code_2(
    compress, monkeypatch, tmp_path, arguments, message
):
    monkeypatch.chdir(tmp_path)
    code, out, err = compress(*arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_classes_that_do_not_match_are_refused_before_any_work(compress, recipe, tmp_path):
    path = recipe(model=RECIPE["model"] | {"num_classes": 7})
    code, _, err = compress("run", path, "--out", tmp_path / "run")
    assert code == 2
    assert "mine.yaml: model: " in err
    assert "output has shape (1, 7) and the data has 10 classes" in err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_with_code_in_it_is_refused(compress, recipe, tmp_path):
    import os

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'hacked'}",)

    torch.save({"state_dict": {}, "extra": Payload()}, tmp_path / "evil.pth")
    code, _, err = compress(
        "run", recipe(), "--set", f"model.weights={tmp_path / 'evil.pth'}", "--out", tmp_path / "r"
    )
    assert code == 2
    assert "refused: it is not plain tensors" in err
    assert not (tmp_path / "hacked").exists()


def test_a_runtime_that_is_not_installed_names_its_extra(compress, recipe, monkeypatch):
    for name in ("compress.pipeline.check", "compress.runtimes._trt"):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "is_installed", lambda package: package != "tensorrt")
    path = recipe(targets=[{"runtime": "tensorrt", "precision": "fp32"}])
    code, _, err = compress("check", path)
    assert code == 2
    assert "targets[0]" in err
    assert "pip install 'compress-cnn[tensorrt]'" in err


def test_a_loss_that_is_not_a_number_names_stage_step_and_rate(compress, recipe, tmp_path):
    path = recipe(stages=[{"train": {"epochs": 3, "lr": 1e30, "precision": "fp32"}}])
    code, _, err = compress("run", path, "--out", tmp_path / "run")
    assert code == 2
    for part in ("stage 00-train", "step", "learning rate"):
        assert part in err


def test_one_verb_leaves_a_run_folder_like_any_other(compress, tmp_path):
    code, out, _ = compress(
        "prune",
        "compress.models.cifar:resnet8",
        *("--data", "digits", "--keep-macs", "0.5", "--criterion", "l1"),
        *("--out", tmp_path / "run"),
        *(
            "--set",
            "data.channels=3",
            "--set",
            "measure.test_images=16",
            "--set",
            "measure.rounds=3",
        ),
    )
    assert code == 0
    assert "pruned" in out
    report = (tmp_path / "run" / "report.json").read_text()
    assert '"schema": 1' in report
    assert (tmp_path / "run" / "01-prune" / "plan.json").is_file()


SMALL = ("--set", "data.channels=3", "--set", "measure.test_images=16", "--set", "measure.rounds=3")


@pytest.mark.parametrize("command", ["run", "train", "prune", "distill"])
def test_track_reaches_the_trainings_of_every_command(
    compress, recipe, tmp_path, monkeypatch, command
):
    """The recipe that is carried out says so; that trainings then log is tested with them."""
    from compress import pipeline

    seen = []
    monkeypatch.setattr(pipeline, "run", lambda recipe, *_, **__: seen.append(recipe))
    network, data = "compress.models.cifar:resnet8", ("--data", "digits", "--epochs", 1)
    arguments = {
        "run": (recipe(),),
        "train": (network, *data),
        "prune": (network, *data),
        "distill": (network, "--teacher", network, *data),
    }[command]
    assert compress(command, *arguments, "--track", "tensorboard")[0] == 0
    assert seen[0].stages[-1].settings.track == "tensorboard"
    code, _, err = compress(command, *arguments, "--track", "tensorbord")
    assert (code, len(seen)) == (2, 1)
    assert "no such tracker 'tensorbord'. Did you mean 'tensorboard'?" in err


def test_nodes_are_excluded_from_the_command_line(compress, monkeypatch):
    """As the message says of a graph that a runtime computes wrongly."""
    from compress import pipeline

    seen = []
    monkeypatch.setattr(pipeline, "run", lambda recipe, *_, **__: seen.append(recipe))
    network, nodes = "compress.models.cifar:resnet8", ("--exclude", "a", "--exclude", "b/c")
    assert compress("quantize", network, "--data", "digits", *nodes)[0] == 0
    assert seen[0].stages[-1].settings.exclude == ("a", "b/c")


def test_a_target_that_is_refused_does_not_take_the_others_with_it(
    compress, recipe, tmp_path, monkeypatch
):
    from compress.quantize.confirm import Confirmation

    right = Confirmation._in_runtime

    def answer(self, written, feeds, names, runtime):
        found = right(self, written, feeds, names, runtime)
        return [[-a for a in each] for each in found] if runtime == "openvino" else found

    monkeypatch.setattr(Confirmation, "_in_runtime", answer)
    path = recipe(
        model={"name": "compress.models.cifar:resnet8", "options": {"in_channels": 1}},
        stages=[{"quantize": {"method": "plain", "samples": 16}}],
        targets=[{"runtime": "onnxruntime"}, {"runtime": "openvino"}],
    )
    code, _, err = compress("run", path, "--out", tmp_path / "run")
    assert code == 2
    assert err.splitlines()[-1].startswith(
        f"compress: {tmp_path}/run: no int8 file was written for openvino"
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "openvino computes the int8 graph wrongly" in report["refused"]["openvino"]
    assert [each["name"] for each in report["variants"]] == ["original", "int8-onnxruntime"]
    assert "no stage wrote an int8 graph for openvino" in str(report["skipped"])
    assert "no int8 file was written for openvino: " in "".join(report["cautions"])
    assert compress("run", path, "--out", tmp_path / "run")[0] == 2  # nor when all is done


def test_track_without_training_is_refused(compress):
    code, _, err = compress(
        "prune", "compress.models.cifar:resnet8", "--data", "digits", "--track", "mlflow"
    )
    assert code == 2
    assert "--track: no stage trains a network, so there is nothing to log" in err


def test_zeroed_weights_stay_zero_through_training_and_int8(compress, recipe, tmp_path):
    path = recipe(
        model={"name": "compress.models.cifar:resnet8", "options": {"in_channels": 1}},
        stages=[
            {"sparsify": {"pattern": "2:4"}},
            {"finetune": {"epochs": 1, "precision": "fp32"}},
            {"quantize": {"method": "plain", "samples": 16}},
        ],
        targets=[{"runtime": "onnxruntime"}],
    )
    code, _, err = compress("run", path, "--out", tmp_path / "run")
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    found = {each["variant"]: each for each in report["details"]["sparsities"]}
    assert list(found) == ["sparse", "finetuned", "int8-onnxruntime"]
    for each in found.values():
        assert each["pattern"] == "2:4"
        assert 49 < each["zero_weights_pct"] < 56
        assert "zeros cost as much as other weights" in each["runtimes"]["onnxruntime"]
    trained = onnx.load(tmp_path / "run" / "02-finetune" / "model.onnx")
    fours = 0
    for tensor in trained.graph.initializer:
        if len(tensor.dims) == 4 and tensor.dims[1] % 4 == 0:
            weight = np.moveaxis(onnx.numpy_helper.to_array(tensor), 1, -1).reshape(-1, 4)
            assert ((weight != 0).sum(1) <= 2).all()
            fours += len(weight)
    assert fours > 1000


def test_the_verb_zeroes_the_share_it_is_told(compress, tmp_path):
    code, _, err = compress(
        "sparsify", "compress.models.cifar:resnet8", "--data", "digits", "--keep-weights", "0.3",
        "--criterion", "lamp", *SMALL, "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (found,) = report["details"]["sparsities"]
    assert found["zero_weights_pct"] == pytest.approx(70, abs=0.1)
    assert "Zeroed weights" in (tmp_path / "run" / "report.html").read_text()


def test_a_sensitivity_is_a_budget_for_every_layer(compress, tmp_path):
    network = ("compress.models.cifar:resnet8", "--data", "digits")
    curves = {
        "baseline_top1_pct": 90.0,
        "criterion": "l2",
        "curves": [
            {"group": "layer1.0.conv1", "size": 16, "layers": ["layer1.0.conv1"], "points": [
                {"keep_channels": 0.5, "kept": 8, "top1_pct": 89.9, "macs_share": 0.9},
                {"keep_channels": 0.25, "kept": 4, "top1_pct": 88.0, "macs_share": 0.8}]},
            {"group": "layer2.0.conv1", "size": 32, "layers": ["layer2.0.conv1"], "points": [
                {"keep_channels": 0.5, "kept": 16, "top1_pct": 70.0, "macs_share": 0.9}]},
        ],
    }  # fmt: skip
    file = tmp_path / "sensitivity.json"
    file.write_text(json.dumps(curves))
    code, _, err = compress(
        "prune", *network, "--keep-channels", file, "--max-drop", "0.5", *SMALL,
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    plan = json.loads((tmp_path / "run" / "01-prune" / "plan.json").read_text())
    kept = {name: each["kept"] for name, each in plan["tensors"].items()}
    assert sorted(kept["layer1.0.conv1.weight"]) == ["0"]
    assert not any(name.startswith("layer2") for name in kept)
    code, _, err = compress(
        "prune", *network, "--keep-channels", file, "--max-drop", "0.01", *SMALL
    )
    assert code == 2
    assert "no group can be cut without losing more" in err
    code, _, err = compress("prune", *network, "--keep-channels", tmp_path / "absent.json")
    assert code == 2
    assert "is no number and no file" in err


def test_an_interrupted_run_ends_with_130_and_says_how_to_go_on(compress, monkeypatch, recipe):
    from compress import pipeline

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    code, _, err = compress("run", recipe())
    assert code == 130
    assert "a run goes on where it stopped: give the same command" in err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("can't start new thread"),
        SystemError("error return without exception set"),
        ImportError("scipy/_core.so: failed to map segment from shared object"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_out_of_memory_is_one_sentence_anywhere(compress, monkeypatch, recipe, error):
    from compress import pipeline

    def hungry(*_, **__):
        raise error

    monkeypatch.setattr(pipeline, "run", hungry)
    code, _, err = compress("run", recipe())
    assert code == 2
    assert err.startswith("compress: out of memory. Make room")
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch\nat x"), KeyError("a"), OSError()])
def test_what_nobody_foresaw_is_a_sentence_and_a_file(
    compress, monkeypatch, tmp_path, recipe, error
):
    """Never exit code 1, which continuous integration reads as a failed gate."""
    from compress import pipeline

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(pipeline, "run", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, out, err = compress("run", recipe())
    assert (code, out) == (70, "")
    assert err.startswith(f"compress: this should not happen: {type(error).__name__}: ")
    assert err.count("\n") == 1
    (file,) = tmp_path.glob("compress-*-traceback.txt")
    assert f"in {file}" in err
    assert "in broken" in file.read_text()


def test_a_traceback_that_no_file_takes_is_printed(compress, monkeypatch, tmp_path, recipe):
    from compress import pipeline

    def broken(*_, **__):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(pipeline, "run", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    code, _, err = compress("run", recipe())
    assert code == 70
    assert "in broken" in err


def test_a_warning_is_one_sentence_without_a_line_of_code(compress, tmp_path):
    from compress.export import export_onnx
    from compress.models.cifar import resnet8

    export_onnx(resnet8(in_channels=1), torch.zeros(1, 1, 8, 8), tmp_path / "fp32.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = compress(
            "quantize", tmp_path / "fp32.onnx", "--data", "digits", "--out", tmp_path / "run",
            "--method", "plain", "--target", "onnxruntime", "--samples", "8",
            "--mean", "100", "--std", "0.01", "--set", "measure.rounds=3",
            "--set", "measure.round_ms=5", "--set", "measure.test_images=8",
        )  # fmt: skip
    assert code == 0, err
    (line,) = (line for line in err.splitlines() if "far from what normalization gives" in line)
    assert line.startswith("compress: warning: calibration images of input")
    assert "quantize_targets(" not in err


def test_a_lint_that_finds_something_exits_with_1(compress, tmp_path):
    from compress.export import export_onnx
    from compress.models.cifar import resnet8
    from compress.quantize import quantize_onnx

    export_onnx(resnet8(), torch.zeros(1, 3, 16, 16), tmp_path / "fp32.onnx")
    images = [np.random.default_rng(0).normal(size=(16, 3, 16, 16)).astype(np.float32)]
    quantize_onnx(tmp_path / "fp32.onnx", images, tmp_path / "cpu.onnx", method="plain")
    code, out, _ = compress("lint", tmp_path / "cpu.onnx", "--target", "tensorrt")
    assert code == 1
    assert "uint8" in out
    code, out, _ = compress("lint", tmp_path / "cpu.onnx", "--target", "onnxruntime")
    assert code == 0
    assert "0 findings for onnxruntime" in out


def test_one_finding_is_one_finding(compress, tmp_path, monkeypatch):
    """Not "1 findings"."""
    import compress.qdq.lint as lint

    one = lint.Finding("no-q", "conv", "a layer in float", fixable=False)
    monkeypatch.setattr(lint, "lint_onnx", lambda *_: [one])
    (tmp_path / "x.onnx").touch()
    code, out, _ = compress("lint", tmp_path / "x.onnx", "--target", "tensorrt")
    assert code == 1
    assert "1 finding for tensorrt" in out


def test_the_schema_can_be_written(compress, tmp_path):
    code, _, _ = compress("schema", "--out", tmp_path / "schema.json")
    assert code == 0
    assert (tmp_path / "schema.json").read_text() == Path("recipes/schema.json").read_text()


def test_check_compares_the_task_with_the_labels_and_the_stages(compress, recipe, tmp_path):
    path = tmp_path / "boxes.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"task": "detection", "gates": {"top1_drop_pct": 1.0}}))
    code, out, err = compress("check", path)
    assert (code, out) == (2, "")
    assert f"{path}: task: needs labels of the form 'boxes'; data " in err
    assert f"{path}: gates.top1_drop_pct: this task does not name one class an image." in err


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("8,b", "--image-size '8,b'. Expected pixels: 224, or height and width: 240,320"),
        ("8,8,8", "--image-size '8,8,8'. Expected pixels"),
        ("0,8", "--image-size 0: Input should be greater than or equal to 4"),
    ],
)
def test_a_size_that_is_none_is_refused(compress, size, said):
    code, _, err = compress("compare", "a.onnx", "b.onnx", "--data", "digits", "--image-size", size)
    assert code == 2
    assert said in err


def test_a_size_may_be_a_rectangle():
    from compress.cli.options import data_part

    given = {"data": "digits", "image_size": "12,16"}
    assert data_part(given) == {"name": "digits", "image_size": [12, 16]}
    assert data_part(given | {"image_size": "12"})["image_size"] == 12


def test_options_of_a_kind_of_data_are_given_behind_its_root() -> None:
    from compress.cli.options import data_part

    part = data_part({"data": "voc:root=cells,invalid=drop,workers=2", "resize": "letterbox"})
    options = {"invalid": "drop", "resize": "letterbox"}
    assert part == {"name": "voc", "root": "cells", "workers": 2, "options": options}
    assert data_part({"data": "images:a=b"}) == {"name": "images", "root": "a=b"}


def test_labels_that_do_not_fit_the_networks_outputs_are_refused(compress, tmp_path):
    from PIL import Image

    for part in ("train", "test"):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            folder = tmp_path / part / kind
            folder.mkdir(parents=True)
            for number in range(12):
                Image.new(mode, (8, 8), number % 2).save(folder / f"{number}.png")
    code, _, err = compress(
        "sensitivity", "compress.models.cifar:resnet8", "--prune", "--data", f"masks:{tmp_path}",
        "--image-size", "8",
    )  # fmt: skip
    assert code == 2
    assert "task segmentation does not fit the network's outputs: output (4, " in err


def test_export_writes_free_sizes_and_fixed_batches(compress, tmp_path):
    out = tmp_path / "x.onnx"
    command = [
        "export",
        "compress.models.cifar:resnet8",
        "--out",
        str(out),
        "--input-size",
        "3,16,16",
    ]
    for options, expected in (
        ([], ["batch", 3, 16, 16]),
        (["--fixed-batch"], [1, 3, 16, 16]),
        (["--dynamic-size"], ["batch", 3, "height", "width"]),
    ):
        assert compress(*command, *options)[0] == 0
        dims = onnx.load(str(out)).graph.input[0].type.tensor_type.shape.dim
        assert [dim.dim_param or dim.dim_value for dim in dims] == expected
