"""Latency of the shipped artifacts on CPU runtimes, all interleaved in one run.

    python benchmarks/cpu_runtimes.py [--only resnet18] [--threads 2] [--seconds 3] [--size 224]

ResNet-18, ResNet-50, MobileNetV2 and EfficientNet-B0, and ResNet-18 pruned to half its MACs: fp32
and int8, on ONNX Runtime and OpenVINO, at batch 1 and 8. Every figure is a ratio to the original in
fp32 on ONNX Runtime, timed in the same rounds. OpenVINO is held to fp32 where it says fp32; "bf16"
is what it does with an fp32 file if nobody asks. Weights are random, which decides accuracy and not
speed. Written to benchmarks/results/cpu_runtimes.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: TID253 - the networks are its
from torch import nn

from compress.export import export_onnx
from compress.groups.proof import apply_pruning
from compress.measure.latency import Timing, bench
from compress.prune import plan_pruning
from compress.quantize import quantize_onnx
from compress.runtimes import Session, open_session
from compress.runtimes._fusion import check_fusion

RESULTS = Path(__file__).parent / "results" / "cpu_runtimes.json"
NETWORKS = ("resnet18", "resnet18-half", "resnet50", "mobilenet_v2", "efficientnet_b0")
REFERENCE = "onnxruntime fp32"


def network(name: str, example: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name.removesuffix("-half"), weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.25)
    model.eval()
    if not name.endswith("-half"):
        return model
    plan = plan_pruning(model, example, criterion="l2", keep_macs=0.5, round_to=32)
    return apply_pruning(model, plan)


class Raw:
    """ONNX Runtime called directly: what a session is compared with."""

    def __init__(self, session: Session) -> None:
        self.run_raw = session.raw.session.run  # type: ignore[attr-defined]

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Return the answers as the runtime gives them."""
        answers: list[np.ndarray] = self.run_raw(None, {"input": arrays[0]})
        return answers


def artifacts(name: str, size: int, folder: Path) -> dict[str, Path]:
    example = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    files = {"fp32": export_onnx(network(name, example), example, folder / f"{name}.onnx")}
    generator = np.random.default_rng(0)
    images = [generator.normal(size=(4, 3, size, size)).astype(np.float32) for _ in range(4)]
    for target in ("onnxruntime", "openvino"):
        files[target] = folder / f"{name}.{target}.onnx"
        quantize_onnx(files["fp32"], images, files[target], target=target, method="plain")
    return files


def measured(name: str, wanted: argparse.Namespace, original: Path | None) -> dict[str, Any]:
    threads, size = wanted.threads, wanted.size
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = artifacts(name, wanted.size, Path(folder))
        row: dict[str, Any] = {
            f"{runtime} int8 share": round(
                check_fusion(files[runtime], runtime, threads=threads).int8_share, 4
            )
            for runtime in ("onnxruntime", "openvino")
        }
        for batch in (1, 8):
            sessions = opened(files, original, threads, batch, stack)
            images = np.random.default_rng(1).normal(size=(batch, 3, size, size))
            result = bench(
                sessions, [images.astype(np.float32)], timing=Timing(seconds=wanted.seconds)
            )
            row[f"batch {batch}"] = {
                label: {
                    "latency_ms_p50": round(found.latency_ms_p50, 3),
                    "speedup": found.speedup and round(found.speedup, 3),
                    "speedup_ci95": found.speedup_ci95,
                    "verdict": found.verdict,
                }
                for label, found in result.items()
            } | {"skipped": result.skipped, "conditions": result.conditions}
        return row


def opened(
    files: dict[str, Path],
    original: Path | None,
    threads: int,
    batch: int,
    stack: contextlib.ExitStack,
) -> dict[str, Any]:
    """Return sessions by label; the first is the reference."""

    def session(path: Path, runtime: str, **options: Any) -> Session:
        return stack.enter_context(
            open_session(path, runtime, threads=threads, batch=batch, **options)
        )

    reference = session(original or files["fp32"], "onnxruntime")
    sessions: dict[str, Any] = {REFERENCE: reference}
    if original is None:
        sessions["onnxruntime fp32, called directly"] = Raw(reference)
    else:
        sessions["onnxruntime fp32, pruned"] = session(files["fp32"], "onnxruntime")
    return sessions | {
        "onnxruntime int8": session(files["onnxruntime"], "onnxruntime"),
        "openvino fp32": session(files["fp32"], "openvino"),
        "openvino bf16": session(files["fp32"], "openvino", inference_precision="auto"),
        "openvino int8": session(files["openvino"], "openvino"),
        "openvino int8 and bf16": session(
            files["openvino"], "openvino", inference_precision="auto"
        ),
    }


def table(rows: dict[str, Any]) -> str:
    labels = list(dict.fromkeys(k for row in rows.values() for k in row["batch 1"] if " " in k))
    head = "| network | batch | " + " | ".join(labels) + " |\n"
    text = head + "|---|--:|" + "--:|" * len(labels) + "\n"
    for name, row in rows.items():
        for batch in (1, 8):
            cells = []
            for label in labels:
                found = row[f"batch {batch}"].get(label)
                ratio = f" ({found['speedup']:.2f}x)" if found and found["speedup"] else ""
                cells.append(f"{found['latency_ms_p50']:.2f}{ratio}" if found else "")
            text += f"| {name} | {batch} | " + " | ".join(cells) + " |\n"
    return text


def machine(threads: int) -> dict[str, Any]:
    import onnxruntime
    import openvino

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags")).split()
    return {
        "cpu": next(line for line in lines if line.startswith("model name")).split(": ")[1],
        "instructions": [f for f in flags if f.startswith(("avx512_", "avx_vnni", "amx"))],
        "threads": threads,
        "onnxruntime": onnxruntime.__version__,
        "openvino": openvino.__version__,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--out", type=Path, default=RESULTS)
    wanted = parser.parse_args()
    size = wanted.size
    told: dict[str, Any] = {"machine": machine(wanted.threads), "networks": {}}
    with tempfile.TemporaryDirectory() as folder:
        example = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        for name in NETWORKS:
            if not name.startswith(wanted.only):
                continue
            original = None
            if name.endswith("-half"):
                whole = name.removesuffix("-half")
                original = export_onnx(
                    network(whole, example), example, Path(folder, f"{whole}.onnx")
                )
            told["networks"][name] = measured(name, wanted, original)
            print(table({name: told["networks"][name]}), flush=True)
            write(told, wanted.out)


def write(told: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(told, indent=1) + "\n")
    facts = ", ".join(f"{key} {value}" for key, value in told["machine"].items())
    out.with_suffix(".md").write_text(
        "# CPU runtimes\n\nms, median (ratio to the original, fp32 on ONNX Runtime, interleaved). "
        f"`python benchmarks/cpu_runtimes.py`; {facts}.\n\n{table(told['networks'])}"
    )


if __name__ == "__main__":
    main()
