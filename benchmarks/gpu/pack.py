"""Fetch the wheels and build the engines that the kit carries to a machine without an index."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

# What the package needs and an image with PyTorch may lack; of these only the missing are unpacked.
NEEDED = (
    "accelerate", "annotated-types", "onnx", "onnx-ir", "onnxscript", "ml-dtypes", "protobuf",
    "pydantic", "pydantic-core", "typing-inspection", "typer", "shellingham", "annotated-doc",
    "rich", "markdown-it-py", "mdurl", "pygments", "click", "pyyaml", "safetensors", "psutil",
    "torchmetrics", "lightning-utilities", "jinja2", "markupsafe", "packaging", "pytest",
    "pluggy", "iniconfig", "nvidia-ml-py",
)  # fmt: skip
LARGE = ("onnxruntime-gpu", "tensorrt-rtx", "scipy", "scikit-learn", "matplotlib", "pillow")
TABLE = re.compile(r"(?<=<!-- wheels -->\n).*?(?=<!-- end -->)", re.DOTALL)


def pack(wheels: Path, engines: Path, readme: Path) -> None:
    """Fill the two folders and write the sizes into the README."""
    wheels.mkdir(exist_ok=True)
    for name in (*NEEDED, *LARGE):
        _download(name, wheels)
    build_engines(engines)
    listed = sorted(wheels.glob("*.whl"), key=lambda file: -file.stat().st_size)
    readme.write_text(TABLE.sub(lambda _: sizes(listed), readme.read_text()))
    total = sum(file.stat().st_size for file in (*listed, *engines.glob("*")))
    print(f"{len(listed)} wheels and the engines: {total / 2**20:.1f} MiB")


def _download(name: str, wheels: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    for_python = ["--python-version", "3.12", "--implementation", "cp"]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17)]
    platforms += ["manylinux2014_x86_64", "manylinux1_x86_64"]
    flags = [word for platform in platforms for word in ("--platform", platform)]
    ended = subprocess.run([*pip, *for_python, *flags, "-d", str(wheels), name], check=False)
    if ended.returncode:
        print(f"{name}: there is no wheel of it, left out")


def sizes(files: list[Path]) -> str:
    """Return the wheels as a table, the largest first."""
    rows = "".join(f"| {file.name} | {file.stat().st_size / 2**20:.2f} |\n" for file in files)
    return f"| wheel | MiB |\n|---|--:|\n{rows}"


def build_engines(folder: Path, network: str = "resnet18", size: int = 224) -> None:
    """Build engines without a GPU, for every capability, and write down what they must answer."""
    import compress
    from compress.errors import CompressError
    from compress.quantize import quantize_onnx
    from compress.runtimes import build_engine, open_session

    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = compress.load_model(f"torchvision:{network}", num_classes=10).eval()
    images = np.random.default_rng(0).normal(size=(8, 3, size, size)).astype(np.float32)
    files = {"fp32": folder / "fp32.onnx", "int8": folder / "int8.onnx"}
    compress.export_onnx(model, torch.from_numpy(images[:1]), files["fp32"])
    quantize_onnx(files["fp32"], [images], files["int8"], target="tensorrt", method="plain")
    with open_session(files["fp32"], "onnxruntime") as session:
        np.savez(folder / "expected.npz", images=images, logits=session.run(images)[0])
    for precision in ("fp32", "fp16", "int8"):
        source = files["int8" if precision == "int8" else "fp32"]
        out = folder / f"{network}-{precision}.rtx"
        try:
            build_engine(source, out, runtime="tensorrt-rtx", batch=(1, 8, 8), precision=precision)
        except CompressError as error:
            print(f"{out.name}: {error}")
    for file in files.values():
        file.unlink()
