"""Nothing of a stranger's recipe, run folder or engine runs until --trust is typed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from compress import trust
from compress.cli import app
from compress.cli.output import USER_ERROR
from compress.errors import ModelError, UsageError
from compress.models import load_model, save_model
from compress.models.references import construct
from compress.plugins import import_file
from compress.runtimes import open_session

CODE = """
from pathlib import Path
Path("ran").touch()
import torch

class Net(torch.nn.Sequential):
    def __init__(self, num_classes=10):
        hidden, last = torch.nn.Linear(64, 8), torch.nn.Linear(8, num_classes)
        super().__init__(torch.nn.Flatten(), hidden, torch.nn.ReLU(), last)

class Own:
    pass
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("evil.py").write_text(CODE)
    return tmp_path


def compress(*arguments: str, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    with pytest.raises(SystemExit) as ended:
        app.main()
    return ended.value.code


def recipe(**changes) -> Path:
    content = {
        "model": {"name": "compress.models.cifar:resnet8", "options": {"in_channels": 1}},
        "data": {"name": "digits"},
        "stages": [{"prune": {"keep_macs": 0.5}}],
    }
    path = Path("stranger.yaml")
    path.write_text(yaml.safe_dump(content | changes))
    return path


NAMED = {
    "network in a file": {"model": {"name": "evil.py:Net"}},
    "network in a module": {"model": {"name": "os:system"}},
    "module in this folder": {"model": {"name": "evil:Net"}},
    "task": {"task": "evil.py:Own"},
    "task with options": {"task": {"evil.py:Own": {}}},
    "data": {"data": {"name": "dataset", "root": "evil.py:Own"}},
    "criterion": {"stages": [{"prune": {"keep_macs": 0.5, "criterion": "evil.py:Own"}}]},
    "teacher": {"stages": [{"distill": {"teacher": "evil.py:Net", "epochs": 1}}]},
    "loss": {"stages": [{"distill": {"losses": [{"evil.py:Own": {}}], "epochs": 1}}]},
    "another module of ours": {
        "model": {
            "name": "compress.artifact:write_text",
            "options": {"path": "ran", "content": "x"},
        }
    },
}


@pytest.mark.parametrize("changes", NAMED.values(), ids=NAMED.keys())
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_recipes_code_is_listed_and_not_run(command, changes, monkeypatch, capsys):
    path = recipe(**changes, trust=True) if command == "none" else recipe(**changes)
    assert compress(command, str(path), monkeypatch=monkeypatch) == USER_ERROR
    told = capsys.readouterr().err
    assert "this would run code: " in told
    assert "--trust" in told
    assert not Path("ran").exists()


def test_the_file_itself_cannot_ask_for_trust(monkeypatch, capsys):
    path = recipe(model={"name": "evil.py:Net"}, trust=True)
    assert compress("run", str(path), monkeypatch=monkeypatch) == USER_ERROR
    assert "no such key" in capsys.readouterr().err
    assert not Path("ran").exists()


def test_with_trust_it_is_listed_and_run(monkeypatch, capsys, caplog):
    path = recipe(model={"name": "evil.py:Net"})
    assert compress("check", str(path), "--trust", monkeypatch=monkeypatch) == 0
    assert "runs the code of evil.py:Net (model.name)" in caplog.text
    assert Path("ran").exists()


def test_what_was_typed_runs_and_is_remembered_as_long_as_it_stays_the_same(monkeypatch, capsys):
    path = recipe()
    typed = ("check", str(path), "--set", "model.name=evil.py:Net", "--set", "model.options={}")
    assert compress(*typed, monkeypatch=monkeypatch) == 0
    Path("ran").unlink()
    path = recipe(model={"name": "evil.py:Net"})
    assert compress("check", str(path), monkeypatch=monkeypatch) == 0  # the same file again
    Path("ran").unlink()
    Path("evil.py").write_text(CODE + "# changed\n")
    assert compress("check", str(path), monkeypatch=monkeypatch) == USER_ERROR
    shutil.copytree(".", "copy", ignore=shutil.ignore_patterns("copy", "cache"))
    assert not Path("ran").exists()


def stranger_folder(reference: str) -> Path:
    folder = save_model(load_model("evil.py:Net"), "theirs", reference="evil.py:Net")
    description = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(description | {"reference": reference}))
    Path("ran").unlink()
    return folder


@pytest.mark.parametrize("reference", ["evil.py:Net", "evil:Net", "os:system"])
def test_a_strangers_folder_builds_nothing(reference, monkeypatch, capsys):
    folder = str(stranger_folder(reference))
    commands = (
        ("export", folder, "--out", "x.onnx", "--input-size", "1,8,8"),
        ("bench", folder),
        ("prune", folder, "--data", "digits"),
        ("distill", "compress.models.cifar:resnet8", "--teacher", folder, "--data", "digits"),
        ("sensitivity", folder, "--data", "digits", "--prune"),
        ("report", folder),
        ("verify", folder),
        ("bundle", folder, "--out", "x.tar.gz"),
    )
    for command in commands:
        assert compress(*command, monkeypatch=monkeypatch) == USER_ERROR, command
        assert not Path("ran").exists(), command
    assert "is code that the command line does not name" in capsys.readouterr().err


def test_trust_ends_with_the_command_that_was_given_it():
    trust.allow_all()  # outside a command
    assert trust.VARIABLE not in os.environ
    with trust.limited(["run", "theirs", "--trust"]):
        trust.allow_all()
        assert not trust.is_limited() and trust.is_allowed("evil.py")
    assert trust.VARIABLE not in os.environ


def test_python_is_not_limited_and_a_process_that_is_started_is_as_its_parent(monkeypatch):
    assert isinstance(construct("evil.py:Net", 10, {}), torch.nn.Module)
    with trust.limited(["prune", "theirs"]):
        assert trust.VARIABLE in os.environ
        with pytest.raises(ModelError, match="is code that the command line does not name"):
            construct("evil.py:Net", 10, {})
        with pytest.raises(UsageError, match="nothing of it was run"):
            import_file(Path("evil.py"), "a task")
    assert trust.VARIABLE not in os.environ


def test_an_engine_of_somebody_else_is_not_loaded(tmp_path):
    engine = tmp_path / "x.engine"
    engine.write_bytes(b"vtrt" + bytes(64))
    with trust.limited(["bench", str(engine)]):
        with pytest.raises(UsageError, match="not built by you") as caught:
            open_session(engine, "tensorrt-rtx")
        assert "compress build" in str(caught.value)
        trust.remember_engine(engine)
        trust.check_engine(engine)
        engine.write_bytes(b"vtrt" + np.ones(64, np.uint8).tobytes())
        with pytest.raises(UsageError):
            trust.check_engine(engine)
