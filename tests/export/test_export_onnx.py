"""Networks leave torch as ONNX files that answer alike, and say what is wrong when they cannot."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort  # noqa: TID253 - the oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms  # noqa: TID253 - as people call it in a forward
from torchvision.transforms import v2  # noqa: TID253 - as above

from compress.errors import CompressError, ExportError, UsageError
from compress.export import (
    Preprocess,
    conversion,
    export_onnx,
    proof,
    read_metadata,
    weights_sha256,
    writing,
)
from compress.export.conversion import Example
from compress.graph import ends
from compress.runtimes import open_session


class Small(nn.Module):
    """Conv, BatchNorm with real statistics, residual add, pooling, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)
        nn.init.normal_(self.bn1.running_mean)
        nn.init.uniform_(self.bn1.running_var, 0.5, 2)
        nn.init.normal_(self.bn1.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.conv2(x) + x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def small() -> Small:
    torch.manual_seed(0)
    return Small().train()


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported(small: Small, image: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "small.onnx"
    return export_onnx(small, image, path, metadata={"labels": ["a", "b"], "lineage": "abc"})


def answer(path: Path, array: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": array})[0]


def test_file_answers_as_torch_for_any_batch(small: Small, exported: Path) -> None:
    images = torch.randn(7, 3, 8, 8)
    expected = copy.deepcopy(small).eval()(images).detach().numpy()
    np.testing.assert_allclose(answer(exported, images.numpy()), expected, rtol=1e-4, atol=1e-5)


def test_ends_have_the_promised_names_and_a_free_batch(exported: Path) -> None:
    graph = onnx.load(str(exported)).graph
    assert [value.name for value in graph.input] == ["input"]
    assert [value.name for value in graph.output] == ["logits"]
    dims = [
        value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)
    ]
    assert dims == ["batch", "batch"]


def test_batchnorm_is_folded_and_parameter_names_stay(exported: Path) -> None:
    graph = onnx.load(str(exported)).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert {"conv1.weight", "conv2.weight", "fc.weight"} <= {t.name for t in graph.initializer}


def test_nothing_of_this_machine_is_left_but_module_scopes_are(exported: Path) -> None:
    content = exported.read_bytes()
    assert str(Path(torch.__file__).parent.parent).encode() not in content
    assert Path(__file__).name.encode() not in content
    assert b"stack_trace" not in content
    nodes = onnx.load(str(exported)).graph.node
    scopes = {
        entry.key: entry.value
        for node in nodes
        if node.op_type == "Gemm"
        for entry in node.metadata_props
    }
    assert list(scopes) == ["pkg.torch.onnx.name_scopes"]
    assert "'fc'" in scopes["pkg.torch.onnx.name_scopes"]


def test_metadata_comes_back(exported: Path) -> None:
    facts = read_metadata(exported)
    assert facts["labels"] == ["a", "b"]
    assert facts["lineage"] == "abc"
    assert len(facts["weights_sha256"]) == 64


def test_weights_hash_follows_the_weights(small: Small, exported: Path) -> None:
    other = copy.deepcopy(small)
    assert weights_sha256(other) == read_metadata(exported)["weights_sha256"]
    with torch.no_grad():
        other.fc.bias[0] += 1e-3
    assert weights_sha256(other) != read_metadata(exported)["weights_sha256"]


def test_a_second_export_gives_the_same_bytes_and_leaves_everything_as_found(
    small: Small, image: Tensor, exported: Path, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    state, modes = torch.get_rng_state(), [m.training for m in small.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = export_onnx(
            small, image, tmp_path / "x.onnx", metadata={"labels": ["a", "b"], "lineage": "abc"}
        )
    assert again.read_bytes() == exported.read_bytes()
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in small.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    assert all(p.requires_grad for p in small.parameters())


def test_fixed_batch_is_fixed(small: Small, tmp_path: Path) -> None:
    path = export_onnx(small, torch.randn(4, 3, 8, 8), tmp_path / "x.onnx", dynamic_batch=False)
    dims = onnx.load(str(path)).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [4, 3, 8, 8]


def test_height_and_width_are_free_where_asked(small: Small, image: Tensor, tmp_path: Path) -> None:
    path = export_onnx(small, image, tmp_path / "x.onnx", dynamic_size=True)
    dims = onnx.load(str(path)).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, "height", "width"]
    other = torch.randn(2, 3, 12, 21)
    expected = copy.deepcopy(small).eval()(other).detach().numpy()
    np.testing.assert_allclose(answer(path, other.numpy()), expected, rtol=1e-4, atol=1e-5)


def test_a_free_size_and_a_fixed_batch_go_together(small: Small, tmp_path: Path) -> None:
    path = export_onnx(
        small, (1, 3, 8, 8), tmp_path / "x.onnx", dynamic_batch=False, dynamic_size=True
    )
    dims = onnx.load(str(path)).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == [1, 3, "height", "width"]


def test_a_size_that_the_code_fixes_is_told(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2 * 8 * 8, 4))
    with pytest.raises(ExportError, match="--fixed-size"):
        export_onnx(network, torch.randn(1, 3, 8, 8), tmp_path / "x.onnx", dynamic_size=True)
    assert list(tmp_path.iterdir()) == []


def test_preprocess_and_softmax_in_the_graph_equal_torch_around_it(
    small: Small, image: Tensor, tmp_path: Path
) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    path = export_onnx(
        small, image, tmp_path / "x.onnx", preprocess=Preprocess(mean, std), softmax=True
    )
    raw = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    normal = (raw / 255.0 - np.array(mean)) / np.array(std)
    logits = copy.deepcopy(small).eval()(torch.tensor(normal).permute(0, 3, 1, 2).float())
    expected = logits.softmax(1).detach().numpy()
    np.testing.assert_allclose(answer(path, raw), expected, rtol=1e-4, atol=1e-6)
    assert read_metadata(path)["layout"] == "NHWC"
    assert read_metadata(path)["output"] == "probabilities"


class TwoEnds(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"sum": left + right, "product": left * right}


@pytest.mark.parametrize("named", [False, True], ids=["tuple", "dict"])
def test_several_inputs_and_outputs_are_numbered(tmp_path: Path, named: bool) -> None:
    left, right = torch.randn(2, 4), torch.randn(2, 4)
    given = {"left": left, "right": right} if named else (left, right)
    path = export_onnx(TwoEnds(), given, tmp_path / "x.onnx")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    total, product = session.run(
        ["output_0", "output_1"], {"input_0": left.numpy(), "input_1": right.numpy()}
    )
    np.testing.assert_allclose(total, (left + right).numpy())
    np.testing.assert_allclose(product, (left * right).numpy())


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return x * 2


class OneBatchOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 12) * 2


class Remembers(nn.Module):
    """Answers differently from what its trace recorded: the trace sees the first value only."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * float(self.calls)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        pytest.param(Branching(), {}, r"if x.sum\(\) > 0.*cannot trace", id="depends on values"),
        pytest.param(OneBatchOnly(), {}, "dynamic_batch=False", id="one batch only"),
        pytest.param(Remembers(), {}, "differs.*trace itself", id="hidden state"),
        pytest.param(nn.Flatten(), {"opset": 99}, "opset 99.*Expected 18 to 23", id="opset"),
    ],
)
def test_what_cannot_be_exported_says_why_and_leaves_no_file(
    tmp_path: Path, network: nn.Module, options: dict, message: str
) -> None:
    with pytest.raises(ExportError, match=f"(?s){message}"):
        export_onnx(network, torch.randn(2, 3, 2, 2), tmp_path / "x.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def graph_with(inputs: list[list[object]], outputs: list[list[object]]) -> ir.Model:
    def ends(shapes: list[list[object]], name: str) -> list[ir.Value]:
        return [
            ir.Value(name=f"{name}{i}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(s))
            for i, s in enumerate(shapes)
        ]

    graph = ir.Graph(ends(inputs, "i"), ends(outputs, "o"), nodes=[], opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


IMAGES, LOGITS = ["batch", 3, 8, 8], ["batch", 5]


@pytest.mark.parametrize(
    ("graph", "preprocess", "message"),
    [
        pytest.param(
            graph_with([IMAGES], [LOGITS]), Preprocess((0.5,), (0.5,)), "1 means for", id="channels"
        ),
        pytest.param(
            graph_with([LOGITS], [LOGITS]), Preprocess((0.5,), (0.5,)), "takes images", id="images"
        ),
        pytest.param(graph_with([IMAGES], [IMAGES]), None, "is for classifiers", id="classifier"),
        pytest.param(graph_with([IMAGES], [LOGITS] * 2), None, "which of them", id="two outputs"),
    ],
)
def test_ends_that_do_not_fit_say_why(
    graph: ir.Model, preprocess: Preprocess | None, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        ends.attach(graph, preprocess, softmax=preprocess is None)


@pytest.mark.parametrize(
    "example", [torch.tensor(1.0), torch.zeros(0, 3), [torch.zeros(1, 3), [2]]]
)
def test_example_without_batch_is_refused(tmp_path: Path, example: object) -> None:
    with pytest.raises((ExportError, UsageError), match="example input"):
        export_onnx(nn.Identity(), example, tmp_path / "x.onnx")  # type: ignore[arg-type]


def test_normalization_that_is_none_is_refused() -> None:
    with pytest.raises(ExportError, match="one positive std"):
        Preprocess((0.5,), (0.0,))


def test_a_wrong_node_is_named_and_the_old_file_stays(
    small: Small, image: Tensor, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = conversion.convert

    def damaged(*args: object, **options: object) -> object:
        program = convert(*args, **options)  # type: ignore[arg-type]
        weight = program.model.graph.initializers["conv2.weight"]
        array = weight.const_value.numpy().copy()
        array[0] += 0.5
        weight.const_value = ir.tensor(array, name="conv2.weight")
        return program

    monkeypatch.setattr(conversion, "convert", damaged)
    target = tmp_path / "x.onnx"
    target.write_bytes(b"old")
    with pytest.raises(ExportError, match=r"first node that differs is \S+ \(Conv\)") as caught:
        export_onnx(small, image, target)
    convs = [n.name for n in onnx.load(str(exported)).graph.node if n.op_type == "Conv"]
    assert convs[1] in str(caught.value)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"]


def test_images_of_the_user_are_checked_too(
    small: Small, image: Tensor, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    answers = proof._answers

    def recorded(module: nn.Module, inputs: object, label: str) -> object:
        seen.append(label)
        return answers(module, inputs, label)  # type: ignore[arg-type]

    monkeypatch.setattr(proof, "_answers", recorded)
    module = conversion.frozen_copy(small)
    proof.check_export(exported, module, Example.of(image), None, images=torch.randn(5, 3, 8, 8))
    assert seen == [
        "the example input",
        "random inputs of batch 1",
        "random inputs of batch 3",
        "the given images",
    ]


def test_rounding_of_a_badly_conditioned_network_is_no_mismatch() -> None:
    class Sensitive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 1e4 + 0.3 - x * 1e4).sin()

    exact = proof.Example((torch.rand(4, 3),), {})
    network = Sensitive()
    reference = [network(exact.args[0])]
    truth = [network(exact.args[0].double())]
    nearly = [truth[0] + (reference[0] - truth[0]) * 2]
    assert proof.difference(nearly, reference) > proof.TOLERANCE
    assert proof._is_rounding(network, exact, nearly, reference)
    assert not proof._is_rounding(network, exact, [truth[0] + 1], reference)


class Chooser(nn.Module):
    """The features of the five places with the best scores; on a flat image all scores tie."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.score = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.features(x) + torch.linspace(0, 1, 64).reshape(8, 8)
        scores = self.score(self.features(x)).flatten(1)
        return found.flatten(2).gather(2, scores.topk(5, 1).indices[:, None].expand(-1, 4, -1))


def test_an_image_whose_best_scores_tie_decides_nothing_and_another_one_does(tmp_path) -> None:
    torch.manual_seed(0)
    network, flat = Chooser().eval(), torch.full((1, 3, 8, 8), 0.4)
    path = export_onnx(network, flat, tmp_path / "model.onnx")
    wrong = copy.deepcopy(network)
    with torch.no_grad():
        wrong.features.bias[0] += 0.1
    with pytest.raises(ExportError, match="ONNX Runtime differs from torch"):
        proof.check_export(path, conversion.frozen_copy(wrong), Example.of(flat), None)


def test_a_comparison_that_rounding_decides_everywhere_is_refused(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    flat = torch.full((1, 3, 8, 8), 0.4)
    monkeypatch.setattr(proof, "_random_like", lambda tensor, generator: tensor.clone())
    with pytest.raises(ExportError, match="rounding decides what torch itself answers"):
        export_onnx(Chooser().eval(), flat, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_weights_over_the_limit_lie_beside_the_file(
    small: Small, image: Tensor, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.export.LARGEST_SINGLE_FILE", 100)
    path = tmp_path / "x.onnx"
    with writing(ir.load(exported), path, {}):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.onnx", "x.onnx.data"]
    expected = copy.deepcopy(small).eval()(image).detach().numpy()
    np.testing.assert_allclose(answer(path, image.numpy()), expected, rtol=1e-4, atol=1e-5)


def test_reading_metadata_of_no_onnx_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"\xff\xffnot onnx")
    with pytest.raises(ExportError, match="cannot be read as ONNX"):
        read_metadata(tmp_path / "x.onnx")


def test_logits_come_first_whatever_their_place_in_the_network(
    small: Small, image: Tensor, tmp_path: Path
):
    class InDict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = copy.deepcopy(small)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"positive": torch.relu(x), "logits": self.network(x), "half": x / 2}

    path = export_onnx(InDict(), image, tmp_path / "dict.onnx")
    outputs = [output.name for output in onnx.load(path).graph.output]
    assert outputs == ["logits", "output_1", "output_2"]
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits, positive, half = session.run(None, {"input": image.numpy()})
    with torch.no_grad():
        expected = copy.deepcopy(small).eval()(image).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(positive, image.relu().numpy())
    np.testing.assert_allclose(half, image.numpy() / 2)


@dataclasses.dataclass
class Record:
    """Outputs of a network in a class that torch does not know."""

    features: Tensor
    logits: Tensor


def test_outputs_in_a_class_of_ones_own_are_written(small: Small, image: Tensor, tmp_path: Path):
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = copy.deepcopy(small)

        def forward(self, x: Tensor) -> Record:
            return Record(torch.relu(x), self.network(x))

    path = export_onnx(Own(), image, tmp_path / "own.onnx")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits", "output_1"]
    logits, features = session.run(None, {"input": image.numpy()})
    with torch.no_grad():
        expected = copy.deepcopy(small).eval()(image).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(features, image.relu().numpy())


class CachingHead(nn.Module):
    """A grid made for the shape it saw last, as detection heads keep it."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 1)
        self.shape = self.grid = None

    def forward(self, x):
        x = self.head(self.stem(x))
        if self.shape != x.shape:
            self.grid = torch.arange(x[0, 0].numel(), dtype=x.dtype).view(1, 1, *x.shape[2:])
            self.shape = x.shape
        return x + self.grid


class BesideFeatures(nn.Module):
    """A head that keeps its grid for a size, and returns the feature map beside its answer."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 1)
        self.size = self.grid = None

    def forward(self, x):
        feature = self.stem(x)
        if self.size != tuple(feature.shape[2:]):
            self.size = tuple(feature.shape[2:])
            self.grid = (torch.arange(self.size[0] * self.size[1]) + feature.new_zeros(1))[None]
        return (self.head(feature).flatten(2) + self.grid, {"feats": [feature]})


def test_only_the_outputs_that_are_named_are_written(tmp_path):
    network = BesideFeatures().eval()
    example = torch.randn(1, 3, 32, 32)
    export_onnx(network, example, tmp_path / "head.onnx", outputs="0")
    assert network.grid is None and not network._forward_hooks
    images = torch.randn(3, 3, 32, 32)
    with open_session(tmp_path / "head.onnx") as session:
        (found,) = session.run(images.numpy())
    with torch.no_grad():
        assert np.allclose(found, network(images)[0].numpy(), atol=1e-4)
    with pytest.raises(CompressError, match=r"no output 'boxes'. Expected one of: 0 "):
        export_onnx(network, example, tmp_path / "none.onnx", outputs=["boxes"])


def test_what_a_dry_run_caches_does_not_fix_the_batch(tmp_path):
    network = CachingHead().eval()
    export_onnx(network, torch.randn(1, 3, 32, 32), tmp_path / "head.onnx")
    assert network.grid is None  # the caller's network is as it was
    images = torch.randn(3, 3, 32, 32)
    with open_session(tmp_path / "head.onnx") as session:
        (found,) = session.run(images.numpy())
    with torch.no_grad():
        assert np.allclose(found, network(images).numpy(), atol=1e-5)


class WindowAttention(nn.Module):
    """Attention of tokens in ``lead`` leading dimensions, as windows of Twins have three."""

    def __init__(self, lead: int, masked: bool, causal: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.lead, self.masked, self.causal = lead, masked, causal

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        heads = (tokens.shape[0], *(1, 4, 2, 2, 2)[1 : self.lead])
        parted = tokens.reshape(*heads, -1, 4)
        count = parted.shape[-2]
        mask = torch.arange(count**2).reshape(1, count, count) * 0.01 if self.masked else None
        attention = nn.functional.scaled_dot_product_attention
        return attention(parted, parted, parted, mask, 0.0, self.causal)


@pytest.mark.parametrize(
    ("lead", "masked", "causal"),
    [(1, False, False), (3, True, False), (3, False, True), (4, True, False)],
    ids=str,
)
def test_attention_of_any_rank_is_exported(
    tmp_path: Path, lead: int, masked: bool, causal: bool
) -> None:
    model = WindowAttention(lead, masked, causal).eval()
    images = torch.randn(3, 3, 8, 8)
    file = export_onnx(model, images[:1], tmp_path / "net.onnx")
    answer = ort.InferenceSession(file).run(None, {"input": images.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(answer, model(images).numpy(), atol=1e-5)


class Normalizes(nn.Module):
    """It normalizes its images by itself, through torchvision."""

    def __init__(self, normalize: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(normalize, nn.Conv2d(3, 8, 3), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).mean((2, 3))


@pytest.mark.parametrize(
    "normalize",
    [
        transforms.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.1]),
        transforms.Normalize([0.5], [0.2], inplace=True),
        transforms.Normalize(torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])),
        nn.Sequential(transforms.Resize(12), transforms.Normalize([0.5] * 3, [0.2] * 3)),
        transforms.GaussianBlur(5, 1.5),
        transforms.GaussianBlur((3, 5), (0.8, 0.8)),
        v2.GaussianBlur(5, 1.5),
        v2.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.1]),
    ],
    ids=["lists", "in place", "tensors", "resized", "blur", "ends", "blur v2", "lists v2"],
)
def test_a_network_that_normalizes_or_blurs_through_torchvision_is_exported(
    tmp_path: Path, normalize: nn.Module
) -> None:
    model, images = Normalizes(normalize).eval(), torch.rand(3, 3, 16, 16)
    kinds = transforms._functional_tensor, transforms.GaussianBlur, v2.GaussianBlur
    before = [dict(vars(kind)) for kind in kinds]
    file = export_onnx(model, images[:1], tmp_path / "net.onnx")
    answer = ort.InferenceSession(file).run(None, {"input": images.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(answer, model(images.clone()).numpy(), atol=1e-5)
    assert [dict(vars(kind)) for kind in kinds] == before


class Modulated(nn.Module):
    """Its filters differ from image to image, as those of StyleGAN 2 do: a group for each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 4, 3, 3, 3))

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, *size = images.shape
        weight = self.weight * images.mean((2, 3))[:, None, :, None, None]
        images = images.reshape(1, batch * channels, *size)
        found = F.conv2d(images, weight.flatten(0, 1), padding=1, groups=batch)
        return found.reshape(batch, 4, *size)


def test_an_option_that_depends_on_the_batch_is_told_as_that(tmp_path: Path) -> None:
    model, images = Modulated().eval(), torch.rand(2, 3, 8, 8)
    with pytest.raises(ExportError, match=r"convolution.* depends on a size left free.*--fixed-"):
        export_onnx(model, images, tmp_path / "net.onnx")
    file = export_onnx(model, images, tmp_path / "net.onnx", dynamic_batch=False)
    answer = ort.InferenceSession(file).run(None, {"input": images.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(answer, model(images).numpy(), atol=1e-4)


class Refines(nn.Module):
    """It takes settings among its images, as networks for optical flow do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, left: Tensor, steps: int, right: Tensor, how: str = "no", bias=None):
        for _ in range(steps):
            left = self.conv(torch.cat([left, right], 1))
        left = left if bias is None else left + bias
        return {"image": left, "how": how} if how == "as dict" else left


@pytest.mark.parametrize(
    "settings",
    [((1, 2),), ((1, 3), (3, "as dict"), (4, 0.5)), (("steps", 2), ("how", "no"), ("bias", None))],
)
def test_settings_among_the_inputs_are_fixed_in_the_graph(tmp_path: Path, settings: tuple) -> None:
    model, (left, right) = Refines().eval(), torch.rand(2, 3, 3, 8, 8)
    if settings[0][0] == 1:
        example = [left, right]
        for place, value in settings:
            example.insert(place, value)
        with torch.no_grad():
            expected = model(*example)
        example = tuple(example)
    else:
        example = {"left": left, "right": right} | dict(settings)
        with torch.no_grad():
            expected = model(**example)
    file = export_onnx(model, example, tmp_path / "net.onnx")
    answer = ort.InferenceSession(file).run(
        None, {"input_0": left.numpy(), "input_1": right.numpy()}
    )
    expected = expected["image"] if isinstance(expected, dict) else expected
    np.testing.assert_allclose(answer[0], expected.numpy(), atol=1e-5)


def test_a_division_by_zero_is_named(tmp_path: Path) -> None:
    model = Normalizes(transforms.Normalize([0.5] * 3, [0.2, 0.0, 0.2])).eval()
    with pytest.raises(ExportError, match="zero"):
        export_onnx(model, torch.rand(1, 3, 16, 16), tmp_path / "net.onnx")


class Curves(nn.Module):
    """It bends pixels of 0..1 again and again, as Zero-DCE does: others overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        bend = self.conv(images).tanh()
        for _ in range(12):
            images = images + bend * (images.pow(2) - images)
        return images


def test_inputs_for_which_torch_overflows_decide_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Curves().eval(), torch.rand(2, 3, 16, 16)
    file = export_onnx(model, images[:1], tmp_path / "net.onnx")
    answer = ort.InferenceSession(file).run(None, {"input": images.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(answer, model(images).numpy(), atol=1e-5)


class SharedList(nn.Module):
    """It returns one list of feature maps in two places, as YOLOv10 does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, dict[str, list[Tensor]]]]:
        maps = [self.conv(images)]
        return maps[0].mean((2, 3)), {"many": {"maps": maps}, "one": {"maps": maps}}


def test_a_list_that_is_returned_twice_is_exported_once(tmp_path: Path) -> None:
    file = export_onnx(SharedList().eval(), torch.randn(1, 3, 8, 8), tmp_path / "net.onnx")
    shapes = [output.shape[1:] for output in ort.InferenceSession(file).get_outputs()]
    assert shapes == [[8], [8, 6, 6]]


class OneImage(nn.Module):
    """Works on one image only, as a mixture of experts that is routed for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x) + x.new_zeros(1, 5 - len(x), 1, 1)


def test_a_network_that_fails_on_a_batch_of_two_is_told_so(tmp_path):
    image = torch.rand(1, 3, 8, 8)
    with pytest.raises(ExportError, match=r"fails on a batch of 2.*--fixed-batch"):
        export_onnx(OneImage(), image, tmp_path / "net.onnx")
    export_onnx(OneImage(), image, tmp_path / "net.onnx", dynamic_batch=False)
