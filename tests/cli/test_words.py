"""Messages name what is wrong and what would be right; every --help has an example."""

import shlex
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image

from compress.cli import app
from compress.cli.options import model_options, recipe_of
from compress.errors import CompressError, RecipeError
from compress.recipe.loading import validate_recipe

COMMANDS = typer.main.get_command(app.app).commands


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "x.onnx", "--batch", "x"], "--batch 'x'. Expected batch sizes: 1,8."),
        (["bench", "x.onnx", "--batch", "0"], "--batch '0'. Expected batch sizes: 1,8."),
        (["bench", "x.onnx", "--batch", "0.5"], "--batch '0.5'. Expected batch sizes: 1,8."),
        (
            ["build", "x.onnx", "--runtime", "openvino", "--out", "o", "--batch", "1"],
            "Expected 3 whole numbers, the smallest, usual and largest batch: 1,1,8.",
        ),
        (
            ["export", "compress.models.cifar:resnet8", "--out", "o", "--input-size", "224"],
            "Expected 3 whole numbers, channels, height and width: 3,224,224.",
        ),
        (
            ["prune", "a.b:c", "--data", "digits", "--std", "0,0,0"],
            "data.std[0]: 0.0: Input should be greater than 0.",
        ),
        (["prune", "a.b:c", "--data", "digits", "--mean", "nan"], "finite number"),
        (["prune", "a.b:c", "--data", "digits", "--mean", "x"], "a number for each channel"),
    ],
)
def test_what_is_expected_is_what_the_option_takes(compress, arguments, said):
    code, _, err = compress(*arguments)
    assert code == 2
    assert said in err
    assert "report this network" not in err


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torchvision:resnet18", {}),
        ("compress.models.cifar:resnet8", {}),
        ("ultralytics:net.pt", {"trust": True}),
    ],
)
def test_trust_is_an_option_of_no_network_but_pickled_ones(name, options):
    given = {"model": name, "data": "digits", "seed": 0, "overrides": None, "trust": True}
    assert recipe_of("prune", given, [], []).model.options == options
    assert model_options(name, trust=False) == {}


def problems(**changes):
    content = {"model": {"name": "a.b:c"}, "data": {"name": "digits"}}
    with pytest.raises(RecipeError) as error:
        validate_recipe(content | changes, where="r")
    return str(error.value).splitlines()


SIZE = "Expected: Side of the network's input, or height and width, pixels."


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"data": {"name": "digits", "image_size": "big"}},
            [f"r: data.image_size: 'big' is not of a form that is known here. {SIZE}"],
        ),
        (
            {"data": {"name": "digits", "image_size": 3}},
            ["r: data.image_size: 3: Input should be greater than or equal to 4."],
        ),
        (
            {"data": {"name": "digits", "image_size": [3, 32]}},
            ["r: data.image_size[0]: 3: Input should be greater than or equal to 4."],
        ),
        (
            {"model": "a.b:c"},
            ["r: model: 'a.b:c': Input should be a mapping, {KEY: VALUE}."],
        ),
        (
            {"targets": ["openvino"]},
            ["r: targets[0]: 'openvino': Input should be a mapping, {KEY: VALUE}."],
        ),
        (
            {"data": {"name": "digits", "mean": 0}},
            ["r: data.mean: 0: Input should be a list, [VALUE, ...]."],
        ),
        (
            {"stages": [{"prune": {"keep_channels": {"conv1": 2}}}]},
            ["r: stages[0].prune.keep_channels.conv1: 2: Input should be less than or equal to 1."],
        ),
        (
            {"stages": [{"prune": {"keep_macs": 0.5, "criterion": 3}}]},
            [
                "r: stages[0].prune.criterion: 3 is not of a form that is known here. Expected: "
                "Pruning criterion: how channels are scored."
            ],
        ),
        (
            {"stages": [{"distill": {"losses": [{"kd": 3}]}}]},
            ["r: stages[0].distill.losses[0].kd: 3: Input should be a mapping."],
        ),
    ],
)
def test_a_wrong_value_is_one_line_without_names_of_types(changes, lines):
    assert problems(**changes) == lines


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_help_ends_with_an_example_that_parses(name):
    command = COMMANDS[name]
    _, _, line = (command.epilog or "").partition("\b\n  compress ")
    assert line, f"compress {name} --help has no example"
    asked, *arguments = shlex.split(line)
    assert asked == name
    with command.make_context(name, arguments) as context:
        assert not context.args


@pytest.mark.parametrize("name", ["train", "prune", "sparsify", "distill", "quantize"])
def test_defaults_in_the_help_are_those_of_the_recipe(monkeypatch, name):
    """What --help says holds where an option is absent is what the recipe then says."""
    from compress import pipeline

    seen = []
    monkeypatch.setattr(pipeline, "run", lambda recipe, *_, **__: seen.append(recipe))
    given = {"distill": ["--teacher", "d.e:f"], "sparsify": ["--keep-weights", "0.5"]}
    train = [] if name in {"train", "distill", "quantize"} else ["--epochs", "1"]
    monkeypatch.setattr(
        sys, "argv", ["compress", name, "a.b:c", "--data", "digits", *given.get(name, []), *train]
    )
    with pytest.raises(SystemExit):
        app.main()
    recipe = seen[0].model_dump()
    parts = [recipe["data"], *(p for s in recipe["stages"] for p in s.values() if p)]
    checked = []
    for option in COMMANDS[name].params:
        said = (option.help or "").removesuffix(" if absent").rpartition("; ")[2]
        key = {"loss": "losses"}.get(option.name, option.name)
        for part in parts if option.name != "epochs" else ():
            if (
                option.help
                and option.help.endswith(" if absent")
                and part.get(key) not in (None, ())
            ):
                value = part[key]
                assert said == str(value[0] if isinstance(value, tuple) else value), option.name
                checked.append(option.name)
    assert "batch_size" in checked
    expected = {
        "prune": {"criterion", "runtime", "round_to"},
        "sparsify": {"pattern", "criterion"},
        "quantize": {"method", "samples"},
    }
    assert expected.get(name, set()) <= set(checked)


def test_pruning_without_a_budget_says_in_its_help_what_it_cuts_to(monkeypatch):
    from compress import pipeline

    seen = []
    monkeypatch.setattr(pipeline, "run", lambda recipe, *_, **__: seen.append(recipe))
    monkeypatch.setattr(sys, "argv", ["compress", "prune", "a.b:c", "--data", "digits"])
    with pytest.raises(SystemExit):
        app.main()
    budget = seen[0].stages[0].prune.keep_macs
    option = next(each for each in COMMANDS["prune"].params if each.name == "keep_macs")
    assert option.help.endswith(f"; {budget} if no budget is given")


def test_two_classes_need_no_reason_for_having_no_top5():
    from compress.report.schema import Report, Result, Variant
    from compress.report.tables import accuracies, compact

    result = Result(runtime="a", precision="fp32", device="cpu", batch=1, top1_pct=90.0)
    table = compact(accuracies(Report(variants=(Variant(name="x", stage="s", results=(result,)),))))
    assert not [note for note in table.notes if note.startswith("Top-5")]
    assert issubclass(RecipeError, CompressError)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("run qui", ["quickstart"]),
        ("show stages/qu", ["stages/quantize"]),
        ("show crit", ["criteria/"]),
        ("list rec", ["recipes"]),
        ("prune a.b:c --criterion bn", ["bn_scale"]),
        ("build x.onnx --runtime openv", ["openvino"]),
        ("quan", ["quantize"]),
    ],
)
def test_a_shell_completes_commands_and_names(words, completed):
    import os
    import subprocess

    given = f"compress {words}"
    environment = {
        "_COMPRESS_COMPLETE": "complete_bash",
        "COMP_WORDS": given,
        "COMP_CWORD": str(len(given.split()) - 1),
    }
    done = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), "compress")],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == completed, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["predict", "x.onnx"],
            "compress: predict: Missing argument 'images'. Expected pictures, or folders of them. "
            "See: compress predict --help.\n",
        ),
        (
            ["distill", "a.b:c", "--data", "digits"],
            "compress: distill: Missing option '--teacher'. Expected network to distill from, "
            "written as the first is. See: compress distill --help.\n",
        ),
        (["prune", "a.b:c", "--keepmacs", "1"], "No such option: --keepmacs (Possible options: "),
        (["prunee"], "compress: No such command 'prunee'"),
    ],
)
def test_a_wrong_command_line_is_told_in_a_sentence(compress, arguments, said):
    code, out, err = compress(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("compress: ") and said in err and err.count("\n") == 1


def test_no_command_is_answered_by_the_help(compress):
    code, out, err = compress()
    assert code == 2 and "compress: " not in out + err
    assert "Prune, distill and quantize" in out + err


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("photos", "--data photos: is a folder, and its kind is not said. Expected KIND:PLACE. "
                   "Did you mean --data imagefolder:photos?"),
        ("empty", "See: compress list data."),
        ("t.csv", "--data t.csv: is a file, and its kind is not said. Expected KIND:PLACE. Did you "
                  "mean --data csv:t.csv?"),
        ("own.py", "Did you mean --data own.py:NAME?"),
        ("imagefolder:phtos", "phtos: no such folder. Did you mean 'photos'?"),
        ("imagefolder:t.csv", "t.csv: is a file, not a folder. Expected the folders train and"),
        ("voc:phtos", "phtos: no such folder. Did you mean 'photos'? Expected ImageSets"),
        ("masks:phtos", "phtos: no such folder. Did you mean 'photos'? Expected train/images"),
        ("csv:photos", "photos: is a folder, not a file. Expected a table"),
        ("yolo:photos", "photos: is a folder, not a file. Expected a data.yaml"),
    ],
)  # fmt: skip
def test_data_that_is_not_there_is_told_with_what_lies_there(
    tmp_path, monkeypatch, compress, data, said
):
    monkeypatch.chdir(tmp_path)
    for name in ("ants", "bees"):
        Path("photos", name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(Path("photos", name, "1.png"))
    Path("empty").mkdir()
    for name in ("t.csv", "own.py"):
        Path(name).touch()
    code, _, err = compress("prune", "compress.models.cifar:resnet8", "--data", data)
    assert code == 2 and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("net.py", "net.py: is a file of code. Name the network in it: net.py:NAME."),
        ("net.pt", "net.pt: holds weights, which need the code of their network."),
        ("photos", "photos: is a folder in which no network is saved. Expected a run or stage"),
        ("phtos", "'phtos' is no reference to a network. Did you mean 'photos'? Expected torch"),
    ],
)
def test_what_is_no_network_is_told_as_what_it_is(tmp_path, monkeypatch, compress, model, said):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name in ("net.py", "net.pt"):
        Path(name).touch()
    code, _, err = compress("sparsify", model, "--data", "digits")
    assert code == 2 and said in err and "keep_weights" not in err


def test_options_are_shown_as_a_recipe_has_them(compress):
    _, out, _ = compress("show", "stages/train")
    assert "augment (default {crop_padding: 0, flip: false, " in out
    assert "ema (default null)" in out and "optimizer (default sgd)" in out
    _, out, _ = compress("show", "data/voc")
    assert "resize: null (short side, squash, letterbox or null)" in out
    assert "labels: boxes (text)" in out and "root: required (text)" in out
