"""A run folder belongs to one recipe and remembers what is finished."""

import pytest

from compress.artifact import Artifact, describe_file, write_text
from compress.errors import RunError
from compress.recipe.loading import load_recipe, validate_recipe
from compress.report.run_folder import RunFolder


def recipe(**changes):
    content = {"name": "x", "model": {"name": "a.b:c"}, "data": {"name": "digits"}}
    return validate_recipe(content | changes, where="test")


def test_a_finished_stage_is_remembered_with_its_files(tmp_path):
    folder = RunFolder.open(tmp_path / "run", recipe())
    stage = folder.stage(1, "prune")
    assert folder.result(stage) is None
    write_text(stage / "x", "whole")
    folder.finish(stage, {"a": 1}, [describe_file(stage / "x", root=folder.root, stage=stage.name)])
    again = RunFolder.open(tmp_path / "run", recipe())
    assert again.result(stage) == {"a": 1}
    assert [each["path"] for each in again.description()["artifacts"]] == ["01-prune/x"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: file.unlink(), "01-prune/x: missing, and the run cannot go on"),
        (lambda file: file.write_text("wh"), "01-prune/x: changed, and the run cannot go on"),
    ],
)
def test_a_run_whose_files_are_not_what_they_were_does_not_go_on(tmp_path, spoil, said):
    folder = RunFolder.open(tmp_path, recipe())
    stage = folder.stage(1, "prune")
    write_text(stage / "x", "whole")
    folder.finish(stage, {}, [describe_file(stage / "x", root=folder.root, stage=stage.name)])
    spoil(stage / "x")
    with pytest.raises(RunError, match=f"{said}.*remove the folders from 01-prune on"):
        RunFolder.open(tmp_path, recipe())
    (stage / "metrics.json").unlink()  # then the stage is made again
    RunFolder.open(tmp_path, recipe())
    (stage / "metrics.json").write_text("{")
    with pytest.raises(RunError, match=r"Remove it, and the same command makes that stage again"):
        folder.result(stage)


def test_a_run_does_not_go_on_with_other_images(tmp_path):
    folder = RunFolder.open(tmp_path, recipe())  # of before fingerprints were kept
    RunFolder.open(tmp_path, recipe(), images="one")
    RunFolder.open(tmp_path, recipe(), images="two")  # nothing is finished
    folder.finish(folder.stage(1, "prune"), {}, [])
    before = (tmp_path / "run.json").read_text()
    for same in ("two", ""):
        assert RunFolder.open(tmp_path, recipe(), images=same).description()["images"] == "two"
    with pytest.raises(RunError, match=r"the images are no longer those .* fingerprint two; these"):
        RunFolder.open(tmp_path, recipe(), images="three")
    assert (tmp_path / "run.json").read_text() == before
    fresh = RunFolder.open(tmp_path, recipe(), images="three", fresh=True)
    assert fresh.description()["images"] == "three"


def test_finishing_a_stage_again_replaces_its_files(tmp_path):
    folder = RunFolder.open(tmp_path, recipe())
    stage = folder.stage(1, "prune")
    for name in ("old", "new"):
        folder.finish(stage, {}, [Artifact(name, "00", "01-prune")])
    assert [each["path"] for each in folder.description()["artifacts"]] == ["new"]


def test_another_recipe_is_refused_and_nothing_is_touched(tmp_path):
    folder = RunFolder.open(tmp_path, recipe())
    folder.finish(folder.stage(0, "original"), {}, [])
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(RunError, match="belongs to another recipe; these keys differ: seed"):
        RunFolder.open(tmp_path, recipe(seed=1))
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for fresh in (False, True):
        with pytest.raises(RunError, match="is not empty and holds no run"):
            RunFolder.open(tmp_path, recipe(), fresh=fresh)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_starting_over_removes_what_the_run_wrote_and_nothing_else(tmp_path):
    folder = RunFolder.open(tmp_path, recipe())
    folder.finish(folder.stage(1, "prune"), {}, [])
    (tmp_path / "notes.txt").write_text("mine")
    fresh = RunFolder.open(tmp_path, recipe(seed=1), fresh=True)
    assert fresh.result(fresh.stage(1, "prune")) is None
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_resolved_recipe_lies_in_the_folder_and_repeats_the_run(tmp_path):
    wanted = recipe(stages=[{"prune": {"keep_macs": 0.5}}, "quantize"], seed=3)
    RunFolder.open(tmp_path, wanted)
    assert load_recipe(tmp_path / "recipe.yaml") == wanted


CUT = {"prune": {"keep_macs": 0.5}}


def test_a_stage_that_left_nothing_may_be_corrected(tmp_path):
    """A wrong budget failed; the right one goes on with the original that is there."""
    folder = RunFolder.open(tmp_path, recipe(stages=[{"prune": {"keep_macs": 0.001}}]))
    folder.finish(folder.stage(0, "original"), {"a": 1}, [])
    folder.stage(1, "prune").mkdir()
    corrected = recipe(stages=[CUT], gates={"speedup": 2})
    again = RunFolder.open(tmp_path, corrected)
    assert again.result(again.stage(0, "original")) == {"a": 1}
    assert load_recipe(tmp_path / "recipe.yaml") == corrected
    assert RunFolder.open(tmp_path, corrected).description()["recipe"]["gates"]["speedup"] == 2


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("01-prune", {"stages": [{"prune": {"keep_macs": 0.4}}, "quantize"]}),
        ("02-quantize", {"targets": [{"runtime": "openvino"}]}),
        ("03-measure", {"measure": {"rounds": 7}}),
        ("00-original", {"stages": ["train", CUT, "quantize"]}),
    ],
)
def test_what_a_stage_left_is_never_lost_to_another_recipe(tmp_path, stage, changes):
    begun = {"stages": [CUT, "quantize"], "targets": [{"runtime": "onnxruntime"}]}
    RunFolder.open(tmp_path, recipe(**begun))
    checkpoint = tmp_path / stage / "training" / "last.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("hours of work")
    with pytest.raises(RunError, match="belongs to another recipe"):
        RunFolder.open(tmp_path, recipe(**(begun | changes)))
    assert checkpoint.read_text() == "hours of work"


def test_a_finished_run_is_judged_by_other_gates(tmp_path):
    folder = RunFolder.open(tmp_path, recipe(stages=[CUT]))
    folder.finish(folder.stage(2, "measure"), {"a": 1}, [])
    judged = recipe(stages=[CUT], gates={"speedup": 2})
    again = RunFolder.open(tmp_path, judged)
    assert again.result(again.stage(2, "measure")) == {"a": 1}
    assert load_recipe(tmp_path / "recipe.yaml") == judged


def test_a_run_of_before_a_key_existed_goes_on(tmp_path):
    wanted = recipe(targets=[{"runtime": "onnxruntime", "precision": "fp32"}])
    folder = RunFolder.open(tmp_path, wanted)
    folder.finish(folder.stage(0, "original"), {"a": 1}, [])
    described = folder.description()
    del described["recipe"]["targets"][0]["options"]  # younger than the run
    folder.write_description(described)
    again = RunFolder.open(tmp_path, wanted)
    assert again.result(again.stage(0, "original")) == {"a": 1}
