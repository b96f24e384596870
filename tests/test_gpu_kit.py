"""The GPU kit: slices that resume, failures that stand, tables; and all of it rehearsed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GPU = ROOT / "benchmarks" / "gpu"
sys.path.insert(0, str(GPU))

import kit  # noqa: E402
import pack  # noqa: E402
import tables  # noqa: E402

SCRIPT = """
import argparse, json, pathlib, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("what"), parser.add_argument("--json"), parser.add_argument("--work")
given = parser.parse_args()
count = pathlib.Path(given.work + given.what)
count.parent.mkdir(parents=True, exist_ok=True)
calls = len(count.read_text()) if count.is_file() else 0
count.write_text("x" * (calls + 1))
if given.what == "fails":
    sys.exit("it is broken")
if given.what in ("hangs", "trains") and calls == 0:
    time.sleep(60)
pathlib.Path(given.json).write_text(json.dumps({"calls": calls + 1}))
"""


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    script = tmp_path / "unit.py"
    script.write_text(SCRIPT)
    units = [kit.Unit("works", (str(script), "works")), kit.Unit("fails", (str(script), "fails"))]
    units.append(kit.Unit("hangs", (str(script), "hangs")))
    units.append(kit.Unit("trains", (str(script), "trains"), resumes=True))
    monkeypatch.setattr(kit, "units", lambda rehearse: units)
    monkeypatch.setattr(kit, "STOP_S", 0.1)
    monkeypatch.setattr(kit, "RESERVE_S", 0.1)
    return argparse.Namespace(minutes=0.2, only=[], out=tmp_path / "out", rehearse=True)


def found(given: argparse.Namespace) -> dict:
    return json.loads((given.out / "gpu.json").read_text())["units"]


def test_a_unit_that_is_done_is_not_run_again(given: argparse.Namespace) -> None:
    given.only = ["works"]
    assert kit.one_slice(given) == kit.DONE
    assert kit.one_slice(given) == kit.DONE
    assert found(given)["works"]["found"] == {"calls": 1}


def test_a_failure_is_tried_once_more_and_then_stands(given: argparse.Namespace) -> None:
    given.only = ["fails"]
    assert kit.one_slice(given) == kit.MORE
    assert kit.one_slice(given) == kit.DONE
    record = found(given)["fails"]
    assert record["attempts"] == 2
    assert "it is broken" in record["failed"]


@pytest.mark.parametrize("name", ["hangs", "trains"])
def test_what_runs_out_of_time_goes_on_in_the_next_slice(
    given: argparse.Namespace, name: str
) -> None:
    given.only, given.minutes = [name], 0.03
    assert kit.one_slice(given) == kit.MORE
    assert (given.out / "gpu.json").is_file() == (name == "hangs")  # it failed; training waits
    given.minutes = 0.5
    assert kit.one_slice(given) == kit.DONE
    assert found(given)[name]["found"] == {"calls": 2}


def test_without_time_nothing_is_started(given: argparse.Namespace) -> None:
    given.minutes = 0.0
    assert kit.one_slice(given) == kit.MORE
    assert not given.out.exists()


def test_an_unknown_unit_is_refused_with_the_known_ones(given: argparse.Namespace) -> None:
    given.only = ["latency"]
    with pytest.raises(SystemExit, match="known are works, fails"):
        kit.one_slice(given)


def test_every_unit_of_the_kit_has_its_script_and_recipe() -> None:
    for rehearse in (True, False):
        units = kit.units(rehearse)
        assert len({unit.name for unit in units}) == len(units)
        for unit in units:
            files = [word for word in unit.command if word.endswith((".py", ".yaml"))]
            assert all(Path(file).is_file() for file in files)
    names = {unit.name for unit in kit.units(False)}
    assert {"latency-resnet50-32", "accuracy-cifar100-resnet56", "tests", "engines"} <= names


def test_tables_hold_what_was_found_and_what_failed() -> None:
    row = {"latency_ms_p50": 1.5, "speedup": 2.0, "speedup_ci95": [1.9, 2.1]}
    latency = {"network": "n", "batch": 8, "latencies": {"a": row}, "skipped": {"b": "no | GPU"}}
    engine = {"loads": True, "off_of_largest_logit": 0.001, "same_class_pct": 100.0}
    result = {"runtime": "onnxruntime", "precision": "int8", "top1_pct": 90.0}
    variant = {"name": "pruned", "params": 1000, "macs": 2000, "size_mib": 0.5, "results": [result]}
    units = {
        "latency-n-8": {"found": latency},
        "engines": {"found": {"engines": {"x.rtx": engine}}},
        "accuracy-r": {"found": {"variants": [variant]}},
        "accuracy-s": {"found": {"skipped": "no data"}},
        "device": {"failed": "exit code 1"},
    }
    text = tables.markdown({"units": units, "date": "2026-01-02", "rehearsal": True})
    for part in (
        "| n | 8 | a | 1.500 |  | 2.00 (1.90..2.10) |",
        "b | not measured: no / GPU",
        "| x.rtx | yes | 0.001 | 100.0 | |",
        "| r | pruned | onnxruntime int8 |  | 90.00 | 1,000 | 2,000 | 0.500 |",
        "accuracy-s: not run: no data",
        "device: exit code 1",
        "rehearsal",
    ):
        assert part in text


def test_wheels_are_listed_by_size(tmp_path: Path) -> None:
    file = tmp_path / "a-1-py3-none-any.whl"
    file.write_bytes(bytes(2**20))
    assert "| a-1-py3-none-any.whl | 1.00 |" in pack.sizes([file])


@pytest.mark.slow
def test_all_of_it_is_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(GPU / "all.sh"), "--rehearse", "--minutes", "30", "--out", str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == kit.DONE, ended.stdout
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert {n: u["failed"] for n, u in content["units"].items() if "failed" in u} == {}
    assert set(content["units"]) == {unit.name for unit in kit.units(True)}
    text = (tmp_path / "gpu.md").read_text()
    for part in ("pytest -m gpu", "pytorch eager fp32", "tensorrt-rtx int8", "distilled"):
        assert part in text
