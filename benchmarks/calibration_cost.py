"""Time and peak memory of calibration: ours, ONNX Runtime's methods, NNCF, bare forward passes.

    python benchmarks/calibration_cost.py [--images 64,256,1024] [--repeats 3] [--onnx FILE]

"ours auto" is all of ``compress quantize``, from the file to the int8 file that ONNX Runtime has
answered with; its peer is "nncf full", full bias correction, as "nncf" (fast) is of calibration.
Without --onnx the network is torchvision's ResNet-18 with random weights at 224 x 224. Every row is
a process of its own, so that its peak of resident memory is its own; images are made as they are
read, so that none but the calibrator holds them. Seconds are of the wall; CPU seconds are what
counts on a machine busy with other work, where ``taskset -c 0`` gives every method one thread.
Of several repeats, taken in turns, the one of least CPU time counts. A row is left out where its
memory would not fit (ONNX Runtime's histograms hold every activation of every image).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

METHODS = (
    "forward", "ours minmax", "ours all", "ours auto", "ort minmax", "ort percentile",
    "ort entropy", "nncf", "nncf full",
)  # fmt: skip
HOLDS_IMAGES = {"ort percentile": 64, "ort entropy": 64}  # most images that fit in 16 GiB
SHAPE = (1, 3, 224, 224)


def images(count: int) -> Iterator[np.ndarray]:
    """Yield ``count`` different images, made of a few, at next to no cost."""
    random = np.random.default_rng(0)
    pool = random.standard_normal((8, *SHAPE)).astype(np.float32)
    for index in range(count):
        yield pool[index % 8] * np.float32(0.5 + (index * 37 % 100) / 100)


def forward(path: Path, count: int) -> None:
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for image in images(count):
        session.run(None, {"input": image})


def ours(path: Path, count: int, *, everything: bool) -> None:
    from compress.qdq import read_onnx
    from compress.quantize import calibrate, make_quant_plan

    statistics = calibrate(
        read_onnx(path), lambda: images(count), targets=["onnxruntime"], histograms=everything
    )
    for observer in ("minmax", "percentile", "mse", "entropy") if everything else ("minmax",):
        make_quant_plan(statistics, observer=observer)


def ours_auto(path: Path, count: int) -> None:
    from compress.quantize import quantize_onnx

    with tempfile.TemporaryDirectory() as folder:
        quantize_onnx(path, lambda: images(count), Path(folder) / "int8.onnx")


def ort_calibrate(path: Path, count: int, method: str) -> None:
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    class Reader:
        def __init__(self) -> None:
            self.items = ({"input": image} for image in images(count))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.items, None)

    kind = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}[method]
    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            str(path),
            None,
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=getattr(CalibrationMethod, kind),
        )
        calibrator.collect_data(Reader())
        calibrator.compute_data()


def nncf_calibrate(path: Path, count: int, *, fast: bool) -> None:
    import onnx

    from compress.quantize.api import import_nncf

    nncf = import_nncf()
    data = nncf.Dataset(_Lazy(count), lambda image: {"input": image})
    nncf.quantize(onnx.load(str(path)), data, subset_size=count, fast_bias_correction=fast)


class _Lazy:
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[np.ndarray]:
        return images(self.count)


def work(method: str, path: Path, count: int) -> None:
    """Run one method in this process and print its cost as JSON."""
    kinds: dict[str, Callable[[], None]] = {
        "forward": lambda: forward(path, count),
        "ours minmax": lambda: ours(path, count, everything=False),
        "ours all": lambda: ours(path, count, everything=True),
        "ours auto": lambda: ours_auto(path, count),
        "nncf": lambda: nncf_calibrate(path, count, fast=True),
        "nncf full": lambda: nncf_calibrate(path, count, fast=False),
    }
    run = kinds.get(method) or (lambda: ort_calibrate(path, count, method.split()[1]))
    load_packages(method)
    packages_mib = peak_mib()
    start, cpu = time.perf_counter(), time.process_time()
    run()
    row = {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "packages_mib": round(packages_mib),
        "peak_mib": round(peak_mib()),
    }
    sys.stdout.write("\n" + json.dumps(row) + "\n")


def peak_mib() -> float:
    """Return the peak of resident memory since the program started; rusage counts its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def load_packages(method: str) -> None:
    """Import what ``method`` needs, so that imports are not measured."""
    import onnxruntime

    if method.startswith("nncf"):
        from compress.quantize.api import import_nncf

        import_nncf()
    elif method.startswith("ours"):
        pass
    else:
        import onnxruntime.quantization  # noqa: F401


def export_resnet18(path: Path) -> None:
    import torch
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    torch.onnx.export(
        model, (torch.zeros(SHAPE),), str(path), dynamo=True, input_names=["input"],
        output_names=["logits"], external_data=False, verbose=False,
    )  # fmt: skip


def table(rows: list[dict]) -> str:
    lines = [
        "| method | images | seconds | CPU s | seconds / forward | CPU s / forward | peak MiB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    forward = {r["images"]: r for r in rows if r["method"] == "forward"}
    for r in rows:
        ratios = [r[key] / forward[r["images"]][key] for key in ("seconds", "cpu_seconds")]
        lines.append(
            f"| {r['method']} | {r['images']} | {r['seconds']:.1f} | {r['cpu_seconds']:.1f} |"
            f" {ratios[0]:.2f} | {ratios[1]:.2f} | {r['peak_mib']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--onnx", type=Path)
    parser.add_argument("--images", default="64,256,1024")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker")
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.onnx, int(options.images))
        return
    tried: dict[tuple[int, str], list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = options.onnx or Path(folder) / "resnet18.onnx"
        if options.onnx is None:
            export_resnet18(path)
        for count in (int(n) for n in options.images.split(",")):
            for method in options.methods.split(",") * options.repeats:
                if count > HOLDS_IMAGES.get(method, count):
                    continue
                command = [sys.executable, __file__, "--worker", method, "--onnx", str(path)]
                done = subprocess.run(
                    [*command, "--images", str(count)], capture_output=True, text=True, check=True
                )
                cost = json.loads(done.stdout.strip().splitlines()[-1])
                tried[count, method] = [*tried.get((count, method), []), cost]
                print(method, count, cost, flush=True)
    rows = [
        {"method": method, "images": count, **min(costs, key=lambda c: c["cpu_seconds"])}
        for (count, method), costs in tried.items()
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    about = {
        "machine": platform.processor() or platform.machine(),
        "threads": len(os.sched_getaffinity(0)),
        "repeats": options.repeats,
        "rows": rows,
    }
    (options.out / "calibration_cost.json").write_text(json.dumps(about, indent=1) + "\n")
    (options.out / "calibration_cost.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
