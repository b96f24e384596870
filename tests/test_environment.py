"""Provenance against the system's own tools, and against a made-up one."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from compress import environment


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    ended = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout.strip()


def test_description_is_json_and_holds_versions_and_the_processor() -> None:
    found = environment.describe_machine()
    json.dumps(found, allow_nan=False)
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == version("torch")
    assert found["device"]["threads"] >= 1
    assert found["device"]["cpu"]


def test_description_names_no_machine_user_or_folder(tmp_path: Path) -> None:
    import getpass

    text = json.dumps(environment.describe_machine(tmp_path))
    assert str(tmp_path) not in text
    assert platform.node() not in text
    assert f'"{getpass.getuser()}"' not in text


def test_commit_is_that_of_the_folder_and_marks_changes(tmp_path: Path) -> None:
    assert environment.commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert environment.commit(tmp_path) is None
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert environment.commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert environment.commit(tmp_path) == f"{head}+"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.commit(tmp_path) is None


def test_a_made_up_machine_is_read(tmp_path: Path) -> None:
    cpu = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    cpu.mkdir(parents=True)
    (cpu / "scaling_governor").write_text("performance\n")
    (cpu / "cpuinfo_max_freq").write_text("3500000\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("150000 100000\n")
    (tmp_path / "proc").mkdir()
    core = "processor : 0\nmodel name : Imaginary 9000\nflags : fpu avx2 amx_int8 hypervisor\n"
    (tmp_path / "proc/cpuinfo").write_text(f"{core}\nprocessor : 1\nmodel name : other\n")
    device = environment.describe_machine(tmp_path, tmp_path)["device"]
    assert device["cpu"] == "Imaginary 9000"
    assert device["instructions"] == ["avx2", "amx_int8"]
    assert device["virtual_machine"] is True
    assert (device["governor"], device["cpu_max_mhz"], device["cpu_quota"]) == (
        "performance",
        3500.0,
        1.5,
    )


def test_a_machine_that_tells_nothing_is_no_error(tmp_path: Path) -> None:
    device = environment.describe_machine(tmp_path, tmp_path)["device"]
    assert "governor" not in device
    assert "cpu_quota" not in device


def test_gpu_and_driver_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = SimpleNamespace(name="Imaginary GPU", total_memory=8 * 2**30, major=9, minor=0)
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_properties=lambda _: kind,
    )
    torch = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0"))
    monkeypatch.setitem(environment.sys.modules, "torch", torch)
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n"
    (tmp_path / "proc/driver/nvidia/version").write_text(line)
    device = environment.describe_machine(tmp_path, tmp_path)["device"]
    assert device["gpu"] == "Imaginary GPU"
    assert device["gpu_memory_mib"] == [8192]
    assert (device["compute_capability"], device["driver"], device["cuda"]) == (
        ["9.0"],
        "580.65.06",
        "13.0",
    )
