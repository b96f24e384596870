"""A run killed at any of its writes is resumed to the same files; the leftovers are removed."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from compress import pipeline
from compress.artifact import TEMPORARY, read_json
from compress.errors import RunError
from compress.pipeline.verify import verify_files
from compress.recipe.loading import load_recipe
from compress.report.run_folder import RunFolder

RECIPE = {
    "model": {"name": "compress.models.cifar:resnet8", "options": {"in_channels": 1, "width": 4}},
    "data": {"name": "digits", "calibration": 16},
    "stages": [
        {"train": {"epochs": 1, "batch_size": 64, "epoch_images": 256, "precision": "fp32"}},
        {"prune": {"criterion": "l1", "keep_macs": 0.5}},
        {
            "distill": {
                "epochs": 1,
                "batch_size": 64,
                "epoch_images": 256,
                "losses": ["kd"],
                "precision": "fp32",
            }
        },
        {"quantize": {"samples": 16, "method": "plain"}},
    ],
    "targets": [{"runtime": "onnxruntime"}],
    "measure": {"rounds": 3, "round_ms": 1, "explain_images": 0, "test_images": 64},
}


@dataclass(frozen=True)
class Kill:
    """What lay on the disk before or after one rename: what SIGKILL at that moment leaves."""

    folder: Path
    target: str
    renamed: bool


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed, and every moment at which it could have been."""

    folder: Path
    kills: list[Kill]


@pytest.fixture(scope="module", autouse=True)
def without_memory():
    """Leave the processes out in which memory is measured: they write nothing."""
    from compress.pipeline import measure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.Entry, "memory", lambda *_: {})
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    place = tmp_path_factory.mktemp("killed")
    folder, kills, rename = place / "whole", list[Kill](), os.replace

    def keep(target, renamed):
        copy = place / f"kill-{len(kills):03d}"
        shutil.copytree(folder, copy)
        kills.append(Kill(copy, Path(target).relative_to(folder).as_posix(), renamed))

    def spying(source, target, **options):
        inside = Path(target).is_relative_to(folder)
        if inside:
            keep(target, renamed=False)
        rename(source, target, **options)
        if inside:
            keep(target, renamed=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", spying)
        pipeline.run(recipe, folder)
    return Whole(folder, kills)


def recorded(folder, *, measured):
    """Return the recorded files with their hashes: of the measuring, where times lie, or before."""
    entries = read_json(folder / "run.json")["artifacts"]
    return {e["path"]: e["sha256"] for e in entries if ("measure" in e["path"]) == measured}


def check_resumes(kill, whole, recipe):
    pipeline.run(recipe, kill.folder)
    assert recorded(kill.folder, measured=False) == recorded(whole.folder, measured=False), kill
    engines, expected = (recorded(each, measured=True) for each in (kill.folder, whole.folder))
    assert engines.keys() == expected.keys(), kill
    assert verify_files(kill.folder).intact, kill
    found, wanted = (
        {path.relative_to(root).as_posix() for path in root.rglob("*")}
        for root in (kill.folder, whole.folder)
    )
    assert found == wanted, kill


def test_a_kill_between_writing_and_renaming_leaves_a_temporary_file(whole):
    written = {Path(kill.target).name for kill in whole.kills}
    assert {"run.json", "recipe.yaml", "metrics.json", "last.pt", "model.onnx"} <= written
    for kill in whole.kills:
        assert bool(list(kill.folder.rglob(f"{TEMPORARY}*"))) != kill.renamed, kill


def test_kills_before_three_kinds_of_file_resume_to_the_same_files(whole, recipe):
    kills = [k for k in whole.kills if k.target in {"run.json", "02-distill/model.onnx"}]
    for kill in kills[:2] + kills[-1:]:  # the first two: before recipe.yaml is there
        check_resumes(kill, whole, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_kill_resumes_to_the_same_files(part, whole, recipe, tried):
    kills = whole.kills[part::8]
    tried("SIGKILL before and after each rename of a run, then resumed", len(kills))
    assert len(whole.kills) > 40
    for kill in kills:
        check_resumes(kill, whole, recipe)


class KilledError(BaseException):
    """Ends the work at once, like a signal."""


def test_starting_over_survives_a_kill_at_every_removal(recipe, tmp_path, monkeypatch):
    """What is left after each removal is a run still, or the new one; stages go last first."""
    old, new = load_recipe(recipe), load_recipe(recipe, ["seed=3"])
    names, remove, countdown = ("00-train", "01-prune", "02-distill"), os.unlink, [0]

    def removing(*arguments, **options):
        if countdown[0] == 0:
            raise KilledError
        countdown[0] -= 1
        remove(*arguments, **options)

    def begun(root):
        folder = RunFolder.open(root, old)
        for name in names:
            (root / name).mkdir()
            (root / name / "model.onnx").write_text("x")
            folder.finish(root / name, {}, [])
        (root / "report.html").write_text("old")

    for moment in range(100):
        root = tmp_path / str(moment)
        begun(root)
        countdown[0] = moment
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", removing)
            try:
                RunFolder.open(root, new, fresh=True)
                break
            except KilledError:
                pass
        if RunFolder(root).description()["recipe"]["seed"] == 3:  # run.json is the new one
            assert not any((root / name).exists() for name in names)
        finished = [RunFolder(root).result(root / name) is not None for name in names]
        assert finished == sorted(finished, reverse=True), moment
        folder = RunFolder.open(root, new, fresh=True)
        assert folder.description()["recipe"]["seed"] == 3
        assert not any((root / name).exists() for name in names)
    assert moment > 2 * len(names)


def test_a_folder_killed_before_run_json_is_taken_over(tmp_path, recipe):
    (tmp_path / f"{TEMPORARY}abc.json").write_text("{")
    (tmp_path / "run.lock").write_text("1 on nowhere")
    RunFolder.open(tmp_path, load_recipe(recipe))
    assert not (tmp_path / f"{TEMPORARY}abc.json").exists()


def test_a_folder_of_somebody_else_is_not_cleaned(tmp_path, recipe):
    for name in ("thesis.tex", f"{TEMPORARY}abc.json"):
        (tmp_path / name).write_text("x")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        RunFolder.open(tmp_path, load_recipe(recipe))
    assert (tmp_path / f"{TEMPORARY}abc.json").exists()
