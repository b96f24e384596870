"""Parameters, multiply-accumulates and bytes: what can be counted without a clock."""

from __future__ import annotations

import contextlib
import math
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from compress.artifact import scratch
from compress.errors import CompressError, ModelError, boundary
from compress.graph import files
from compress.graph.shapes import PRODUCTS, Shapes, macs, real_inputs, shapes_of
from compress.runtimes import DEFAULT, open_session

if TYPE_CHECKING:
    from torch import nn

MIB = 2**20
WEIGHTS_FILE = "model.safetensors"  # in the folder of a stage

_WEIGHT_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8)
_QUANTIZERS = {"QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class Count:
    """The work and the weights of a network."""

    params: int
    macs: int  # multiply-accumulates of one forward pass

    def to_json(self) -> dict[str, int]:
        """Return this count as JSON-able data."""
        return asdict(self)


def count_module(model: nn.Module, example_input: Any) -> Count:
    """Return the parameters of ``model`` and the MACs of one forward pass.

    **Method:** parameters are the elements of all parameters, shared ones once, buffers not at all.
    MACs are half of what ``torch.utils.flop_counter`` counts in a forward pass of a copy on the
    meta device: products of convolutions, matrices and attention, padding included. Additions of
    biases, normalization, activations and pooling are not counted. It is work to do, not time: two
    networks of equal MACs can differ severalfold in latency.

    Args:
        model: Left as it is.
        example_input: A tensor (B, C, H, W), or a tuple or dict of tensors for several inputs; MACs
            are those of this whole batch, so give a batch of one.

    Raises:
        ModelError: the forward pass fails.
    """
    import torch
    from torch.utils._pytree import tree_map
    from torch.utils.flop_counter import FlopCounterMode

    from compress.modules import full_copy, network_of, set_mode
    from compress.modules.inputs import call_inputs

    model, inputs = network_of(model), call_inputs(example_input)
    own, cpu = next(model.parameters(), torch.empty(0)).device, torch.device("cpu")
    is_at_hand = all(parameter.device == cpu for parameter in model.parameters())
    # Tensors that are no buffers stay behind, and values that steer the forward pass are unknown on
    # meta: such a network is counted where it lives.
    for device in (torch.device("meta") if is_at_hand else cpu, own):
        clone = full_copy(model).to(device)
        set_mode(clone, training=False)
        args, named = tree_map(lambda tensor, to=device: tensor.to(to), inputs)
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                clone(*args, **named)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            failure = error
        else:
            params = sum(parameter.numel() for parameter in model.parameters())
            return Count(params=params, macs=counter.get_total_flops() // 2)
    raise ModelError(
        f"the forward pass fails: {failure}", fix="Check the shape of the example input"
    ) from failure


def count_onnx(source: Path | onnx.ModelProto) -> Count:
    """Return the parameters of an ONNX graph and the MACs of one image.

    **Method:** parameters are the elements of all constants except integers of shape arithmetic and
    the scales and zero points of quantizers; BatchNorm that the export folded is gone from them,
    so the number is smaller than that of the module. MACs are counted as in ``count_module``, from
    inferred shapes, with a free batch dimension set to 1.

    Raises:
        EngineError: the file is no ONNX graph.
        ModelError: a shape that is needed cannot be inferred.
    """
    model = source if isinstance(source, onnx.ModelProto) else files.load(source)
    where = "the ONNX graph" if isinstance(source, onnx.ModelProto) else str(source)
    with boundary(ModelError, "is no valid graph", where=where):
        return Count(params=onnx_params(model.graph), macs=sum(node_macs(model).values()))


def node_macs(model: onnx.ModelProto, shapes: Shapes | None = None) -> dict[str, int]:
    """Return the MACs of one image of each convolution and matrix product, in graph order.

    They go by the name of a node's first output. ``shapes`` are those of ``complete_shapes``, where
    they are known.

    Raises:
        ModelError: a shape that is needed cannot be inferred.
    """
    if shapes is None:
        shapes, _ = complete_shapes(model)
    inputs = [shapes.get(value.name, ()) for value in real_inputs(model)]
    images = (inputs[0][0] if inputs and inputs[0] else 1) or 1
    return {
        node.output[0]: _macs(node, shapes) // images
        for node in model.graph.node
        if node.op_type in PRODUCTS
    }


def complete_shapes(
    model: onnx.ModelProto,
) -> tuple[dict[str, tuple[int | None, ...]], dict[str, int]]:
    """Return shape and element type of each tensor, with a free batch set to 1.

    Shapes that depend on values, such as those of a Pad whose amounts the graph computes, cannot be
    inferred: where only the batch is free, they are those of one run in ONNX Runtime.

    Raises:
        ModelError: the graph breaks the rules of ONNX.
    """
    shapes, kinds = shapes_of(model)
    made = [name for node in model.graph.node for name in node.output if name]
    unknown = [name for name in made if None in shapes.get(name, (None,))]
    free = any(None in shapes.get(value.name, (None,)) for value in real_inputs(model))
    if unknown and not free:
        with contextlib.suppress(CompressError):  # what does not run stays as it was inferred
            for name, array in zip(unknown, _values(model, unknown), strict=True):
                shapes[name] = array.shape
                kinds[name] = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return shapes, kinds


def _values(model: onnx.ModelProto, names: list[str]) -> list[np.ndarray]:
    from compress.measure.probe import inputs_for

    watched = deepcopy(model)
    watched.graph.ClearField("output")
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    with scratch() as folder:
        onnx.save(watched, folder / "watched.onnx")
        with open_session(folder / "watched.onnx", DEFAULT, optimization="none") as session:
            found: list[np.ndarray] = session.run(*inputs_for(session, 1))
    return found


def size_mib(path: Path) -> float:
    """Return the size of an artifact on disk, MiB.

    **Method:** bytes of the file, of the files of external data that an ONNX graph names, and of
    the ``.bin`` that belongs to an OpenVINO ``.xml``; of the weights in the folder of a stage,
    which PyTorch loads; of all files in another folder.

    Raises:
        ModelError: it does not exist.
    """
    if (path / WEIGHTS_FILE).is_file():
        path /= WEIGHTS_FILE
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / MIB
    if not path.is_file():
        raise ModelError("does not exist", where=str(path))
    parts = {path}
    if path.suffix == ".xml" and path.with_suffix(".bin").is_file():
        parts.add(path.with_suffix(".bin"))
    if path.suffix == ".onnx":
        parts = files.parts(path)
    return sum(part.stat().st_size for part in parts) / MIB


def zero_weights_pct(path: Path) -> float:
    """Return the share of a file's weights that are exactly zero, percent.

    **Method:** initializers of two dimensions and more, in float or int8, are what is counted.
    """
    zeros = total = 0
    for tensor in files.load(path).graph.initializer:
        if len(tensor.dims) > 1 and tensor.data_type in _WEIGHT_TYPES:
            values = onnx.numpy_helper.to_array(tensor)
            zeros += values.size - int(np.count_nonzero(values))
            total += values.size
    return 100 * zeros / max(1, total)


def onnx_params(graph: onnx.GraphProto) -> int:
    """Return the parameters of a graph; see ``count_onnx``."""
    constants = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                constants[node.output[0]] = (attribute.t.data_type, list(attribute.t.dims))
    ranges = {name for node in graph.node for name in _range_inputs(node)}
    shape_types = {onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.STRING}
    return sum(
        math.prod(dims)
        for name, (kind, dims) in constants.items()
        if kind not in shape_types and name not in ranges
    )


def _range_inputs(node: onnx.NodeProto) -> list[str]:
    if node.op_type in _QUANTIZERS:
        return list(node.input[1:3])
    if node.op_type in {"QLinearConv", "QLinearMatMul"}:
        return [node.input[i] for i in (1, 2, 4, 5, 6, 7)]
    return []


def _macs(node: onnx.NodeProto, shapes: Shapes) -> int:
    if (found := macs(node, shapes)) is not None:
        return found
    names = (*(node.input[index] for index in PRODUCTS[node.op_type]), node.output[0])
    name = next(name for name in names if None in shapes.get(name, (None,)))
    raise ModelError(
        f"the shape of {name!r} is not known: {shapes.get(name) or 'none inferred'}",
        where=f"{node.op_type} {node.name or node.output[0]!r}",
        fix="Export the network with a fixed image size; only the batch may be free",
    )
