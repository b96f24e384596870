"""Where each target wants its Q/DQ pairs: which tensors, for which readers, with whose scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from onnx import NodeProto

from compress.graph.model import (
    ACTIVATIONS,
    SAME_SCALE,
    WEIGHTED,
    GraphIndex,
    attribute,
    averages_probabilities,
    tail,
)
from compress.graph.rewrites import is_ambiguous
from compress.graph.values import MOVING

ELEMENTWISE = frozenset({"Add", "Mul"})
_MOVES = SAME_SCALE | ACTIVATIONS | {"Concat", "Pad"}  # hands its inputs' steps on
_CHAIN = frozenset({"Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu"})
_COMPUTES = ELEMENTWISE | _CHAIN - {"Concat"} | {"MaxPool"}  # what moves no values as they are
_FARTHEST = 64  # nodes before a residual Add that its common ancestor is looked for in
Reader = tuple[str, int]  # name of the node, position among its inputs


@dataclass
class Placement:
    """Q/DQ pairs of one graph for one target."""

    # Of each quantized tensor, the readers that get the dequantized value
    readers: dict[str, set[Reader]] = field(default_factory=dict)
    # The tensor whose range serves for another; absent = its own
    scale_of: dict[str, str] = field(default_factory=dict)
    # Tensors that share one range that holds all of theirs
    joined: list[set[str]] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)  # weighted nodes whose weight is quantized
    # Weighted nodes left in float, and why
    left_float: dict[str, str] = field(default_factory=dict)

    def source(self, tensor: str) -> str:
        """Return the tensor whose range ``tensor`` uses."""
        while tensor in self.scale_of:
            tensor = self.scale_of[tensor]
        return tensor


def place(
    graph: GraphIndex, target: str, float_nodes: Mapping[str, str] | None = None
) -> Placement:
    """Return where the Q/DQ pairs go in a prepared graph, after the rewriting for this target.

    ``float_nodes``, each with the reason, read and write float tensors.
    """
    refused = dict(float_nodes or {})
    if target != "tensorrt":  # which has no pairs around pools
        pools = [n.name for n in graph.nodes if n.op_type == "AveragePool" and is_ambiguous(n)]
        refused |= dict.fromkeys(pools, "int8 kernels divide windows at the edge in other ways")
    if target == "onnxruntime":
        refused |= _behind_resizes(graph)
        apart = [n for n in graph.nodes if n.op_type == "AveragePool" and _is_dilated(n)]
        refused |= {n.name: "ONNX Runtime has no int8 kernel for dilated windows" for n in apart}
    while True:
        placement = _placed(graph, target, refused)
        half = _half_quantized(graph, placement)
        if not half - refused.keys():
            return placement
        refused |= dict.fromkeys(half, "only one of its two inputs would be quantized")


def _is_dilated(node: NodeProto) -> bool:
    return any(step != 1 for step in attribute(node, "dilations", ()))


def _is_never_int8(node: NodeProto) -> bool:
    """Return whether ``node`` is a Resize that ONNX Runtime cannot do in int8.

    It resizes bytes by no cubics; and where int8 kernels move transposes through a Resize of some
    axes, it takes their sizes for those of all.
    """
    by_cubics = attribute(node, "mode", b"") == b"cubic"
    return node.op_type == "Resize" and (by_cubics or attribute(node, "axes", None) is not None)


def _behind_resizes(graph: GraphIndex) -> dict[str, str]:
    """Return the nodes that read what such a Resize makes, and why they are left in float.

    ONNX Runtime removes the pairs around a Resize of any mode: the session ends with an error when
    it is made, or when it runs.
    """
    edge = [node for node in graph.nodes if _is_never_int8(node)]
    readers: set[str] = set()
    while edge:  # ONNX Runtime moves pairs back through what only moves values
        made = edge.pop().output
        for reader in (node for name in made for node, _ in graph.readers.get(name, [])):
            if reader.name not in readers:
                readers.add(reader.name)
                edge += [reader] if reader.op_type in SAME_SCALE | ACTIVATIONS else []
    return dict.fromkeys(readers, "ONNX Runtime cannot resize int8 as what it reads")


def _placed(graph: GraphIndex, target: str, refused: Mapping[str, str]) -> Placement:
    placement = Placement()
    floating = _floating(graph, refused)
    for node in graph.nodes:
        if node.op_type in WEIGHTED:
            why = refused.get(node.name) or _why_float(graph, node, target)
            if not why and target == "onnxruntime" and _feeds_only(graph, node, floating):
                why = "what reads it is in float, and its int8 kernels make int8"
            if why:
                placement.left_float[node.name] = why
            else:
                placement.weights.append(node.name)
    rules: dict[str, Callable[[GraphIndex, Placement, set[str]], None]] = {
        "onnxruntime": _place_everywhere,
        "openvino": _place_where_read,
        "tensorrt": _place_on_weighted,
    }
    rules[target](graph, placement, floating)
    for node in graph.nodes:
        if node.op_type in MOVING - SAME_SCALE and placement.readers.keys() >= {
            node.input[0],
            node.output[0],
        }:
            placement.scale_of.setdefault(node.output[0], node.input[0])
    if target != "tensorrt":
        _share_in_concats(graph, placement)
    if target == "openvino":
        _drop_repeated(graph, placement)
    return placement


def _share_in_concats(graph: GraphIndex, placement: Placement) -> None:
    """Let what only a Concat reads be rounded to the steps of what it makes, and only once.

    It moves integers as they are then. SqueezeNet 1.1 takes 0.86 of the time for it and comes
    0.5 dB closer, ShuffleNetV2 0.9 and 0.1 dB. What others read as well keeps its own steps:
    the features of DenseNet-121 would all have the widest, 0.7 dB farther.
    """
    made_by = {node.name: set(node.output) for node in graph.nodes}
    members: dict[str, set[str]] = {}  # tensors by the one whose steps they have
    for tensor in placement.readers:
        members.setdefault(placement.source(tensor), set()).add(tensor)
    for node in graph.nodes:
        if node.op_type != "Concat" or node.output[0] not in placement.readers:
            continue
        joined = placement.source(node.output[0])
        for root in {placement.source(name) for name in node.input} & members.keys() - {joined}:
            tensors = members[root]
            readers = {name for tensor in tensors for name, _ in placement.readers[tensor]}
            # any other only moves what it reads
            if all(name == node.name or tensors & made_by[name] for name in readers):
                placement.scale_of[root] = node.output[0]
                members[joined] |= members.pop(root)


def _drop_repeated(graph: GraphIndex, placement: Placement) -> None:
    """Drop the pairs that would round what has been rounded to the same steps and only moved.

    OpenVINO moves integers through slices, pads, reshapes, pools and resizes as well without; a
    pair is an op more, and keeps it from making one slice of two (networks took 0.85 to 1.0 of
    their time without, with the same answers).
    """
    readers = dict(placement.readers)
    for node in graph.nodes:
        moved = _image_inputs(graph, node)
        if moved and all((node.name, k) in readers.get(name, ()) for k, name in enumerate(moved)):
            sources = {placement.source(name) for name in moved}
            for made in node.output:
                if made in placement.readers and sources == {placement.source(made)}:
                    placement.readers.pop(made)


def _floating(graph: GraphIndex, refused: Iterable[str]) -> set[str]:
    """Return the nodes left in float on purpose, and cheap ops that only these read.

    An int8 kernel needs an int8 output, which nobody would read.
    """
    floating = set(refused)
    for node in reversed(graph.nodes):
        readers = [r.name for end in node.output for r, _ in graph.readers.get(end, [])]
        is_end = not readers or graph.outputs.intersection(node.output)
        cheap = node.op_type in _MOVES | _CHAIN | ELEMENTWISE
        if cheap and not is_end and floating.issuperset(readers):
            floating.add(node.name)
    return floating


def _half_quantized(graph: GraphIndex, placement: Placement) -> set[str]:
    """Return the products of two activations for which alone one of the two would be quantized."""
    found = set()
    for node in graph.nodes:
        if node.op_type != "MatMul" or len(graph.data_inputs(node)) < 2:
            continue
        read = [(node.name, k) in placement.readers.get(node.input[k], ()) for k in (0, 1)]
        alone = any(len(graph.readers[node.input[k]]) == 1 for k in (0, 1) if read[k])
        if read[0] != read[1] and alone:
            found.add(node.name)
    return found


def _feeds_only(graph: GraphIndex, node: NodeProto, floating: set[str]) -> bool:
    readers = {reader.name for reader, _ in graph.readers.get(node.output[0], [])}
    return bool(readers) and node.output[0] not in graph.outputs and readers <= floating


def _why_float(graph: GraphIndex, node: NodeProto, target: str) -> str:
    if graph.is_constant(node.input[0]):
        return "what it reads is the same for every image"
    if graph.weight(node) is None:
        return "its weight is no float constant"
    if not graph.is_float(node.input[0]):
        return "its input is no float tensor"
    if averages_probabilities(node, graph.producer):
        return "it averages the probabilities of a Softmax: a step of 1/256 would move the answer"
    if node.op_type == "Gemm":
        odd = attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0
        if odd or attribute(node, "beta", 1.0) != 1.0:
            return "this Gemm is scaled or transposes its input"
    weight_rank = len(graph.initializers[node.input[1]].dims)
    if node.op_type == "MatMul" and weight_rank != 2:
        return "its weight is not a matrix"
    if target == "onnxruntime" and node.op_type == "ConvTranspose":
        return "ONNX Runtime has no int8 ConvTranspose"
    if target == "tensorrt" and _in_squeeze_excite(graph, node):
        return "squeeze-excite is faster in half precision"
    return ""


def _in_squeeze_excite(graph: GraphIndex, node: NodeProto) -> bool:
    """Return whether ``node`` sees 1x1 images only and ends in a gate."""
    shape = graph.shapes.get(node.input[0])
    pooled = shape is not None and len(shape) == 4 and shape[2:] == (1, 1)
    if node.op_type != "Conv" or not pooled:
        return False
    name = node.output[0]
    for _ in range(8):  # conv, activation, conv, gate
        readers = graph.readers.get(name, [])
        kinds = {reader.op_type for reader, _ in readers}
        if kinds & {"Sigmoid", "HardSigmoid"} and "Mul" not in kinds:
            return True
        if len(readers) == 1 and "Mul" in kinds:  # a gate of some other form, or the end of SiLU
            name = readers[0][0].output[0]
            continue
        if kinds == {"Sigmoid", "Mul"}:  # SiLU
            name = next(r for r, _ in readers if r.op_type == "Mul").output[0]
            continue
        if len(readers) != 1 or next(iter(kinds)) not in (*ACTIVATIONS, "Conv", "HardSwish"):
            return False
        name = readers[0][0].output[0]
    return False


def _place_everywhere(graph: GraphIndex, placement: Placement, floating: set[str]) -> None:
    """ONNX Runtime: pairs around every op of the chain that has an int8 kernel."""
    tail = _tail(graph)
    chosen = _chosen(graph, placement, floating)
    lonely = _without_gain(graph, chosen, set(placement.weights))
    chosen = [node for node in chosen if node.name not in lonely]
    kernels = {node.name for node in chosen}
    for node in chosen:
        for tensor in _image_inputs(graph, node):
            _quantize(graph, placement, tensor, floating)
        for tensor in _ends(graph, node):
            readers = {reader.name for reader, _ in graph.readers.get(tensor, [])}
            is_answer = node.op_type in ("Gemm", "MatMul") and readers <= tail
            gives_float = node.op_type == "MatMul" and not readers & kernels
            if tensor not in graph.outputs and not is_answer and not gives_float:
                _quantize(graph, placement, tensor, floating)
        _share_scale(graph, placement, node)


def _without_gain(graph: GraphIndex, chosen: list[NodeProto], weighted: set[str]) -> set[str]:
    """Return the cheap nodes among ``chosen`` that lie between ops in float.

    Int8 would gain them nothing: what they read has to be rounded for them alone, as the terms of
    a GELU or the heads of an attention. A product of matrices is no int8 neighbour: its kernel
    gives float, and adds the bias behind it to sums that nothing has rounded. Pools behind ops in
    float are no better off, whatever reads them: they leave fewer values to round, and an int8
    MaxPool that no int8 kernel is before takes ten times as long as one in float. Nor are pads by
    reflection, which move bytes no faster than floats.
    """
    made: set[str] = set()  # tensors of int8 kernels
    for node in chosen:
        is_layer = node.name in weighted and node.op_type != "MatMul"
        if is_layer or (node.name not in weighted and made.intersection(node.input)):
            made.update(node.output, _ends(graph, node))
    lonely: set[str] = set()
    read: set[str] = set()  # nodes that give to layers, directly or not
    for node in reversed(chosen):
        ends = {r.name for end in _ends(graph, node) for r, _ in graph.readers.get(end, [])}
        is_read = node.name in weighted or bool(ends & read)
        is_apart = node.name not in weighted and not made.intersection(node.input)
        if is_apart and (node.op_type in _COMPUTES or _is_reflection(node) or not is_read):
            lonely.add(node.name)
        elif is_read:
            read.add(node.name)
    return lonely


def _is_reflection(node: NodeProto) -> bool:
    return node.op_type == "Pad" and attribute(node, "mode", b"constant") != b"constant"


def _place_where_read(graph: GraphIndex, placement: Placement, floating: set[str]) -> None:
    """OpenVINO: as for ONNX Runtime, but nothing is quantized that only float ops read.

    A Concat of what integer kernels made is an exception: it moves bytes, each input with its own
    scale, through nested ones too, whatever reads it. DenseNet-121 gains a quarter at batch 8.

    An activation that runs inside the kernel before it stays in float with that kernel's sums: a
    pair between them makes it an op of its own, and EfficientNet-B0 slower than in fp32.
    """
    inside = {node.name for node in graph.nodes if _runs_inside(graph, node)}
    chosen = {node.name: node for node in _chosen(graph, placement, floating | inside)}
    weighted = set(placement.weights)
    for node in reversed(list(chosen.values())):
        readers = {r.name for end in _ends(graph, node) for r, _ in graph.readers.get(end, [])}
        gathers = node.op_type == "Concat" and _makers(graph, node) <= chosen.keys()
        if node.name not in weighted and not gathers and not readers & chosen.keys():
            del chosen[node.name]
    for node in chosen.values():
        for tensor in _image_inputs(graph, node):
            maker = graph.producer.get(tensor)
            is_nested = maker is not None and maker.op_type == node.op_type == "Concat"
            if not is_nested:
                _quantize(graph, placement, tensor, floating)
    for node in chosen.values():
        if node.input[0] in placement.readers:
            _share_scale(graph, placement, node)


def _runs_inside(graph: GraphIndex, node: NodeProto) -> bool:
    """Return whether ``node`` is part of an activation that OpenVINO adds to the layer before."""
    if node.op_type in ("Sigmoid", "LeakyRelu"):
        return True
    if node.op_type != "Mul" or len(node.input) != 2:
        return False
    makers = [graph.producer.get(name) for name in node.input]
    gates = [m for m in makers if m is not None and m.op_type in ("Sigmoid", "HardSigmoid")]
    return any(gate.input[0] in node.input for gate in gates)


def _makers(graph: GraphIndex, node: NodeProto) -> set[str]:
    """Return the nodes that make the values ``node`` reads; what only hands them on is none."""
    names = set()
    for tensor in node.input:
        maker = graph.producer.get(tensor)
        while maker is not None and (maker.op_type in ACTIVATIONS or graph.keeps_scale(maker)):
            maker = graph.producer.get(maker.input[0])
        if maker is not None and maker.op_type == "Concat":
            names |= _makers(graph, maker)
        else:
            names.add(maker.name if maker is not None else tensor)
    return names


def _chosen(graph: GraphIndex, placement: Placement, floating: set[str]) -> list[NodeProto]:
    """Return the nodes that work on integers, in order."""
    without, weighted = _tail(graph) | floating, set(placement.weights)
    return [
        node
        for node in graph.nodes
        if node.name in weighted or (node.name not in without and _has_kernel(graph, node))
    ]


def _ends(graph: GraphIndex, node: NodeProto) -> list[str]:
    """Return the outputs of ``node``, or of the activation that runs together with it."""
    after = None if graph.keeps_scale(node) else graph.activation_after(node)
    return list(node.output if after is None else after.output)


def _share_scale(graph: GraphIndex, placement: Placement, node: NodeProto) -> None:
    if graph.keeps_scale(node):
        for tensor in node.output:
            placement.scale_of[tensor] = node.input[0]


def _image_inputs(graph: GraphIndex, node: NodeProto) -> list[str]:
    names = node.input[:1] if node.op_type not in (*ELEMENTWISE, "Concat") else node.input
    return [name for name in names if not graph.is_constant(name)]


def _quantize(graph: GraphIndex, placement: Placement, tensor: str, floating: set[str]) -> None:
    readers = {
        (n.name, position) for n, position in graph.readers[tensor] if n.name not in floating
    }
    if readers:
        placement.readers.setdefault(tensor, set()).update(readers)


def has_int8_kernel(graph: GraphIndex, node: NodeProto) -> bool:
    """Return whether ``node`` can work on integers, by itself or inside the layer before it."""
    return node.op_type in WEIGHTED | ACTIVATIONS or _has_kernel(graph, node)


def _has_kernel(graph: GraphIndex, node: NodeProto) -> bool:
    if node.op_type not in (*_CHAIN, *ELEMENTWISE) and not graph.keeps_scale(node):
        return False
    if not all(graph.is_float(name) for name in (node.input[0], *node.output)):
        return False
    if node.op_type in ELEMENTWISE and len(set(graph.data_inputs(node))) < 2:
        return False
    if node.op_type == "Concat" and len(graph.data_inputs(node)) < len(node.input):
        return False
    if node.op_type == "Resize" and attribute(node, "mode", b"nearest") != b"nearest":
        return False
    if node.op_type == "MaxPool" and len(node.output) > 1:
        return False
    return not graph.is_constant(node.input[0])


def _tail(graph: GraphIndex) -> set[str]:
    """Return the nodes behind the last weighted ops."""
    made = tail(graph.nodes)
    return {node.name for node in graph.nodes if made.intersection(node.output)}


def _place_on_weighted(graph: GraphIndex, placement: Placement, floating: set[str]) -> None:
    """TensorRT: pairs on what weighted ops read, and on the identity side of a residual Add."""
    weighted = set(placement.weights)
    for node in graph.nodes:
        if node.name in weighted:
            placement.readers.setdefault(node.input[0], set()).add((node.name, 0))
        elif node.op_type == "Add" and node.name not in floating:
            position = _identity_side(graph, node, weighted)
            if position is None:
                continue
            name = node.input[position]
            maker = graph.producer.get(name)
            if maker is None or maker.name not in floating:
                placement.readers.setdefault(name, set()).add((node.name, position))
    _pass_through(graph, placement, floating)


def _pass_through(graph: GraphIndex, placement: Placement, floating: set[str]) -> None:
    """Let pools and concats between two pairs move integers: equal scales, so that pairs cancel."""
    for node in graph.nodes:
        inputs = [name for name in _image_inputs(graph, node) if name in placement.readers]
        out = node.output[0]
        if not inputs or out not in placement.readers:
            continue
        is_read_in_float = any(r.name in floating for r, _ in graph.readers[out])
        if node.op_type == "MaxPool" and not is_read_in_float:
            placement.readers[inputs[0]].add((node.name, 0))
            placement.scale_of[out] = inputs[0]
        elif node.op_type == "Concat":
            placement.joined.append({*inputs, out})


def _identity_side(graph: GraphIndex, add: NodeProto, weighted: set[str]) -> int | None:
    """Return which input of a residual Add is quantized; the other fuses into its kernel."""
    if len(graph.data_inputs(add)) != 2 or add.input[0] == add.input[1]:
        return None
    fuses = [_is_conv_output(graph, name, weighted) for name in add.input]
    if fuses == [False, False]:
        return None
    if fuses != [True, True]:
        return fuses.index(False)
    depths = [_ancestors(graph, name) for name in add.input]
    common = depths[0].keys() & depths[1].keys()
    lengths = [max((d[name] for name in common), default=0) for d in depths]
    nearest = [min((d[name] for name in common), default=0) for d in depths]
    return 0 if (nearest[0], lengths[0]) < (nearest[1], lengths[1]) else 1


def _is_conv_output(graph: GraphIndex, tensor: str, weighted: set[str]) -> bool:
    producer = graph.producer.get(tensor)
    alone = graph.only_reader(tensor) is not None
    return producer is not None and producer.name in weighted and alone


def _ancestors(graph: GraphIndex, tensor: str) -> dict[str, int]:
    """Return tensors before ``tensor``, with the fewest weighted ops on the way."""
    found = {tensor: 0}
    edge = [tensor]
    for _ in range(_FARTHEST):
        edge = list(_step_back(graph, edge, found))
        if not edge:
            break
    return found


def _step_back(graph: GraphIndex, edge: Iterable[str], found: dict[str, int]) -> Iterable[str]:
    for tensor in edge:
        node = graph.producer.get(tensor)
        if node is None:
            continue
        cost = found[tensor] + (node.op_type in WEIGHTED)
        for name in graph.data_inputs(node):
            if name not in found or cost < found[name]:
                found[name] = cost
                yield name
