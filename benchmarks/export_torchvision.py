"""Export every torchvision classification CNN, whole and pruned, and load it in each runtime.

    python benchmarks/export_torchvision.py [--only resnet] [--skip NAME] [--size 224]

Networks that benchmarks/results/export_torchvision.json already holds are left out.

For each network, with random weights and random BatchNorm statistics, and for the same network
pruned to half its MACs: seconds to export (with the proof against torch), the largest difference
of ONNX Runtime and OpenVINO to torch, and the layers and warnings of a TensorRT-RTX engine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import torchvision  # noqa: TID253 - this script is about it
from torch import nn

from compress.export import export_onnx
from compress.export.proof import difference
from compress.groups.proof import apply_pruning
from compress.prune.plan import plan_pruning
from compress.runtimes import build_engine, build_record, open_session

RESULTS = Path(__file__).parent / "results" / "export_torchvision.json"
NO_CNN = ("vit_", "swin", "maxvit")
PRUNED = ", half the MACs"


def networks() -> list[str]:
    names = torchvision.models.list_models(module=torchvision.models)
    return sorted(
        (name for name in names if not name.startswith(NO_CNN)),
        key=lambda name: name == "regnet_y_128gf",  # the largest by far comes last
    )


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **extra)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.25)
            nn.init.uniform_(module.weight, 0.8, 1.25)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def halved(model: nn.Module, image: torch.Tensor) -> nn.Module:
    return apply_pruning(model, plan_pruning(model, image, criterion="l2", keep_macs=0.5)).eval()


def exported(model: nn.Module, images: torch.Tensor, folder: Path) -> dict[str, object]:
    started = time.perf_counter()
    path = export_onnx(model, images[:1], folder / "model.onnx")
    row: dict[str, object] = {"export_s": round(time.perf_counter() - started, 1)}
    with torch.inference_mode():
        expected = model(images)
    for runtime in ("onnxruntime", "openvino"):
        with open_session(path, runtime) as session:
            answer = torch.from_numpy(session.run(images.numpy())[0])
        row[f"{runtime}_difference"] = float(f"{difference([answer], [expected]):.2g}")
    engine = build_engine(path, folder / "model.engine", runtime="tensorrt-rtx")
    record = build_record(engine)
    return row | {"rtx_layers": record["layers"], "rtx_warnings": record["warnings"]}


def tried(name: str, size: int) -> dict[str, object]:
    model = network(name.removesuffix(PRUNED))
    size = 299 if name.startswith("inception_v3") else size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    if name.endswith(PRUNED):
        model = halved(model, images[:1])
    with tempfile.TemporaryDirectory() as folder:
        return exported(model, images, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", default="-")
    parser.add_argument("--size", type=int, default=224)
    wanted = parser.parse_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    named = [name for name in networks() if name.startswith(wanted.only) and name != wanted.skip]
    for name in (name + form for name in named for form in ("", PRUNED)):
        if name in rows and "error" not in rows[name]:
            continue
        try:
            rows[name] = tried(name, wanted.size)
        except Exception as error:  # noqa: BLE001 - the table says which network fails
            rows[name] = {"error": f"{type(error).__name__}: {error}"}
        print(name, rows[name], flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
    failed = [name for name, row in rows.items() if "error" in row]
    print(f"{len(rows) - len(failed)} of {len(rows)} networks; failed: {failed or 'none'}")


if __name__ == "__main__":
    main()
