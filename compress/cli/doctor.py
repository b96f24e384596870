"""What this machine has and lacks: packages, GPU, runtimes, and a self-test of all of them."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from compress import environment, packages, plugins
from compress.artifact import scratch
from compress.runtimes import build_engine, open_session, runtime_class, unavailable

if TYPE_CHECKING:
    from rich.console import RenderableType

FLOAT_TOLERANCE = 1e-2  # relative to the largest logit: tf32 on a GPU, bf16 nowhere
INT8_TOLERANCE = 0.1
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
OPTIONAL = {  # distribution: (extra, what it enables); runtimes tell of their own packages
    "torchvision": ("", "networks and data sets by name"),
    "onnx": ("", "the fp32 and int8 graphs"),
    "onnxscript": ("", "export from torch"),
    "onnxruntime-gpu": ("", "runs ONNX on NVIDIA GPUs (instead of onnxruntime)"),
    "nncf": ("", "quantize --method nncf"),
    "timm": ("timm", "networks by timm:NAME"),
    "captum": ("explain", "attributions in the report"),
    "tensorboard": ("tracking", "training curves in TensorBoard"),
    "mlflow": ("tracking", "runs in MLflow"),
    "nvidia-ml-py": ("gpu", "clocks, power and energy of NVIDIA GPUs in bench"),
}


@dataclass(frozen=True)
class Piece:
    """One package and what it is for."""

    name: str
    version: str | None  # None: not installed
    enables: str
    install: str


@dataclass(frozen=True)
class RuntimeState:
    """One runtime on this machine."""

    name: str
    runs: bool
    reason: str  # why it does not, or how it does


@dataclass(frozen=True)
class SelfTest:
    """One step of the self-test."""

    runtime: str
    precision: str
    outcome: str  # "passed", "built", "skipped" or "failed"
    detail: str
    seconds: float


@dataclass(frozen=True)
class Examination:
    """Everything the doctor found."""

    machine: dict[str, Any]
    packages: tuple[Piece, ...]
    runtimes: tuple[RuntimeState, ...]
    trials: tuple[SelfTest, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-able data."""
        return asdict(self)

    def table(self) -> RenderableType:
        """Return what is printed."""
        from rich.console import Group

        from compress.terminal import table

        machine = [
            (key, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
            for key, value in self.machine.items()
        ]
        runtimes = [(s.name, "yes" if s.runs else "no", s.reason) for s in self.runtimes]
        pieces = [
            (each.name, each.version or "-", each.enables, "" if each.version else each.install)
            for each in self.packages
        ]
        headers = ("package", "version", "enables", "install")
        parts = [
            table(("", ""), machine, title="machine"),
            table(("runtime", "runs here", ""), runtimes, title="runtimes"),
            table(headers, pieces, title="packages", whole={"install"}),
        ]
        if self.trials:
            trials = [
                (t.runtime, t.precision, t.outcome, t.detail, f"{t.seconds:.1f}")
                for t in self.trials
            ]
            columns = ("runtime", "precision", "outcome", "", "s")
            parts.append(table(columns, trials, title="self-test", numbers={"s"}))
        return Group(*parts)


def examine(*, selftest: bool = False) -> Examination:
    """Return what is installed and what can run here; with ``selftest``, what does run."""
    return Examination(
        machine=machine(),
        packages=tuple(pieces()),
        runtimes=tuple(state(name) for name in plugins.names("runtimes")),
        trials=tuple(trials()) if selftest else (),
    )


def machine() -> dict[str, Any]:
    """Return facts about the machine that decide what is fast on it."""
    found = environment.describe_machine()["device"]
    facts: dict[str, Any] = {
        "system": f"{found['system']} {found['architecture']}",
        "python": platform.python_version(),
        "cpu": found["cpu"],
        "cpu cores": found.get("threads_usable", found.get("threads")),
        "cpu instructions": [
            name for name in INSTRUCTIONS if name in found.get("instructions", ())
        ],
        "memory": f"{found['memory_gib']} GiB",
        "gpu": "none that PyTorch can use",
    }
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        _, total = torch.cuda.mem_get_info()
        facts["gpu"] = f"{torch.cuda.get_device_name()}, SM{major}{minor}, {total / 2**30:.0f} GiB"
        facts["cuda"] = torch.version.cuda
    return facts


def pieces() -> Iterator[Piece]:
    """Yield every package that enables something, installed or not."""
    of_runtimes = [runtime_class(name) for name in plugins.names("runtimes")]
    needed = {each.package.replace("_", "-"): (each.extra, each.enables) for each in of_runtimes}
    for name, (extra, enables) in (needed | OPTIONAL).items():
        install = packages.install_command(extra) if extra else f"pip install {name}"
        yield Piece(name, packages.version(name), enables, install)


def state(runtime: str) -> RuntimeState:
    """Return whether ``runtime`` runs here, and why not or with what."""
    reason = unavailable(runtime)
    if reason is None:
        return RuntimeState(runtime, True, plugins.create("runtimes", runtime).how())
    if runtime_class(runtime).builds_without_device and packages.is_installed(
        runtime_class(runtime).package
    ):
        reason += "; it builds engines here all the same, for GPUs that are elsewhere"
    return RuntimeState(runtime, False, reason)


def trials() -> Iterator[SelfTest]:
    """Yield the outcome of building and running a small network everywhere, fp32 and int8.

    The network is exported from torch and quantized here, so this tries the whole chain.
    """
    from compress.export import export_onnx
    from compress.qdq.plan import TARGETS
    from compress.quantize import quantize_onnx

    torch.manual_seed(0)
    network = _Small().eval()
    images = torch.randn(4, 3, 16, 16)
    with torch.inference_mode():
        expected = network(images).numpy()
    with scratch() as folder:
        array = images.numpy()
        files = {"fp32": export_onnx(network, images[:1], folder / "small.onnx")}
        for target in TARGETS:
            files[target] = folder / f"small.{target}.onnx"
            quantize_onnx(files["fp32"], [array] * 2, files[target], target=target, method="plain")
        for runtime in plugins.names("runtimes"):
            opens, form = runtime_class(runtime).opens, runtime_class(runtime).int8_form
            source = network if opens == "network" else files["fp32"]
            yield _try(runtime, "fp32", source, array, expected)
            if form is not None:
                yield _try(runtime, "int8", files[form], array, expected)


def _try(
    runtime: str, precision: str, source: Path | nn.Module, images: np.ndarray, expected: np.ndarray
) -> SelfTest:
    """Build if the runtime builds, run if it can run here, and compare."""
    started = time.perf_counter()

    def told(outcome: str, detail: str) -> SelfTest:
        return SelfTest(runtime, precision, outcome, detail, time.perf_counter() - started)

    reason = unavailable(runtime)
    try:
        if isinstance(source, Path) and runtime_class(runtime).opens == "engine":
            if reason and not packages.is_installed(runtime_class(runtime).package):
                return told("skipped", reason)
            engine = source.with_suffix(f".{runtime}")
            source = build_engine(source, engine, runtime=runtime, batch=(1, 4, 4))
            if reason:
                return told("built", f"not run: {reason}")
        if reason:
            return told("skipped", reason)
        with open_session(source, runtime) as session:
            (answer,) = session.run(images)
    except Exception as error:  # noqa: BLE001 - a doctor reports what is wrong, whatever it is
        return told("failed", str(error))
    gap = float(np.abs(answer - expected).max() / np.abs(expected).max())
    limit = INT8_TOLERANCE if precision == "int8" else FLOAT_TOLERANCE
    return told("passed" if gap <= limit else "failed", f"differs from torch by {gap:.1g}")


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.classifier = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.relu(self.second(x) + x)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits
