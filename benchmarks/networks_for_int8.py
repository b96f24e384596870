"""Networks that the int8 benchmarks measure: published CIFAR-10 ones, and hard ones trained here.

    python benchmarks/networks_for_int8.py --cifar10 FILE.npz --out DIR

trains the depthwise networks (about 100 s an epoch of "mobilenet_se" on one idle core) and leaves
ONNX files in DIR, with those of ResNet-20 and ResNet-56 if --checkpoints says where their published
weights are. The other int8 benchmarks read these files.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.models import cifar, weights

MEAN = torch.tensor((0.485, 0.456, 0.406)).reshape(1, 3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).reshape(1, 3, 1, 1)
CHECKPOINTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}


def mobilenet_se() -> nn.Module:
    """Return the depthwise network with squeeze-excite and hard-swish, its first stride 2."""
    model = cifar.mobilenet()
    model.stem[0].stride = (2, 2)
    return model


def densenet() -> nn.Module:
    """Return a small DenseNet-BC, where every layer reads all layers before it, concatenated."""
    import torchvision

    model = torchvision.models.DenseNet(12, (6, 6, 6), num_init_features=24, num_classes=10)
    model.features.conv0 = nn.Conv2d(3, 24, 3, 2, padding=1, bias=False)
    model.features.pool0 = nn.Identity()
    return model


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_se": mobilenet_se,
    "densenet": densenet,
}


def normalize(images: np.ndarray) -> Tensor:
    """Return uint8 (B, H, W, C) as standardized float32 (B, C, H, W)."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return ((tensor - MEAN) / STD).contiguous()


def augmented(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return each image, uint8 (B, H, W, C), shifted by up to 4 pixels, half of them mirrored."""
    count, side = len(images), images.shape[1]
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    y, x = generator.integers(0, 9, (2, count, 1)) + np.arange(side)
    x = np.where(generator.random((count, 1)) < 0.5, x, x[:, ::-1])
    return padded[np.arange(count)[:, None, None], y[:, :, None], x[:, None, :]]


def train(model: nn.Module, images: np.ndarray, labels: np.ndarray, epochs: int, seed: int) -> None:
    """Train in place: SGD with Nesterov momentum, one cycle, shifts and flips."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    model.train().to(memory_format=torch.channels_last)
    batch, lr = 128, 0.1
    steps = len(images) // batch * epochs
    optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for epoch in range(epochs):
        start, order = time.time(), generator.permutation(len(images))
        for chosen in order[: len(images) // batch * batch].reshape(-1, batch):
            x = normalize(augmented(images[chosen], generator))
            x = x.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), torch.from_numpy(labels[chosen]).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {time.time() - start:.0f} s", flush=True)
    model.eval()


def export(model: nn.Module, path: Path) -> None:
    """Write an ONNX file with a free batch size."""
    torch.onnx.export(
        model.eval(),
        (torch.zeros(2, 3, 32, 32),),
        str(path),
        dynamo=True,
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cifar10", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--only", choices=sorted(TRAINED))
    parser.add_argument("--images", type=int, default=50_000, help="training images used")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.checkpoints:  # exported first: the training takes longer
        for name, file in CHECKPOINTS.items():
            model = getattr(cifar, name)()
            state = weights.read_weights(options.checkpoints / file)
            model.load_state_dict(state)
            export(model, options.out / f"{name}.onnx")
    with np.load(options.cifar10) as data:
        chosen = slice(options.images)
        images, labels = data["x_train"][chosen], data["y_train"][chosen]
    for name, build in TRAINED.items():
        if options.only not in (None, name):
            continue
        torch.manual_seed(options.seed)
        model = build()
        train(model, images, labels, options.epochs, options.seed)
        export(model.to(memory_format=torch.contiguous_format), options.out / f"{name}.onnx")


if __name__ == "__main__":
    main()
