"""An ONNX graph as a torch module: its weights are parameters, its int8 rounding is simulated."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Protocol

import onnx
import torch
from onnx import NodeProto, helper, numpy_helper
from torch import Tensor, nn

from compress.errors import QuantizationError
from compress.graph.metadata import input_facts
from compress.quantize.qat.operators import OPERATORS

TRAINED_INPUTS = {  # of an operator: positions of the constants that training may change
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "MatMul": (1,),
    "BatchNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "PRelu": (1,),
}


class Rounding(Protocol):
    """What happens to a value on its way into one input of one node."""

    def __call__(self, node: str, position: int, name: str, value: Tensor) -> Tensor:
        """Return what the node reads in place of ``value``."""
        ...


class OnnxNetwork(nn.Module):
    """A float ONNX graph, run by torch node by node; its state_dict is named as its initializers.

    It computes in float32 whatever autocast says: int8 steps are finer than those of bf16.

    Constants of the graph are initializers, as ``compress.graph.preprocess`` makes them.

    Raises:
        QuantizationError: the graph has an operator without a rule in ``operators.py``.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self.model = model
        unknown = sorted({n.op_type for n in model.graph.node} - set(OPERATORS))
        if unknown:
            node = next(n for n in model.graph.node if n.op_type == unknown[0])
            raise QuantizationError(
                f"operator {unknown[0]} of node {node.name!r} cannot be trained",
                expected=f"one of {', '.join(sorted(OPERATORS))}",
                fix="Quantize without qat, or replace this layer",
            )
        nodes = model.graph.node
        given = ({a.name: helper.get_attribute_value(a) for a in n.attribute} for n in nodes)
        self.steps = [  # before opset 18 a Split does not say how many outputs it has
            (n, {"num_outputs": len(n.output), **own}) for n, own in zip(nodes, given, strict=True)
        ]
        self.inputs = [v.name for v in model.graph.input]
        self.layout = input_facts(model).get("layout")
        self.outputs = [v.name for v in model.graph.output]
        self.places: dict[str, tuple[nn.Module, str]] = {}  # initializer -> where it is kept
        self.scalars: dict[str, Tensor] = {}  # shapes, indices and single numbers, on the CPU
        self._keep_constants(model)
        self._last_use = _last_uses(model.graph.node)

    def constant(self, name: str) -> Tensor | None:
        """Return the initializer ``name`` as it is now."""
        if name in self.scalars:
            return self.scalars[name]
        if name not in self.places:
            return None
        value: Tensor = getattr(*self.places[name])
        return value

    def forward(self, *images: Tensor) -> Any:
        """Return the logits (B, K), or a tuple where the graph has several outputs.

        Images are (B, C, H, W) whatever the graph's own layout is.
        """
        if self.layout == "NHWC":
            images = tuple(each.permute(0, 2, 3, 1) if each.ndim == 4 else each for each in images)
        with torch.autocast(images[0].device.type, enabled=False):
            results = self._run([image.float() for image in images])
        return results[0] if len(results) == 1 else tuple(results)

    def _run(self, images: Sequence[Tensor]) -> list[Tensor]:
        values: dict[str, Tensor] = dict(zip(self.inputs, images, strict=True))
        read = self._rounding()
        for index, (node, attributes) in enumerate(self.steps):
            arguments: list[Tensor | None] = []
            for position, name in enumerate(node.input):
                value = values.get(name) if name in values else self.constant(name)
                arguments.append(None if value is None else read(node.name, position, name, value))
            made = OPERATORS[node.op_type](attributes, *arguments)
            made = made if isinstance(made, tuple) else (made,)
            values.update(zip(node.output, made, strict=False))
            for name in self._last_use.get(index, ()):
                if name not in self.outputs:  # which a later node may read as well
                    values.pop(name, None)
        return [values[name] for name in self.outputs]

    def _rounding(self) -> Rounding:
        return lambda _node, _position, _name, value: value

    def trained_model(self) -> onnx.ModelProto:
        """Return the graph with the weights as they are now."""
        model = deepcopy(self.model)
        for tensor in model.graph.initializer:
            if tensor.name in self.places:
                value: Tensor = getattr(*self.places[tensor.name])
                array = value.detach().float().cpu().contiguous().numpy()
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return model

    def _keep_constants(self, model: onnx.ModelProto) -> None:
        trained = {
            node.input[position]
            for node in model.graph.node
            for position in TRAINED_INPUTS.get(node.op_type, ())
            if position < len(node.input)
        }
        for tensor in model.graph.initializer:
            value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
            if not value.is_floating_point() or value.ndim == 0:
                self.scalars[tensor.name] = value
                continue
            module, attribute = self._place(tensor.name)
            if tensor.name in trained:
                module.register_parameter(attribute, nn.Parameter(value))
            else:
                module.register_buffer(attribute, value)
            self.places[tensor.name] = (module, attribute)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """Return the module and attribute for ``layer1.0.conv1.weight``, made if need be."""
        module: nn.Module = self
        *path, last = name.split(".")
        for part in path:
            inner = getattr(module, part, None) if part else None
            if not isinstance(inner, nn.Module):
                if not part or hasattr(module, part):  # taken by something else
                    return self, f"constant_{len(self.places)}"
                inner = nn.Module()
                module.add_module(part, inner)
            module = inner
        if not last or hasattr(module, last):
            return self, f"constant_{len(self.places)}"
        return module, last


def _last_uses(nodes: Sequence[NodeProto]) -> dict[int, list[str]]:
    """Return for each step the values that no later step reads."""
    last: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in node.input:
            last[name] = index
    uses: dict[int, list[str]] = {}
    for name, index in last.items():
        uses.setdefault(index, []).append(name)
    return uses
