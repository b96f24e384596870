"""Recipes: every problem at once, each with its place; overrides; the published recipes."""

import json
from pathlib import Path

import pytest
import yaml

from compress.errors import CompressError, RecipeError, UsageError
from compress.recipe import loading, settings

GOOD = {
    "model": {"name": "compress.models.cifar:resnet8"},
    "data": {"name": "digits"},
    "stages": [{"prune": {"keep_macs": 0.5}}, {"distill": {"epochs": 2}}, "quantize"],
    "targets": [{"runtime": "onnxruntime"}],
}
PUBLISHED = sorted(Path("recipes").glob("*.yaml"))
NO_STAGE = "model: {name: a:b}\ndata: {name: digits}\n"


@pytest.fixture
def write(tmp_path):
    def written(content):
        path = tmp_path / "mine.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return written


def test_a_recipe_is_named_after_its_file_and_frozen(write):
    loaded = loading.load_recipe(write(GOOD))
    assert loaded.name == "mine"
    assert [stage.verb for stage in loaded.stages] == ["prune", "distill", "quantize"]
    assert loaded.stages[0].settings.keep_macs == 0.5
    with pytest.raises(ValueError, match="frozen"):
        loaded.seed = 1


def test_all_problems_are_reported_at_once(write):
    bad = {
        "model": {"nam": "x"},
        "data": {"name": "digit"},
        "stages": [
            {"prune": {"criterion": "talyor", "keep_mac": 0.5}},
            {"distill": {"epochs": -1, "optimizer": "sdg", "losses": ["kdd"]}},
        ],
        "targets": [{"runtime": "onnx"}],
        "seeds": 1,
    }
    path = write(bad)
    with pytest.raises(RecipeError) as caught:
        loading.load_recipe(path)
    message = str(caught.value)
    assert all(line.startswith(f"{path}: ") for line in message.splitlines())
    for expected in (
        "model.name: this key is required.",
        "model.nam: no such key. Did you mean 'name'?",
        "data.name: no such kind of data 'digit'. Did you mean 'digits'?",
        "stages[0].prune.criterion: no such criterion 'talyor'. Did you mean 'taylor'?",
        "stages[0].prune.keep_mac: no such key. Did you mean 'keep_macs'?",
        "stages[1].distill.epochs: -1: Input should be greater than or equal to 0.",
        "stages[1].distill.optimizer: 'sdg' is none of the choices. Did you mean 'sgd'? Known: ",
        "stages[1].distill.losses: no such loss 'kdd'",
        "targets[0].runtime: no such runtime 'onnx'. Did you mean 'onnxruntime'?",
        "seeds: no such key. Did you mean 'seed'?",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ["quantize", {"prune": {"keep_macs": 0.5}}]}, "quantize must be the last"),
        ({"stages": []}, "a target asks for int8 and no stage is quantize"),
        ({"stages": [{"prune": {}}], "targets": []}, "give exactly one of keep_macs"),
        ({"stages": [{"prune": {"keep_macs": 0.5, "latency_ms": 1}}]}, "here: keep_macs, latency"),
        (
            {"stages": [{"prune": {"keep_macs": 0.5, "refit": False, "refit_steps": 9}}]},
            "refit_steps goes on from what refit found: leave refit on",
        ),
        ({"stages": [{"prune": {"keep_macs": 1.5}}]}, "1.5: Input should be less than or equal"),
        (
            {"stages": [{"prune": {}, "distill": {}}]},
            "a stage has exactly one key, such as prune or quantize; here: distill, prune",
        ),
        ({"stages": ["squeeze"]}, "stages[0].squeeze: no such key"),
        (
            {
                "stages": [{"distill": {"losses": [{"kd": {"temperature": float("nan")}}]}}],
                "targets": [],
            },
            "stages[0].distill.losses[0].kd.temperature: nan is no finite number",
        ),
        (
            {"targets": [{"runtime": {"openvino": 3}}]},
            "the options of a runtime are a mapping: {device: gpu}",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_recipes_are_refused(write, change, message):
    with pytest.raises(RecipeError) as caught:
        loading.load_recipe(write(GOOD | change))
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"no such file.*compress list recipes"):
        loading.load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is no valid YAML: line 1, column 5: expected"),
        ("a: 1\n\tb: 2", "is no valid YAML: line 2, column 1: found character"),
        ("- 1", "holds list, not a recipe"),
        ("seed: 1\nseed: 2", "the key 'seed' is given twice"),
        ("data: {image_size: 1000000}", "image_size: 1000000: Input should be less than or equal"),
        ("seed: 4294967296", "seed: 4294967296: Input should be less than 4294967296"),
        ("!!python/object/apply:os.system [ls]", "is no valid YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(write, text, message):
    with pytest.raises(RecipeError) as caught:
        loading.load_recipe(write(text))
    assert message in str(caught.value)


def test_overrides_give_options_to_a_stage_that_has_none(write):
    path = write(GOOD | {"stages": ["finetune", {"quantize": None}]})
    loaded = loading.load_recipe(
        path, ["stages.0.finetune.epochs=3", "stages[1].quantize.samples=9"]
    )
    assert loaded.stages[0].settings.epochs == 3
    assert loaded.stages[1].settings.samples == 9
    with pytest.raises(RecipeError, match="here: finetune, prune"):
        loading.load_recipe(path, ["stages.0.prune.samples=9"])


def test_overrides_reach_into_lists_and_make_missing_parts(write):
    loaded = loading.load_recipe(
        write(GOOD),
        ["stages.0.prune.keep_macs=0.25", "gates.speedup=2", "targets[0].batch=8", "seed=7"],
    )
    assert loaded.stages[0].settings.keep_macs == 0.25
    assert (loaded.gates.speedup, loaded.targets[0].batch, loaded.seed) == (2.0, 8, 7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "is not an assignment. Expected KEY.PATH=VALUE"),
        ("stages.9.prune.keep_macs=1", "the list has no item '9'. Expected a number from 0 to 2"),
        ("model.name.x.y=1", "'x' is asked of a plain value"),
    ],
)
def test_overrides_that_lead_nowhere_are_refused(write, override, message):
    with pytest.raises(UsageError) as caught:
        loading.load_recipe(write(GOOD), [override])
    assert message in str(caught.value)


def test_a_dumped_recipe_is_the_same_recipe(write):
    loaded = loading.load_recipe(write(GOOD))
    assert loading.load_recipe(write(loading.dump(loaded))) == loaded


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_recipes_validate_and_point_to_the_schema(path):
    loading.load_recipe(path)
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")


def test_the_published_schema_is_current():
    assert json.loads(Path("recipes/schema.json").read_text()) == loading.recipe_schema()


@pytest.mark.parametrize(
    ("stage", "lr"),
    [
        ("train: {epochs: 1}", 0.05),
        ("finetune: {epochs: 1}", 0.01),  # the network knows its task: a large step would undo it
        ("finetune: {epochs: 1, optimizer: adamw}", 2e-4),
        ("distill: {optimizer: rmsprop}", 2e-4),
        ("quantize: {qat: {epochs: 1}}", 1e-3),
        ("quantize: {qat: {epochs: 1, optimizer: adam}}", 2e-5),
        ("finetune: {optimizer: adamw, lr: 0.3}", 0.3),
    ],
)
def test_a_learning_rate_that_is_not_given_suits_stage_and_optimizer(write, stage, lr):
    (found,) = loading.load_recipe(write(NO_STAGE + f"stages:\n  - {stage}\n")).stages
    assert getattr(found.settings, "qat", found.settings).lr == pytest.approx(lr)


def test_a_wrong_optimizer_is_one_problem(write):
    with pytest.raises(RecipeError) as error:
        loading.load_recipe(write(NO_STAGE + "stages:\n  - finetune: {optimizer: sdg}\n"))
    assert "optimizer" in str(error.value)
    assert ".lr" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "stages: [prune: {keep_macs: 0.5, round_to: atuo}]",
            "round_to: 'atuo' is none of the choices. Did you mean 'auto'? Known: 'auto' or a "
            "whole number.",
        ),
        (
            "stages: [prune: {keep_macs: 0.5, round_to: 0}]",
            "round_to: 0: Input should be greater than or equal to 1.",
        ),
        ("data: {name: digits, channels: 2}", "channels: 2 is none of the choices. Known: 1 or 3."),
        ("stages: prune", "stages: 'prune': Input should be a list, [VALUE, ...]."),
        ("stages: {prune: {keep_macs: 0.5}}", "stages: Input should be a list, [VALUE, ...]."),
    ],
)
def test_every_form_that_a_value_may_have_is_told(write, change, message):
    key = change.partition(":")[0]
    kept = [line for line in NO_STAGE.splitlines() if not line.startswith(key)]
    with pytest.raises(RecipeError) as error:
        loading.load_recipe(write("\n".join([*kept, change])))
    assert str(error.value).endswith(message)


def test_a_tracker_is_told_to_every_training_and_to_nothing_else(write):
    stages = """stages:
  - prune: {keep_macs: 0.5, round_training: {epochs: 1}}
  - distill
  - finetune: {track: mlflow}
  - quantize: {qat: {epochs: 1}}
"""
    plain = loading.load_recipe(write(NO_STAGE + stages))
    tracked = loading.tracked(plain, "tensorboard")
    pruned, distilled, tuned, quantized = (stage.settings for stage in tracked.stages)
    for training in (pruned.round_training, distilled, tuned, quantized.qat):
        assert training.track == "tensorboard"
    changed = repr(tracked).replace("track='tensorboard'", "track=None")
    assert changed == repr(plain).replace("track='mlflow'", "track=None")
    assert [stage.verb for stage in tracked.stages] == ["prune", "distill", "finetune", "quantize"]


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("tensorbord", "no such tracker 'tensorbord'. Did you mean 'tensorboard'?"),
        (
            "tensorboard",
            "--track: no stage trains a network, so there is nothing to log. Give --epochs",
        ),
    ],
)
def test_trackers_that_cannot_log_are_refused(write, tracker, message):
    plain = loading.load_recipe(write(NO_STAGE))
    with pytest.raises(CompressError) as caught:
        loading.tracked(plain, tracker)
    assert message in str(caught.value)


def test_a_folder_of_the_same_name_does_not_hide_a_recipe_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    assert loading.find_recipe("photos") == loading.packaged_recipes()["photos"]


def test_recipes_of_the_package_go_by_name():
    assert (
        loading.find_recipe("quickstart").read_text() == Path("recipes/quickstart.yaml").read_text()
    )
    assert loading.load_recipe("quickstart").name == "quickstart"
    assert set(loading.packaged_recipes()) == {path.stem for path in PUBLISHED}
    with pytest.raises(UsageError, match=r"no such recipe 'quikstart'. Did you mean 'quickstart'"):
        loading.load_recipe("quikstart")


def test_a_file_goes_before_a_recipe_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("model: {name: mine}\ndata: {name: digits}\n")
    assert loading.load_recipe("quickstart").model.name == "mine"


def test_every_key_of_a_recipe_says_what_it_means():
    def undescribed(model):
        yield from (
            f"{model.__name__}.{k}" for k, f in model.model_fields.items() if not f.description
        )

    models = [*loading.stage_settings().values(), settings.ModelSettings, settings.DataSettings]
    models += [settings.Target, settings.Gates, settings.MeasureSettings, settings.AugmentSettings]
    assert [key for model in models for key in undescribed(model)] == []


@pytest.mark.parametrize("file", ["images.npz", "folder/images.npy"])
def test_an_array_file_needs_no_kind_of_data(file: str):
    of = settings.data_reference
    assert of(file) == of(f"npz:{file}") == {"name": "npz", "root": file}
    assert of("cifar10:cifar10.npz") == {"name": "cifar10", "root": "cifar10.npz"}


def test_int8_training_has_a_small_learning_rate_of_its_own():
    """That of training from scratch, 0.05, ruins a network whose BatchNorms are folded."""
    assert settings.QuantizeSettings(qat={"epochs": 2}).qat.lr == 1e-3
    assert settings.QuantizeSettings(qat=settings.TrainSettings(epochs=2)).qat.lr == 1e-3
    assert settings.QuantizeSettings(qat=settings.TrainSettings(lr=0.01)).qat.lr == 0.01
