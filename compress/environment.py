"""Where a number comes from: versions, processor, GPU, clocks, commit of the user's folder."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from compress import packages
from compress.errors import UsageError

_LEAST_ADDRESSES = 1 << 30  # bytes left to a process beyond those of its libraries
PACKAGES = (
    "compress",
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
)
# What decides how fast int8 and half precision are.
_INSTRUCTIONS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


def describe_machine(folder: Path | None = None, root: Path = Path("/")) -> dict[str, Any]:
    """Return where and with what something is measured; what cannot be read is absent.

    No name of the machine, of its user or of a folder is in it: it goes into reports.

    Args:
        folder: Whose git commit is told; the current one if absent.
        root: Where proc and sys are; tests give another.

    Returns:
        "versions" by package, "device" (processor, memory, GPU), "commit" of ``folder``.
    """
    found = {
        "versions": versions(),
        "device": {**_processor(root), **_gpu(root)},
        "commit": commit(folder or Path.cwd()),
    }
    return {name: value for name, value in found.items() if value}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    installed = {name: packages.version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | {
        name: version for name, version in installed.items() if version
    }


def commit(folder: Path) -> str | None:
    """Return the git commit that ``folder`` is at, with a + if files differ from it; or None."""
    identity = _git(folder, "rev-parse", "HEAD")
    if identity is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{identity}+" if changed else identity


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        ended = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a folder on a slow disk
        return None
    return ended.stdout.strip() if ended.returncode == 0 else None


def _processor(root: Path) -> dict[str, Any]:
    first = (_read(root / "proc/cpuinfo") or "").split("\n\n")[0]  # the facts of the first core
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    information = {name.strip(): value.strip() for name, value in pairs}
    limit, _, period = (_read(root / "sys/fs/cgroup/cpu.max") or "max").partition(" ")
    flags = (information.get("flags") or information.get("Features") or "").split()
    frequency = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    found = {
        "cpu": information.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "threads_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "cpu_quota": int(limit) / int(period) if limit.isdigit() and period.isdigit() else None,
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "virtual_machine": "hypervisor" in flags or None,
        "cpu_max_mhz": float(frequency) / 1000 if frequency else None,
        "governor": _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    return {name: value for name, value in found.items() if value}


def check_address_space() -> None:
    """Refuse to begin where a limit leaves this process too little address space.

    Kernels of torch and OpenVINO that cannot allocate end the process without a word, which was
    seen with up to 200 MiB; with 512 MiB shared libraries cannot be mapped.

    Raises:
        UsageError: less than 1 GiB is left (``ulimit -v``).
    """
    if sys.platform == "win32":  # has no such limit
        return
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = _read(Path("/proc/self/statm"))
    if limit == resource.RLIM_INFINITY or pages is None:
        return
    left = limit - int(pages.split()[0]) * resource.getpagesize()
    if left < _LEAST_ADDRESSES:
        raise UsageError(
            f"a limit on address space leaves {max(left, 0) >> 20} MiB to this process",
            expected=f"at least {_LEAST_ADDRESSES >> 20} MiB beyond the {(limit - left) >> 20} MiB "
            "that libraries take",
            fix="Raise it (ulimit -v unlimited, h_vmem, --mem)",
        )


def _gpu(root: Path) -> dict[str, Any]:
    """Return the GPUs that PyTorch can use; PyTorch is not imported for this alone."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    kinds = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    driver = _read(root / "proc/driver/nvidia/version") or ""
    words = driver.splitlines()[0].split() if driver else []
    number = next((word for word in words if word[0].isdigit() and "." in word), None)
    found = {
        "gpu": ", ".join(kind.name for kind in kinds),
        "gpu_memory_mib": [kind.total_memory // 2**20 for kind in kinds],
        "compute_capability": [f"{kind.major}.{kind.minor}" for kind in kinds],
        "driver": number,
        "cuda": torch.version.cuda,
    }
    return {name: value for name, value in found.items() if value}


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # this system has no such file, or does not show it
        return None
