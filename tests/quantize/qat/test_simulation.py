"""Simulated int8 equals ONNX Runtime's, operator by operator, tensor by tensor, graph by graph."""

import copy

import foreign
import numpy as np
import onnx
import pytest
import torch
from sketch import Sketch, run, sqnr_db

from compress.errors import QuantizationError
from compress.qdq import TARGETS, prepare, write_qdq
from compress.quantize import calibrate, make_quant_plan
from compress.quantize.qat import OnnxNetwork, SimulatedNetwork
from compress.quantize.qat.simulation import FakeQuantizer, fake_quantize


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return foreign.network()


@pytest.fixture(scope="module")
def statistics(network):
    return calibrate(network, [foreign.images(4, seed) for seed in range(4)])


def images(count: int = 8) -> np.ndarray:
    return foreign.images(count, seed=77)


def answer(network: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize(
    ("zero", "dtype"), [(0, np.int8), (0, np.uint8), (37, np.uint8), (-5, np.int8)]
)
def test_rounding_of_a_tensor_equals_onnxruntime(zero, dtype):
    s = Sketch()
    model = s.model(s.pair("input", 0.0173, zero, dtype))
    x = np.random.default_rng(0).uniform(-4, 4, (4, 3, 8, 8)).astype(np.float32)
    x[0, 0, 0, :4] = np.array([0.5, 1.5, 2.5, -0.5], np.float32) * np.float32(0.0173)  # ties
    info = np.iinfo(dtype)
    limits = (float(zero), int(info.min), int(info.max))
    mine = fake_quantize(
        torch.from_numpy(x), torch.tensor(0.0173), torch.tensor(limits[0]), *limits[1:]
    )
    assert np.abs(mine.numpy() - run(model, x)).max() <= 1e-5


def test_rounding_of_a_weight_equals_onnxruntime():
    s = Sketch(("batch", 8, 4, 4))
    w = s.kernel(8, 8, 3, 3)
    scale = (np.abs(w).max(axis=(1, 2, 3)) / 127).astype(np.float32)
    weight = s.weight(w, 0, scale)
    model = s.model(s.add("Mul", weight, s.constant(1.0)))
    ought = run(model, np.zeros((1, 8, 4, 4), np.float32))
    wide = torch.from_numpy(scale).reshape(-1, 1, 1, 1)
    mine = fake_quantize(torch.from_numpy(w), wide, torch.zeros_like(wide), -127, 127)
    assert np.abs(mine.numpy() - ought).max() <= 1e-5


def test_gradient_passes_inside_the_range_and_not_outside():
    x = torch.tensor([-2.0, -1.0, 0.3, 1.0, 5.0], requires_grad=True)
    fake_quantize(x, torch.tensor(0.01), torch.tensor(0.0), -127, 127).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_gradient_of_the_scale_is_that_of_lsq():
    """Source: Esser et al., equation 3: round(v/s) - v/s inside, the limit outside."""
    values = torch.tensor([-2.0, 0.304, 0.309, 5.0])
    scale = torch.tensor(0.01, requires_grad=True)
    fake_quantize(values, scale, torch.tensor(0.0), -127, 127).sum().backward()
    ought = -127 + (30 - 30.4) + (31 - 30.9) + 127
    assert scale.grad.item() == pytest.approx(ought, abs=1e-4)


def test_learned_scale_reaches_the_range_of_its_values():
    torch.manual_seed(0)
    x = torch.randn(16, 64)
    quantizer = FakeQuantizer(0.2, 0, -127, 127, learned=True)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.004)
    errors = []
    for _ in range(60):
        loss = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < errors[0] / 20


def agrees_but_for_a_tie(mine, ought):
    """Sums in another order may put a value on the other side of a tie: one image, not the rest."""
    equal = np.abs(mine - ought).max(axis=1) <= 1e-5 * np.abs(ought).max()
    return equal.sum() >= len(equal) - 1


def test_float_network_equals_onnxruntime(network):
    assert (
        np.abs(answer(OnnxNetwork(prepare(network)), images()) - run(network, images())).max()
        < 1e-5
    )


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_simulated_network_equals_the_written_graph(network, statistics, target, learned):
    plan = make_quant_plan(statistics, target=target)
    simulated = SimulatedNetwork(network, plan, learned_scales=learned)
    written = run(write_qdq(network, plan), images())
    assert agrees_but_for_a_tie(answer(simulated, images()), written)
    assert sqnr_db(run(network, images()), written) < 60  # it is int8 that was simulated


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_graph_after_training_has_the_structure_of_ptq_and_computes_what_was_trained(
    network, statistics, target, learned
):
    plan = make_quant_plan(statistics, target=target)
    simulated = SimulatedNetwork(network, plan, learned_scales=learned)
    optimizer = torch.optim.SGD(simulated.parameters(), lr=0.02)
    x = torch.from_numpy(images(16))
    wanted = torch.roll(torch.from_numpy(run(network, images(16))), 1, dims=1)
    losses = []
    for _ in range(5):
        loss = (simulated(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    before, after = write_qdq(network, plan), simulated.write()
    shape = [(n.op_type, n.name, tuple(n.input), tuple(n.output)) for n in before.graph.node]
    assert shape == [(n.op_type, n.name, tuple(n.input), tuple(n.output)) for n in after.graph.node]
    mine, exported = answer(simulated, images()), run(after, images())
    assert agrees_but_for_a_tie(mine, exported)
    assert sqnr_db(exported, mine) > 45
    assert np.abs(exported - run(before, images())).max() > 1e-3  # training changed it
    again = write_qdq(simulated.trained_model(), simulated.trained_plan())
    assert np.array_equal(run(again, images()), exported)


def test_plan_with_corrections_and_float_layers_is_simulated(network, statistics):
    plan = make_quant_plan(statistics, target="onnxruntime")
    prepared = prepare(network)
    convs = [node for node in prepared.graph.node if node.op_type == "Conv"]
    biases = {t.name: onnx.numpy_helper.to_array(t) for t in prepared.graph.initializer}
    moved = tuple(float(b) + 0.1 for b in biases[convs[1].input[2]])
    plan = plan.changed(biases={convs[1].name: moved}).keep_float([convs[2].name], "test")
    written = run(write_qdq(network, plan), images())
    simulated = answer(SimulatedNetwork(network, plan), images())
    assert agrees_but_for_a_tie(simulated, written)
    assert sqnr_db(written, simulated) > sqnr_db(run(network, images()), written) + 10


def test_nearly_dead_channel_does_not_overflow_its_bias():
    s = Sketch()
    w = s.kernel(8, 3, 3, 3)
    w[0] *= 1e-9
    y = s.add("Relu", s.conv("input", s.constant(w), s.constant(np.full(8, 0.5))))
    y = s.conv(y, s.constant(s.kernel(4, 8, 3, 3)), s.constant(np.zeros(4)))
    model = s.model(s.add("Flatten", s.add("GlobalAveragePool", y)))
    x = np.random.default_rng(0).uniform(-1, 1, (8, 3, 8, 8)).astype(np.float32)
    plan = make_quant_plan(calibrate(model, [x]), target="onnxruntime")
    written = run(write_qdq(model, plan), x)
    assert np.abs(answer(SimulatedNetwork(model, plan), x) - written).max() < 1e-6


def test_state_is_named_as_the_initializers_and_survives_copies(network, statistics):
    simulated = SimulatedNetwork(network, make_quant_plan(statistics, target="tensorrt"))
    names = {tensor.name for tensor in prepare(network).graph.initializer if len(tensor.dims) > 1}
    floats = {name for name in simulated.state_dict() if not name.startswith(("kern", "activ"))}
    assert floats <= {t.name for t in prepare(network).graph.initializer}
    assert {n for n in names if simulated.constant(n).is_floating_point()} <= floats
    twin = copy.deepcopy(simulated)
    with torch.no_grad():
        next(twin.parameters()).mul_(2)
    assert np.array_equal(answer(simulated, images()), answer(simulated, images()))
    assert not np.array_equal(answer(twin, images()), answer(simulated, images()))


def test_given_model_and_plan_are_left_as_they_were(network, statistics):
    plan = make_quant_plan(statistics, target="onnxruntime")
    before = network.SerializeToString(deterministic=True), plan.to_json()
    simulated = SimulatedNetwork(network, plan, learned_scales=True)
    simulated.write()
    assert (network.SerializeToString(deterministic=True), plan.to_json()) == before


def test_operator_that_cannot_be_trained_is_named():
    s = Sketch()
    y = s.conv("input", s.constant(s.kernel(3, 3, 3, 3)))
    model = s.model(s.add("Softsign", y, name="odd"))
    with pytest.raises(QuantizationError, match=r"Softsign of node 'odd' cannot be"):
        OnnxNetwork(model)


OPERATOR_GRAPHS = {
    "asymmetric padding": lambda s: s.add(
        "Conv", "input", s.constant(s.kernel(4, 3, 3, 3)), pads=[0, 1, 2, 1], strides=[2, 1]
    ),
    "same padding": lambda s: s.add(
        "Conv", "input", s.constant(s.kernel(4, 3, 3, 3)), auto_pad="SAME_UPPER", strides=[2, 2]
    ),
    "transposed": lambda s: s.add(
        "ConvTranspose",
        "input",
        s.constant(s.kernel(3, 4, 3, 3)),
        strides=[2, 2],
        pads=[1, 0, 0, 1],
        output_padding=[1, 1],
    ),
    "max pool": lambda s: s.add(
        "MaxPool", "input", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]
    ),
    "ceil": lambda s: s.add("MaxPool", "input", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "average pool": lambda s: s.add(
        "AveragePool", "input", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]
    ),
    "average of padding": lambda s: s.add(
        "AveragePool", "input", kernel_shape=[2, 2], pads=[0, 1, 1, 0], count_include_pad=1
    ),
    "average of no padding": lambda s: s.add(
        "AveragePool", "input", kernel_shape=[2, 2], pads=[0, 1, 1, 0]
    ),
    "equal parts of opset 13": lambda s: s.add("Sub", *_halves(s)),
    "layer norm": lambda s: s.add(
        "LayerNormalization", "input", s.constant(s.kernel(8)), s.constant(s.kernel(8))
    ),
    "group norm": lambda s: s.add(
        "GroupNormalization",
        s.add("Concat", "input", "input", axis=1),
        s.constant(s.kernel(6)),
        s.constant(s.kernel(6)),
        num_groups=2,
    ),
    "instance norm": lambda s: s.add(
        "InstanceNormalization", "input", s.constant(s.kernel(3)), s.constant(s.kernel(3))
    ),
    "batch norm": lambda s: s.add(
        "BatchNormalization", "input", *[s.constant(np.abs(s.kernel(3)) + 0.1) for _ in range(4)]
    ),
    "slice": lambda s: s.add(
        "Slice",
        "input",
        s.constant([1, -1], np.int64),
        s.constant([7, -(2**62)], np.int64),
        s.constant([2, 3], np.int64),
        s.constant([2, -2], np.int64),
    ),
    "gather": lambda s: s.add("Gather", "input", s.constant([[2, -1], [0, 0]], np.int64), axis=1),
    "split": lambda s: s.add("Concat", *_split(s, [1, 2]), axis=2),
    "shuffle": lambda s: s.add(
        "Reshape",
        s.add(
            "Transpose",
            s.add("Reshape", "input", s.constant([0, 3, 2, -1], np.int64)),
            perm=[0, 2, 1, 3],
        ),
        s.constant([0, 3, 8, 8], np.int64),
    ),
    "shape arithmetic": lambda s: s.add(
        "Reshape",
        "input",
        s.add(
            "Concat",
            s.add("Shape", "input", start=0, end=1),
            s.constant([-1], np.int64),
            axis=0,
        ),
    ),
    "reflect": lambda s: s.add(
        "Pad", "input", s.constant([0, 0, 1, 2, 0, 0, 2, 1], np.int64), mode="reflect"
    ),
    "pad with a value": lambda s: s.add(
        "Pad", "input", s.constant([0, 0, 1, 2, 0, 0, 2, 1], np.int64), s.constant(0.7)
    ),
    "nearest": lambda s: s.add(
        "Resize",
        "input",
        "",
        s.constant([1, 1, 2, 2]),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ),
    "bilinear": lambda s: s.add("Resize", "input", "", s.constant([1, 1, 2, 2]), mode="linear"),
    "bilinear to a size": lambda s: s.add(
        "Resize",
        "input",
        "",
        "",
        s.constant([4, 3, 5, 11], np.int64),
        mode="linear",
        coordinate_transformation_mode="align_corners",
    ),
    "depth to space": lambda s: s.add(
        "DepthToSpace", s.add("Concat", *["input"] * 4, axis=1), blocksize=2
    ),
    "depth to space, columns first": lambda s: s.add(
        "DepthToSpace", s.add("Concat", *["input"] * 4, axis=1), blocksize=2, mode="CRD"
    ),
    "space to depth": lambda s: s.add("SpaceToDepth", "input", blocksize=2),
    "reductions": lambda s: s.add(
        "Mul",
        s.add("ReduceMean", "input", s.constant([2, 3], np.int64)),
        s.add("ReduceL2", "input", s.constant([1], np.int64)),
    ),
    "activations": lambda s: s.add(
        "Sum",
        *[
            s.add(kind, "input")
            for kind in ("HardSwish", "HardSigmoid", "LeakyRelu", "Elu", "Selu", "Mish", "Gelu")
        ],
        s.add("PRelu", "input", s.constant(s.kernel(3, 1, 1))),
    ),
    "scaled gemm": lambda s: s.add(
        "Gemm",
        s.add("Flatten", "input"),
        s.constant(s.kernel(5, 192)),
        s.constant(s.kernel(5)),
        transB=1,
        alpha=0.5,
        beta=2.0,
    ),
    "squeeze and back": lambda s: s.add(
        "Unsqueeze",
        s.add("Squeeze", s.add("GlobalMaxPool", "input"), s.constant([2, 3], np.int64)),
        s.constant([1, -1], np.int64),
    ),
    "least and largest": lambda s: s.add(
        "Min", s.add("Max", "input", s.constant(-0.5)), s.constant(0.5), s.constant(0.4)
    ),
}


def _split(s: Sketch, sizes: list[int]) -> list[str]:
    first = s.add("Split", "input", s.constant(sizes, np.int64), axis=1)
    s.nodes[-1].output.append("second")
    return [first, s.add("ReduceSum", "second", s.constant([1], np.int64))]


def _halves(s: Sketch) -> list[str]:
    s.add("Split", "input", axis=2)
    s.nodes[-1].output.append("lower")
    return list(s.nodes[-1].output)


@pytest.mark.parametrize("name", OPERATOR_GRAPHS)
def test_operator_equals_onnxruntime(name):
    s = Sketch()
    opset = {"equal parts of opset 13": 13}.get(name, 21)
    model = s.model(OPERATOR_GRAPHS[name](s), opset)
    x = np.random.default_rng(1).standard_normal((4, 3, 8, 8)).astype(np.float32)
    ought = run(model, x)
    assert np.abs(answer(OnnxNetwork(model), x) - ought).max() <= 1e-5 * max(np.abs(ought).max(), 1)
