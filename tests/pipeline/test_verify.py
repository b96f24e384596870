"""A run folder checked against its record, whole, tampered with and half there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress import artifact
from compress.errors import RunError
from compress.pipeline.verify import verify_files


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two files, the second made from the first, and a report that nobody recorded."""
    root = tmp_path / "run"
    (root / "00-train").mkdir(parents=True)
    (root / "00-train/model.onnx").write_bytes(b"first")
    (root / "00-train/model.int8.onnx").write_bytes(b"second")
    (root / "report.md").write_text("numbers")
    first = artifact.describe_file(root / "00-train/model.onnx", root=root, stage="00-train")
    second = artifact.describe_file(
        root / "00-train/model.int8.onnx", root=root, stage="01-quantize", parent=first.sha256
    )
    record = {"schema": 1, "recipe": {}, "artifacts": [first.to_json(), second.to_json()]}
    artifact.write_json(root / "run.json", record)
    return root


def change(run: Path, **values: Any) -> None:
    record = artifact.read_json(run / "run.json")
    artifact.write_json(run / "run.json", record | values)


def test_an_untouched_run_is_intact(run: Path) -> None:
    found = verify_files(run)
    assert found.intact
    assert found.files == ("00-train/model.onnx", "00-train/model.int8.onnx")
    assert found.unrecorded == ("report.md",)
    assert json.loads(json.dumps(found.to_json()))["intact"] is True


def test_a_changed_file_is_named_with_both_hashes(run: Path) -> None:
    expected = artifact.sha256(run / "00-train/model.onnx")
    (run / "00-train/model.onnx").write_bytes(b"firsT")
    (finding,) = verify_files(run).findings
    assert (finding.path, finding.problem) == ("00-train/model.onnx", "changed")
    assert expected in str(finding)
    assert artifact.sha256(run / "00-train/model.onnx") in str(finding)


def test_a_missing_file_is_named(run: Path) -> None:
    (run / "00-train/model.int8.onnx").unlink()
    (finding,) = verify_files(run).findings
    assert str(finding).startswith(
        "00-train/model.int8.onnx: missing; expected a file with SHA-256"
    )


def test_a_parent_that_nobody_wrote_is_named(run: Path) -> None:
    entries = artifact.read_json(run / "run.json")["artifacts"]
    entries[1]["parent"] = "0" * 64
    change(run, artifacts=entries)
    (finding,) = verify_files(run).findings
    assert finding.problem == "parent unknown"
    assert not verify_files(run).intact


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname"])
def test_a_record_cannot_point_outside_the_run(run: Path, path: str) -> None:
    (run.parent / "secret").write_text("x")
    entries = artifact.read_json(run / "run.json")["artifacts"]
    change(run, artifacts=[entries[0] | {"path": path}])
    (finding,) = verify_files(run).findings
    assert finding.problem == "outside the run folder"
    assert not finding.found


@pytest.mark.parametrize("path", ["a\0b", "x" * 300], ids=["NUL", "too long"])
def test_a_name_that_no_file_can_have_is_a_finding(run: Path, path: str) -> None:
    record = artifact.read_json(run / "run.json")
    record["artifacts"][0]["path"] = path
    change(run, artifacts=record["artifacts"])
    assert any(
        "outside the run folder" in finding.problem for finding in verify_files(run).findings
    )


def test_a_parent_that_is_no_hash_is_refused(run: Path) -> None:
    record = artifact.read_json(run / "run.json")
    record["artifacts"][1]["parent"] = {"sha256": "x"}
    change(run, artifacts=record["artifacts"])
    with pytest.raises(RunError, match="hash of its parent or none"):
        verify_files(run)


def test_verifying_changes_nothing(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    verify_files(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"schema": 2},
            r"run\.json: was written in schema 2, by a newer version.*schema 1 at most",
        ),
        ({"schema": None}, r"run\.json: has no schema number"),
        ({"artifacts": None}, r"run\.json: lists no artifacts"),
        ({"artifacts": [{"path": "x"}]}, r"artifacts\[0\]: does not say which file"),
    ],
)
def test_a_record_that_cannot_be_used_is_explained(run: Path, values: Any, message: str) -> None:
    change(run, **values)
    with pytest.raises(RunError, match=message):
        verify_files(run)


def test_a_folder_without_a_run_is_explained(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run.*a folder with run\.json"):
        verify_files(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json: cannot be read as JSON"):
        verify_files(tmp_path)
