"""Every fact about a runtime stands on it, and its options reach it from recipes and commands."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress import plugins
from compress.errors import RecipeError
from compress.measure.artifacts import candidates_of
from compress.qdq.plan import TARGETS
from compress.recipe.loading import load_recipe, to_json
from compress.recipe.settings import Target
from compress.runtimes import kind_of, runtime_class

ROOT = Path(__file__).parents[2] / "compress"
NAMES = plugins.names("runtimes")
# Where a runtime's name is no fact about it, and why it stands there.
ELSEWHERE = {
    "qdq": "kinds of Q/DQ graph, which are called like the runtimes they are for",
    "quantize": "the same",
    "environment.py": "packages whose versions a report holds",
    "packages.py": "packages",
    "pipeline/bundle/on_device.py": "runs where this package is not installed",
    "evaluate/bisection.py": "node by node is something only ONNX Runtime can do",
    "cli": "defaults of options, which import no runtime",
    "pipeline/split.py": "defaults",
    "measure/memory.py": "a default",
    "prune/plan.py": "a default",
    "recipe/settings.py": "a default",
}


def strings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_no_other_file_spells_the_name_of_a_runtime() -> None:
    spelled = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if path.parent.name not in {"runtimes", "_fusion"}
        and any(text in NAMES for text in strings(path))
    }
    allowed = {
        each for each in spelled for place in ELSEWHERE if each == place or f"{place}/" in each
    }
    assert spelled - allowed == set()
    assert spelled  # the search finds what there is


@pytest.mark.parametrize("name", NAMES)
def test_a_runtime_tells_every_fact(name: str) -> None:
    plugin = runtime_class(name)
    assert plugin.opens in {"onnx", "engine", "network"}
    assert plugin.int8_form is None or plugin.int8_form in TARGETS
    assert plugin.package
    assert plugin.enables
    assert plugin.zero_weights
    assert plugin.extension.startswith(".") or plugin.opens == "network"
    assert plugins.create("runtimes", name).device_kind() in {"cpu", "cuda"}


def test_files_of_each_runtime_are_known(tmp_path: Path) -> None:
    written = {"a.engine": b"ftrt0000", "b.engine": b"vtrt0000", "c.xml": b"<?xml", "d": b"\x08"}
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    owners = ["tensorrt", "tensorrt-rtx", "openvino", None]
    assert [kind_of(tmp_path / name) for name in written] == owners
    assert kind_of(tmp_path) == "pytorch"


def test_options_of_a_runtime_are_options_of_a_target() -> None:
    target = Target.model_validate({"runtime": {"openvino": {"inference_precision": "bf16"}}})
    assert (target.runtime, target.options) == ("openvino", {"inference_precision": "bf16"})
    assert target.reference == {"openvino": {"inference_precision": "bf16"}}
    assert Target.model_validate(target.model_dump()) == target
    assert Target(runtime="onnxruntime").reference == "onnxruntime"


def recipe(tmp_path: Path, target: object) -> Path:
    path = tmp_path / "recipe.yaml"
    content = {
        "model": {"name": "compress.models.cifar:resnet8", "num_classes": 10},
        "data": {"name": "digits", "image_size": 32, "channels": 3},
        "targets": [target],
    }
    path.write_text(json.dumps(content))
    return path


def test_an_unknown_runtime_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such runtime 'openvin'. Did you mean 'openvino'"):
        load_recipe(recipe(tmp_path, {"runtime": "openvin", "precision": "fp32"}))


def test_a_recipe_with_options_is_read_again_as_it_was_written(tmp_path: Path) -> None:
    path = recipe(
        tmp_path, {"runtime": {"onnxruntime": {"optimization": "basic"}}, "precision": "fp32"}
    )
    first = load_recipe(path)
    path.write_text(json.dumps(to_json(first)))
    assert load_recipe(path) == first


def test_an_option_that_a_runtime_lacks_is_found_by_check(tmp_path: Path, compress) -> None:
    path = recipe(tmp_path, {"runtime": {"openvino": {"devise": "gpu"}}, "precision": "fp32"})
    code, out, err = compress("check", str(path))
    assert code == 2
    assert "runtime 'openvino' has no option 'devise'" in out + err
    assert "device" in out + err


def test_one_place_has_one_set_of_options(tmp_path: Path) -> None:
    path = recipe(tmp_path, {"runtime": "openvino", "precision": "fp32"})
    content = json.loads(path.read_text())
    content["targets"].append({"runtime": {"openvino": {"device": "gpu"}}, "precision": "fp16"})
    path.write_text(json.dumps(content))
    with pytest.raises(RecipeError, match="other options of openvino"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("kd", "kd"),
        ("kd:temperature=4", {"kd": {"temperature": 4}}),
        ("openvino:device=cpu,batch=2", {"openvino": {"device": "cpu", "batch": 2}}),
        ("own/file.py:Loss", "own/file.py:Loss"),
        ("own/file.py:Loss:weight=0.5", {"own/file.py:Loss": {"weight": 0.5}}),
    ],
)
def test_references_on_the_command_line(text: str, reference: object) -> None:
    assert plugins.reference(text) == reference


def test_one_runtime_with_two_sets_of_options_makes_two_candidates(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"\x08\x07")
    candidates = candidates_of([path], ["onnxruntime", {"onnxruntime": {"optimization": "none"}}])
    assert [each.reference for each in candidates] == [
        "onnxruntime",
        {"onnxruntime": {"optimization": "none"}},
    ]
    assert len({each.name for each in candidates}) == 2
    assert "optimization=none" in candidates[1].name
