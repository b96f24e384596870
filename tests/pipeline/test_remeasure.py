"""A finished run measured again: what holds, what differs, and what cannot be compared."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from compress import environment, pipeline
from compress.artifact import read_json
from compress.cli import app
from compress.data import load_data
from compress.errors import RunError
from compress.pipeline import measure
from compress.pipeline.context import RunContext, RunVariant
from compress.pipeline.task import task_of
from compress.pipeline.verify import Remeasured, measure_again, verify_files
from compress.recipe.loading import validate_recipe
from compress.report.run_folder import RunFolder

RECIPE = {
    "name": "small",
    "model": {"name": "compress.models.cifar:resnet8", "options": {"in_channels": 1, "width": 4}},
    "data": {"name": "digits", "calibration": 32},
    "stages": [
        {"train": {"epochs": 1, "batch_size": 64, "precision": "fp32"}},
        {"quantize": {"samples": 32, "method": "plain"}},
    ],
    "targets": [
        {"runtime": "onnxruntime"},
        {"runtime": "openvino"},
        {"runtime": "pytorch", "precision": "fp32"},
    ],
    "measure": {"rounds": 3, "round_ms": 5},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    pipeline.run(validate_recipe(RECIPE, where="test"), folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to change, whose report knows one runtime: the others take their time."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    report = read_json(folder / "report.json")
    for variant in report["variants"]:
        variant["results"] = [r for r in variant["results"] if r["runtime"] == "onnxruntime"]
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def edit(run: Path, **values: object) -> None:
    """Change the last variant's result in the report."""
    report = json.loads((run / "report.json").read_text())
    report["variants"][1]["results"][0] |= values
    (run / "report.json").write_text(json.dumps(report))


def outcomes(again: Remeasured, figure: str) -> dict[str, str]:
    return {
        check.variant: check.outcome
        for check in again.checks
        if check.figure == figure and check.runtime == "onnxruntime"
    }


def test_the_same_files_give_the_same_answers_and_nothing_changes(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    again = measure_again(finished)
    assert again.elsewhere == ""
    answers = {(c.variant, c.runtime, c.figure): c for c in again.checks if c.figure != "speedup"}
    assert set(answers) == {
        ("original", "onnxruntime", "top1_pct"),
        ("original", "openvino", "top1_pct"),
        ("original", "pytorch", "top1_pct"),
        ("int8-onnxruntime", "onnxruntime", "top1_pct"),
        ("int8-onnxruntime", "onnxruntime", "agreement_pct"),
        ("int8-openvino", "openvino", "top1_pct"),
        ("int8-openvino", "openvino", "agreement_pct"),
    }
    assert all(c.outcome == "equal" and c.reported == c.measured for c in answers.values())
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_every_file_of_an_engine_is_recorded_with_what_it_was_built_from(run: Path) -> None:
    recorded = {each["path"]: each for each in read_json(run / "run.json")["artifacts"]}
    files = {"00-train/model.openvino-b1.xml", "00-train/model.openvino-b1.bin"}
    assert files <= set(recorded)
    for name in files:
        assert recorded[name]["parent"] == recorded["00-train/model.onnx"]["sha256"]
    (run / "00-train/model.openvino-b1.bin").write_bytes(b"other weights")
    assert [finding.path for finding in verify_files(run).findings] == [
        "00-train/model.openvino-b1.bin"
    ]


def test_an_engine_of_another_graph_is_built_anew(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = validate_recipe(RECIPE, where="test")
    dataset = load_data(recipe.data, recipe.seed)
    context = RunContext(recipe, RunFolder(run), dataset, task_of(recipe, dataset))
    variants = context.run.result(run / "00-train")["variants"]
    original = RunVariant(**variants[0])
    built: list[Path] = []
    monkeypatch.setattr(measure, "build_engine", lambda source, out, **_: built.append(out))
    target = recipe.targets[1]
    measure.entries_on(context, [original], [target])
    assert built == []
    (run / "00-train/model.onnx").write_bytes(b"another graph")
    measure.entries_on(context, [original], [target])
    assert built == [run / "00-train/model.openvino-b1.xml"]


def test_the_report_knows_the_images_that_ranges_were_taken_from(run: Path) -> None:
    data = load_data(validate_recipe(RECIPE, where="test").data, 0)
    pixels = data.splits["calibration"].take(range(32)).numpy().tobytes()
    told = read_json(run / "report.json")["provenance"]["data"]["calibration_sha256"]
    assert told == hashlib.sha256(pixels).hexdigest()


def test_a_figure_that_is_not_what_the_file_gives_is_found(run: Path) -> None:
    top1 = json.loads((run / "report.json").read_text())["variants"][1]["results"][0]["top1_pct"]
    edit(run, top1_pct=top1 + 0.01, speedup=1500.0, speedup_ci95=[1000.0, 2000.0])
    again = measure_again(run)
    assert not again.holds
    assert set(again.skipped) == {"openvino, batch 1", "pytorch, batch 1"}
    assert outcomes(again, "top1_pct") == {"original": "equal", "int8-onnxruntime": "differs"}
    assert outcomes(again, "speedup") == {"int8-onnxruntime": "differs"}


def test_intervals_that_touch_are_no_difference(run: Path) -> None:
    edit(run, speedup=1.0, speedup_ci95=[0.001, 1000.0])
    assert outcomes(measure_again(run), "speedup") == {"int8-onnxruntime": "equal"}
    edit(run, speedup_ci95=None)
    again = measure_again(run)
    assert outcomes(again, "speedup") == {"int8-onnxruntime": "not compared: no interval"}


def test_elsewhere_answers_may_round_differently_and_speed_is_not_compared(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = environment.describe_machine()
    there = here | {"device": here["device"] | {"cpu": "another"}}
    monkeypatch.setattr(environment, "describe_machine", lambda: there)
    result = json.loads((run / "report.json").read_text())["variants"][1]["results"][0]
    low, high = result["top1_ci95"]
    edit(run, top1_pct=low)
    again = measure_again(run)
    assert "another now" in again.elsewhere
    assert outcomes(again, "top1_pct")["int8-onnxruntime"] == "equal"
    assert outcomes(again, "speedup") == {"int8-onnxruntime": "not compared: elsewhere"}
    edit(run, top1_ci95=[high + 1, high + 2])
    assert outcomes(measure_again(run), "top1_pct")["int8-onnxruntime"] == "differs"


def test_other_images_are_refused(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    report["provenance"]["data"]["fingerprint"] = "0" * 64
    (run / "report.json").write_text(json.dumps(report))
    with pytest.raises(RunError, match=r"images of digits are not those.*fingerprint 0000"):
        measure_again(run)


def test_a_run_without_a_report_cannot_be_measured_again(run: Path) -> None:
    (run / "report.json").unlink()
    with pytest.raises(RunError, match=r"report\.json"):
        measure_again(run)


@pytest.mark.parametrize("changed", ["nothing", "figure", "file"])
def test_the_command_exits_with_1_where_something_differs(
    run: Path, changed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run, speedup=1.0, speedup_ci95=[0.001, 1000.0])  # its timing is no matter here
    if changed == "figure":
        edit(run, top1_pct=0.0)
    if changed == "file":
        (run / "00-train/model.onnx").write_bytes(b"other")
    out = run.parent / "out.json"
    monkeypatch.setattr(
        sys, "argv", ["compress", "verify", str(run), "--measure", "--json", f"{out}"]
    )
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == (0 if changed == "nothing" else 1)
    numbers, text = json.loads(out.read_text()), capsys.readouterr().out
    if changed == "file":
        assert "measured_again" not in numbers
        assert "not measured again: these are no longer the files of the report" in text
    else:
        assert numbers["measured_again"]["holds"] is (changed == "nothing")
        assert f" figures taken again, {int(changed == 'figure')} differ" in text
