"""Pre- and post-processing inside the graph: uint8 images in, probabilities out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from compress.errors import ExportError
from compress.graph.values import EditableGraph


@dataclass(frozen=True)
class Preprocess:
    """How images become network input: ``(image / 255 - mean) / std``, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0:
            raise ExportError(
                f"mean {self.mean} and std {self.std} do not describe a normalization",
                expected="one mean and one positive std for each channel",
            )

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Return scale and shift, (1, C, 1, 1) float32: normalized = image * scale + shift."""
        std = np.asarray(self.std, np.float64)
        scale = 1.0 / (255.0 * std)
        shift = -np.asarray(self.mean, np.float64) / std
        shape = (1, -1, 1, 1)
        return scale.reshape(shape).astype(np.float32), shift.reshape(shape).astype(np.float32)

    def __call__(self, images: Tensor) -> Tensor:
        """Return uint8 (B, H, W, C) images as normalized float32 (B, C, H, W)."""
        mean = torch.tensor(self.mean).reshape(1, -1, 1, 1)
        std = torch.tensor(self.std).reshape(1, -1, 1, 1)
        normalized: Tensor = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
        return normalized


def attach(model: ir.Model, preprocess: Preprocess | None, *, softmax: bool) -> None:
    """Put ``preprocess`` before the only input of ``model`` and softmax behind its only output.

    Raises:
        ExportError: it has several inputs or outputs, or other channels.
    """
    if len(model.graph.inputs) != 1 or len(model.graph.outputs) != 1:
        raise ExportError(
            f"{len(model.graph.inputs)} inputs and {len(model.graph.outputs)} outputs leave "
            "open which of them preprocess and softmax mean",
            expected="a network with one input and one output",
        )
    if preprocess is not None:
        _prepend(model, preprocess)
    if softmax:
        _append_softmax(model.graph)


def wrapping_facts(preprocess: Preprocess | None, softmax: bool) -> dict[str, Any]:
    """Return the metadata about pre- and post-processing for whoever reads the file."""
    said: dict[str, Any] = {}
    if preprocess is not None:
        said = {
            "layout": "NHWC",
            "input_range": [0, 255],
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "normalized_inside": True,
        }
    return said | ({"output": "probabilities"} if softmax else {})


def _prepend(model: ir.Model, preprocess: Preprocess) -> None:
    network = model.graph.inputs[0]
    if network.shape is None or len(network.shape) != 4 or network.dtype != ir.DataType.FLOAT:
        raise ExportError(
            f"preprocess takes images, and the input of this network is {network.shape}",
            expected="(B, C, H, W) float32",
        )
    batch, channels, height, width = network.shape
    if channels != len(preprocess.mean):
        raise ExportError(
            f"{len(preprocess.mean)} means for a network of {channels} input channels",
            expected=f"{channels} means and stds",
        )
    image = ir.Value(
        name="input",
        type=ir.TensorType(ir.DataType.UINT8),
        shape=ir.Shape([batch, height, width, channels]),
    )
    graph = EditableGraph(model)
    scale, shift = preprocess.affine()
    value = graph.add("Transpose", [image], "preprocess_transpose", perm=[0, 3, 1, 2])
    value = graph.add("Cast", [value], "preprocess_cast", to=int(ir.DataType.FLOAT))
    value = graph.add("Mul", [value, graph.add_constant("preprocess.scale", scale)], "preprocess")
    value = graph.add("Add", [value, graph.add_constant("preprocess.shift", shift)], "preprocess")
    network.replace_all_uses_with(value)
    network.name, graph.body.inputs[0] = "normalized", image
    graph.body.sort()


def _append_softmax(graph: ir.Graph) -> None:
    logits = graph.outputs[0]
    if logits.shape is None or len(logits.shape) != 2:
        raise ExportError(
            f"softmax is for classifiers, and the output of this network is {logits.shape}",
            expected="(B, K) logits",
        )
    found = ir.Value(name="probabilities", type=logits.type, shape=logits.shape)
    graph.append(ir.node("Softmax", [logits], {"axis": 1}, outputs=[found], name="softmax"))
    graph.outputs[0] = found
