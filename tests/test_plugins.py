"""One file is one plug-in: found by its name, documented without being imported."""

import subprocess
import sys
from typing import Any, get_type_hints

import pytest

from compress import plugins
from compress.errors import UnknownNameError, UsageError
from compress.recipe.settings import DataSettings

ALL = [(kind, name) for kind in plugins.KINDS for name in plugins.names(kind)]


@pytest.mark.parametrize(("kind", "name"), ALL, ids="/".join)
def test_every_plugin_is_documented_and_named_after_its_file(kind, name):
    assert plugins.documentation(kind, name)
    assert plugins.plugin_class(kind, name).__doc__
    plugins.options(kind, name)


@pytest.mark.parametrize("name", plugins.names("data"))
def test_every_option_of_a_kind_of_data_is_described(name):
    _, told = plugins.documented("data", name)
    known = set(plugins.options("data", name))
    assert set(told) <= known
    assert known - set(told) - set(DataSettings.model_fields) == set()


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_every_folder_holds_plugins(kind):
    assert plugins.names(kind)


def test_listing_imports_nothing_heavy():
    code = (
        "import sys; from compress import plugins;"
        "[plugins.documentation(k, n) for k in plugins.KINDS for n in plugins.names(k)];"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_runtimes_and_data_are_spoken_with_hyphens_and_found_either_way():
    assert "fashion-mnist" in plugins.names("data")
    assert plugins.plugin_class("data", "fashion_mnist") is plugins.plugin_class(
        "data", "fashion-mnist"
    )


def test_options_reach_the_plugin_and_the_reference_wins():
    made = plugins.create("data", {"npz": {"image_size": 8}}, root="x", image_size=4, other=1)
    assert (made.root, made.image_size) == ("x", 8)


def test_commas_of_lists_and_mappings_do_not_end_an_option():
    text = "masks:root=DIR,classes=[sky, car],more={a: 1, b: 2},void=null"
    options = {"root": "DIR", "classes": ["sky", "car"], "more": {"a": 1, "b": 2}}
    assert plugins.reference(text) == {"masks": options | {"void": None}}


@pytest.mark.parametrize("part", ["classes=[sky", "void", "=1", "void=", "a={b: ]"])
def test_what_is_no_option_of_a_command_line_is_told(part):
    with pytest.raises(UsageError, match=r"is no option\. Expected NAME:OPTION=VALUE"):
        plugins.reference(f"masks:root=DIR,{part}")


def test_an_unknown_plugin_lists_the_known():
    with pytest.raises(UnknownNameError, match=r"no such kind of data 'digit'. Did you mean 'dig"):
        plugins.create("data", "digit")


def test_an_unknown_kind_lists_the_kinds():
    with pytest.raises(UnknownNameError, match="no such kind of plug-in 'critera'"):
        plugins.names("critera")


def test_an_unknown_option_lists_the_options():
    with pytest.raises(UsageError, match=r"'npz' has no option 'rot'. Did you mean 'root'"):
        plugins.create("data", {"npz": {"rot": "x"}})


def test_a_missing_option_is_named():
    with pytest.raises(UsageError, match="missing 1 required positional argument: 'root'"):
        plugins.create("data", "npz")


def test_a_reference_with_two_names_is_refused():
    with pytest.raises(UsageError, match="does not name one plug-in"):
        plugins.create("data", {"npz": {}, "digits": {}})


@pytest.mark.parametrize("value", [3, "sky"])
def test_an_option_that_is_a_list_is_given_one(value: object) -> None:
    with pytest.raises(UsageError, match=rf"'masks': classes is {value!r}. Expected a list"):
        plugins.create("data", {"masks": {"root": "x", "classes": value}})


@pytest.mark.parametrize(("kind", "name"), ALL, ids="/".join)
def test_an_option_of_another_type_is_refused(kind, name):
    hints = get_type_hints(plugins.plugin_class(kind, name))
    for option in plugins.options(kind, name):
        if hints[option] is not Any:
            with pytest.raises(UsageError, match=rf"{name!r}: {option} is <object.*Expected \w"):
                plugins.create(kind, {name: {option: object()}})


def test_what_an_option_should_be_is_said_in_words():
    for option, value, words in (
        ("temperature", "hot", "a number"),
        ("standardize", [1], "true or false"),
    ):
        with pytest.raises(UsageError, match=f"{option} is .*Expected {words}"):
            plugins.create("losses", {"kd": {option: value}})
    with pytest.raises(UsageError, match=r"ignore is \[11\]. Expected a whole number or null"):
        plugins.create("tasks", {"segmentation": {"ignore": [11]}})
    with pytest.raises(UsageError, match=r"resize is 'fit'. Expected .*letterbox or null"):
        plugins.create("data", {"masks": {"root": "x", "resize": "fit"}})


def test_an_option_is_given_as_its_type(tmp_path):
    given = {"root": tmp_path, "image_size": [8, 9], "channels": 3.0}
    made = plugins.create("data", {"masks": given})
    assert (made.root, made.image_size, made.channels) == (str(tmp_path), (8, 9), 3)


def test_types_that_nothing_checks_are_left_alone(tmp_path):
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n"
        "    from elsewhere import Thing\n"
        "@dataclass\n"
        "class Own:\n"
        "    part: Thing = 1\n"
    )
    assert plugins.create("losses", {f"{tmp_path / 'own.py'}:Own": {"part": "x"}}).part == "x"


def test_what_a_file_adds_to_the_search_path_serves_its_functions_later(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "part_elsewhere.py").write_text("VALUE = 2")
    (tmp_path / "part_beside.py").write_text("VALUE = 3")
    (tmp_path / "net.py").write_text(
        f"import sys\nsys.path.insert(0, {str(tmp_path / 'lib')!r})\n"
        "def build():\n"
        "    import part_beside, part_elsewhere\n"
        "    return part_beside.VALUE * part_elsewhere.VALUE\n"
    )
    for _ in range(2):
        assert plugins.import_file(tmp_path / "net.py", "a network").build() == 6
    assert sys.path.count(str(tmp_path)) == 1
    assert sys.path[-1] == str(tmp_path)  # it shadows nothing
