"""No home, no place for temporary files, a locale of 1970, odd paths, folders that were moved."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from functools import partial

import pytest
from attempts import attempt, both, files, recorded
from test_disk import disk, is_root, without_memory

PRUNE = (
    *("prune", "compress.models.cifar:resnet8", "--data", "digits", "--criterion", "l1"),
    *("--set", "model.options.in_channels=1", "--set", "model.options.width=4"),
    *("--keep-latency", "0.99"),
    *("--set", "measure.rounds=3", "--set", "measure.round_ms=1", "--set", "measure.test_images=9"),
)


def homeless():
    os.environ.pop("HOME", None)
    os.environ.pop("XDG_CACHE_HOME", None)
    pwd.getpwuid = lambda uid: (_ for _ in ()).throw(KeyError(uid))  # what a container has


@pytest.mark.slow
def test_without_a_home(small, tmp_path, tried):
    tried("no HOME and no entry for the user: run, prune for a latency", 2)
    out = tmp_path / "run"
    ended = attempt(
        *PRUNE,
        *("--out", out),
        log=tmp_path / "log",
        fault=both(homeless, without_memory),
    )
    assert ended.fault is None, ended.told  # on a busy machine it may miss the latency: 1
    assert "there is no home folder" in ended.told


def no_temporary_files():
    tempfile.tempdir = None
    tempfile._candidate_tempdir_list = lambda: ["/nowhere"]


@pytest.mark.slow
def test_without_a_place_for_temporary_files(small, tmp_path, tried):
    tried("no writable temporary folder")
    ended = attempt(
        "run", small, "--out", tmp_path / "run", log=tmp_path / "log", fault=no_temporary_files
    )
    assert ended.code == 2, ended.told
    assert "Set TMPDIR" in ended.sentence


@pytest.mark.slow
def test_a_locale_without_letters(whole, tmp_path, tried):
    """ASCII from end to end, as in a bare container or a cron job of old."""
    tried("locale C, output in ASCII: doctor, list, report, a path with umlauts that is absent", 4)
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment |= {"PYTHONIOENCODING": "ascii", "XDG_CACHE_HOME": str(tmp_path)}
    for command in (["list"], ["report", whole, "--out", tmp_path / "again"], ["verify", "ä ö"]):
        ended = subprocess.run(
            [sys.executable, "-m", "compress", *map(str, command)],
            env=environment,
            capture_output=True,
        )
        told = (ended.stdout + ended.stderr).decode("ascii")
        assert ended.returncode in {0, 2}, told
        assert "Traceback" not in told and "should not happen" not in told


ODD = {
    "all": "-a  b\nPrüfung 模型 \u202e [a]*?{x} '\"$(b)%s ",
    "long": "n" * 200,
    "deep": "/".join(["d" * 100] * 12),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_odd_paths(name, small, whole, tmp_path, tried):
    """A run, its report, its check, its bundle and a lint in folders that few people make."""
    tried("a folder with an odd name: run, report, verify, lint, bundle", 5)
    folder = tmp_path / ODD[name]
    folder.mkdir(parents=True)
    recipe = shutil.copy(small, folder / "small.yaml")
    shutil.copytree(whole, folder / "run")  # all but the last stage is there
    shutil.rmtree(folder / "run" / "03-measure")
    calls = (
        ("run", recipe, "--out", folder / "run"),
        ("report", folder / "run"),
        ("verify", folder / "run"),
        ("lint", folder / "run/02-quantize/model.onnxruntime.onnx", "--target", "onnxruntime"),
        ("bundle", folder / "run", "--out", folder / "x.tar.gz"),
    )
    for call in calls:
        ended = attempt(*call, log=tmp_path / "log", fault=without_memory)
        assert ended.code in {0, 1}, (call, ended.told)
    assert recorded(folder / "run") == recorded(whole)
    assert files(folder / "run") >= files(whole)


@pytest.mark.slow
def test_a_path_that_is_no_text_is_a_sentence(small, whole, tmp_path, tried):
    """Python and the file system take any bytes, ONNX Runtime and OpenVINO take UTF-8."""
    tried("a folder whose name is not UTF-8: run and lint are refused; report, verify, bundle", 5)
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    shutil.copytree(whole, folder / "run")
    graph = folder / "run/02-quantize/model.onnxruntime.onnx"
    for call in (
        ("run", small, "--out", folder / "new"),
        ("lint", graph, "--target", "onnxruntime"),
    ):
        ended = attempt(*call, log=tmp_path / "log")
        assert ended.code == 2 and "has a name that is not UTF-8" in ended.told, ended.told
    for call in (("report",), ("verify",), ("bundle", "--out", tmp_path / "x.tar.gz")):
        ended = attempt(call[0], folder / "run", *call[1:], log=tmp_path / "log")
        assert ended.fault is None, (call, ended.told)


@pytest.mark.slow
def test_a_path_that_is_too_long_is_a_sentence(small, tmp_path, tried):
    tried("a path beyond what the system takes", 2)
    for name in ("x" * 300, "/".join(["d" * 200] * 25)):
        ended = attempt("run", small, "--out", tmp_path / name, log=tmp_path / "log")
        assert ended.code == 2 and "File name too long" in ended.sentence, ended.told


@pytest.mark.slow
@pytest.mark.parametrize("way", ["moved", "copied", "linked"])
def test_a_run_folder_elsewhere(way, small, whole, tmp_path, tried):
    """Half a run goes on where it lies now, to the same files; a whole one is checked there."""
    tried("a run folder moved, copied or reached by a symlink: goes on, report, check", 3)
    half, here = tmp_path / "half", tmp_path / "elsewhere" / "run"
    here.parent.mkdir()
    shutil.copytree(whole, half)
    for stage in ("02-quantize", "03-measure"):
        shutil.rmtree(half / stage)
    if way == "linked":
        here.symlink_to(half, target_is_directory=True)
    else:
        shutil.copytree(half, here)
    if way == "moved":
        shutil.rmtree(half)
    for call in (("run", small, "--out", here), ("report", here), ("verify", here)):
        ended = attempt(*call, log=tmp_path / "log", fault=without_memory)
        assert ended.code == 0, (call, ended.told)
    assert recorded(here) == recorded(whole)


class Backwards:
    """A clock that somebody sets back by a day, again and again."""

    def __init__(self, clock):
        self.clock, self.calls = clock, 0

    def __call__(self):
        self.calls += 1
        return self.clock() - 86400 * (self.calls // 3)


def set_clock_back():
    import time

    time.time = Backwards(time.time)
    without_memory()


@pytest.mark.slow
def test_a_clock_that_jumps_back(small, whole, tmp_path, tried):
    tried("a clock that is set back by a day at every third look, through a run")
    ended = attempt(
        "run", small, "--out", tmp_path / "run", log=tmp_path / "log", fault=set_clock_back
    )
    assert ended.code == 0, ended.told
    assert recorded(tmp_path / "run") == recorded(whole)


def files_from_the_future(folder):
    """Set the time of every file to a year from now."""
    import time

    later = time.time() + 365 * 86400
    for path in folder.rglob("*"):
        os.utime(path, (later, later))


@pytest.mark.slow
def test_files_from_the_future(small, whole, tmp_path, tried):
    tried("a run whose files are a year younger than the clock says")
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "03-measure")
    files_from_the_future(tmp_path / "run")
    ended = attempt(
        "run", small, "--out", tmp_path / "run", log=tmp_path / "log", fault=without_memory
    )
    assert ended.code == 0, ended.told
    assert recorded(tmp_path / "run") == recorded(whole)


def home_is(folder):
    os.environ["HOME"] = str(folder)
    os.environ.pop("XDG_CACHE_HOME", None)
    without_memory()


@is_root
@pytest.mark.slow
def test_a_home_that_cannot_be_written(small, tmp_path, tried):
    """Caches are a help, never a condition."""
    tried("a read-only HOME: prune for a latency, whose table cannot be kept")
    with disk(tmp_path / "home", 64) as again:
        again("ro")
        ended = attempt(
            *PRUNE,
            *("--out", tmp_path / "run"),
            log=tmp_path / "log",
            fault=partial(home_is, tmp_path / "home"),
        )
        assert ended.fault is None, ended.told
        assert "latencies are not kept" in ended.told
