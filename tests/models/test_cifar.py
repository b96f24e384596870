"""Real networks leave torch, whole and pruned: run with -m slow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from compress.export import export_onnx
from compress.models import load_model
from compress.runtimes import open_session

pytestmark = pytest.mark.slow

NO_CNN = ("vit_", "swin", "maxvit")
TOO_LARGE = "regnet_y_128gf"  # 2.6 GB of weights; benchmarks/export_torchvision.py tries it


def names() -> list[str]:
    import torchvision

    every = torchvision.models.list_models(module=torchvision.models)
    return [name for name in every if not name.startswith(NO_CNN) and name != TOO_LARGE]


def with_real_statistics(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.25)
            nn.init.uniform_(module.weight, 0.8, 1.25)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def check(model: nn.Module, path: Path, size: int) -> None:
    """Export, then compare ONNX Runtime with torch on images the export did not see."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7))
    export_onnx(model, torch.zeros(1, 3, size, size), path)
    with torch.inference_mode():
        expected = model(images)
    with open_session(path) as session:
        answer = torch.from_numpy(session.run(images.numpy())[0])
    assert float((answer - expected).abs().max() / expected.abs().max()) < 1e-3


@pytest.mark.filterwarnings("ignore:The default weight initialization of:FutureWarning")
@pytest.mark.parametrize("name", names())
def test_every_torchvision_cnn_is_exported(name: str, tmp_path: Path) -> None:
    model = with_real_statistics(load_model(f"torchvision:{name}"))
    check(model, tmp_path / "x.onnx", 299 if name == "inception_v3" else 224)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_a_pruned_network_is_exported(name: str, tmp_path: Path) -> None:
    from compress.groups.proof import apply_pruning
    from compress.prune import plan_pruning

    model = with_real_statistics(load_model(f"torchvision:{name}"))
    plan = plan_pruning(model, torch.zeros(1, 3, 224, 224), criterion="l1", keep_macs=0.5)
    check(apply_pruning(model, plan), tmp_path / "x.onnx", 224)
