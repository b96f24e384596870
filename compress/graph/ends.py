"""What is put before and behind a network in its graph: pre-processing, softmax, NMS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import ExportError
from compress.graph.values import EditableGraph

OUTPUT = "detections"
CANDIDATES = 3000  # that are looked at first: they mostly hold all that is kept


@dataclass(frozen=True)
class Nms:
    """Non-maximum suppression within each class; a place has the class of its highest score."""

    iou: float = 0.7  # overlap from which the box of the lower score is left out
    score: float = 0.001  # boxes up to this score are left out
    max_boxes: int = 100  # of an image, the best; fewer are filled up with zeros

    def of(self, head: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return the best boxes (M, 4) as x1, y1, x2, y2, scores and labels of one image.

        Args:
            head: (4 + K, A): centre and size of each box, and the score of each class.
        """
        likely = np.flatnonzero(head[4:].max(0) > self.score)
        return self.suppressed(head, head[4:, likely].argmax(0), likely)

    def suppressed(
        self, head: NDArray[Any], labels: NDArray[Any], places: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return what ``of`` does, of the boxes at ``places`` (M,) with these labels (M,).

        A network that was not trained yet scores all of its places: whether one of the best boxes
        is kept depends on better ones alone, so that the others are not looked at.
        """
        scores = head[4:][labels, places].astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        labels, places, scores = labels[order], places[order], scores[order]
        centre, size = head[:2, places].T, head[2:4, places].T
        boxes = np.concatenate([centre - size / 2, centre + size / 2], 1).astype(np.float32)
        kept, count = np.zeros(0, np.int64), CANDIDATES
        while len(kept) < self.max_boxes:
            kept = self._of_first(count, boxes, scores, labels)
            if count >= len(scores):
                break
            count *= 4
        kept = kept[: self.max_boxes]
        return boxes[kept], scores[kept], labels[kept]

    def _of_first(self, count: int, *boxes_scores_labels: NDArray[Any]) -> NDArray[Any]:
        """Return which of the first ``count`` boxes are kept, best first."""
        from torchvision.ops import batched_nms

        given = (torch.from_numpy(each[:count]) for each in boxes_scores_labels)
        kept: NDArray[Any] = batched_nms(*given, self.iou).numpy()
        return kept

    def rows(self, heads: NDArray[Any]) -> NDArray[np.float32]:
        """Return (B, M, 6) as the graph does, for heads (B, 4 + K, A)."""
        count = min(self.max_boxes, (heads.shape[1] - 4) * heads.shape[2])
        out = np.zeros((len(heads), count, 6), np.float32)
        for row, head in zip(out, heads, strict=True):
            found = self.of(head)
            kept = min(count, len(found[1]))
            columns = (found[0], found[1][:, None], found[2][:, None])
            row[:kept] = np.concatenate(columns, 1)[:kept]
        return out

    def attach(self, model: ir.Model) -> None:
        """Put NMS behind the only output of ``model``, (B, 4 + K, A): (B, M, 6) comes out.

        Each row is x1, y1, x2, y2, score and class, best first.

        Raises:
            ExportError: the graph has several outputs, or one of another form.
        """
        nodes = _Nodes(model)
        outputs = nodes.body.outputs
        shapes = [output.shape for output in outputs]
        shape = shapes[0] if len(shapes) == 1 else None
        if shape is None or len(shape) != 3 or not all(isinstance(n, int) for n in shape[1:]):
            raise ExportError(
                "NMS takes boxes and scores; the outputs of this network are "
                + ", ".join(map(str, shapes)),
                expected="one output (B, 4 + classes, places) of a fixed image size",
                fix="Choose the output: outputs=0 (--outputs 0)",
            )
        rows, places = int(shape[1]), int(shape[2])  # type: ignore[arg-type]
        if rows <= 4 or rows > places:
            raise ExportError(
                f"NMS takes boxes and scores; the output of this network is {shape}",
                expected="(B, 4 + classes, places), more places than rows",
            )
        count = min(self.max_boxes, (rows - 4) * places)
        boxes, kept = self._kept(nodes, outputs[0], rows)
        outputs[0] = _ordered(nodes, boxes, kept, count, places)
        outputs[0].name = OUTPUT
        outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        outputs[0].shape = ir.Shape([shape[0], count, 6])

    def _kept(self, nodes: _Nodes, head: ir.Value, rows: int) -> tuple[ir.Value, ir.Value]:
        """Return boxes (B, A, 4), and scores (B, K, A) with zeros where NMS took a box out.

        Of the scores only each place's best is left.
        """
        boxes = nodes.op("Slice", [head, 0, 4, 1])
        scores = nodes.op("Slice", [head, 4, rows, 1])
        best = nodes.op("ReduceMax", [scores, 1], keepdims=1)
        alone = nodes.op("Where", [nodes.op("Equal", [scores, best]), scores, 0.0])
        boxes = nodes.op("Transpose", [boxes], perm=[0, 2, 1])
        limits = self.max_boxes, self.iou, self.score
        index = nodes.op("NonMaxSuppression", [boxes, alone, *limits], center_point_box=1)
        values = nodes.op("GatherND", [alone, index])
        return boxes, nodes.op("ScatterND", [nodes.op("Mul", [alone, 0.0]), index, values])


def _ordered(nodes: _Nodes, boxes: ir.Value, kept: ir.Value, count: int, places: int) -> ir.Value:
    """Return the ``count`` best boxes, (B, M, 6)."""
    flat = nodes.op("Reshape", [kept, [0, -1]])
    scores, index = nodes.ops("TopK", [flat, count], 2, axis=1)
    label, place = nodes.op("Div", [index, places]), nodes.op("Mod", [index, places])
    where = nodes.op("Tile", [nodes.op("Unsqueeze", [place, -1]), [1, 1, 4]])
    chosen = nodes.op("GatherElements", [boxes, where], axis=1)
    half = nodes.op("Mul", [nodes.op("Slice", [chosen, 2, 4, 2]), 0.5])
    centre = nodes.op("Slice", [chosen, 0, 2, 2])
    parts = [nodes.op(name, [centre, half]) for name in ("Sub", "Add")]
    label = nodes.op("Cast", [label], to=int(ir.DataType.FLOAT))
    parts += [nodes.op("Unsqueeze", [each, -1]) for each in (scores, label)]
    return nodes.op("Concat", parts, axis=2)


class _Nodes(EditableGraph):
    """A graph to which nodes are added one by one; numbers among their inputs become constants."""

    def ops(self, kind: str, inputs: Sequence[Any], outputs: int, **given: Any) -> list[ir.Value]:
        values = [each if isinstance(each, ir.Value) else self._constant(each) for each in inputs]
        return self.add_several(kind, values, [f"nms_{kind}"] * outputs, **given)

    def op(self, kind: str, inputs: Sequence[Any], **given: Any) -> ir.Value:
        return self.ops(kind, inputs, 1, **given)[0]

    def _constant(self, numbers: float | list[int]) -> ir.Value:
        kind = np.float32 if isinstance(numbers, float) else np.int64
        return self.add_constant("nms.constant", np.atleast_1d(np.array(numbers, kind)))


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
