"""Files appear whole or not at all."""

import errno
import hashlib

import pytest

from compress import artifact
from compress.errors import RunError


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.json"
    artifact.write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="half"), artifact.replacing(path) as temporary:
        temporary.write_text("{")
        raise ValueError("half")
    assert artifact.read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_plainly(tmp_path):
    with (
        pytest.raises(RunError, match="the disk is full"),
        artifact.replacing(tmp_path / "a"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_plainly_whatever_the_writer_says(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact, "_try_room", full)
    with (
        pytest.raises(RunError, match="the disk is full"),
        artifact.replacing(tmp_path / "a"),
    ):
        raise RuntimeError("unexpected pos 108288 vs 108176")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="unexpected"), artifact.replacing(tmp_path / "a"):
        raise RuntimeError("unexpected pos 108288 vs 108176")


def test_a_writer_in_cpp_that_took_its_file_away_is_said_plainly(tmp_path):
    """There is room again by then: OpenVINO removes what it could not write whole."""
    with (
        pytest.raises(RunError, match="the disk is full, or a file may not be so large"),
        artifact.replacing(tmp_path / "a") as temporary,
    ):
        temporary.unlink()
        raise RuntimeError("basic_ios::clear: iostream error")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        artifact.write_text(tmp_path / "file" / "below", "x")


def test_broken_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(RunError, match=r"a.json: cannot be read as JSON"):
        artifact.read_json(tmp_path / "a.json")


def test_numbers_that_json_has_not_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifact.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_an_artifact_carries_path_hash_and_lineage(tmp_path):
    path = tmp_path / "01-prune" / "model.onnx"
    artifact.write_bytes(path, b"content")
    made = artifact.describe_file(path, root=tmp_path, stage="01-prune", parent="abc")
    assert made.to_json() == {
        "path": "01-prune/model.onnx",
        "sha256": hashlib.sha256(b"content").hexdigest(),
        "stage": "01-prune",
        "parent": "abc",
        "settings": {},
    }


def test_files_are_readable_by_others_as_the_umask_says(tmp_path):
    artifact.write_text(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
