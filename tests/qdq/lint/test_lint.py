"""Every rule fires on its defect, fixes keep what a graph means, and our own graphs are clean."""

import json
import warnings

import foreign
import numpy as np
import onnx
import pytest
from defects import DEFECTS, biased
from sketch import Sketch, as_tensorrt_reads, run, sqnr_db

from compress.errors import CompressError, EngineError, UnknownNameError
from compress.qdq.lint import RULES, TARGETS, fix_model, fix_onnx, lint_model, lint_onnx, rules_for

FIXABLE = [name for name, draw in DEFECTS.items() if draw().fixed_db is not None]


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return foreign.network()


@pytest.fixture(scope="module")
def nncf_graph(network) -> onnx.ModelProto:
    return foreign.by_nncf(network)


@pytest.fixture(scope="module")
def onnxruntime_graph(network, tmp_path_factory) -> onnx.ModelProto:
    return foreign.by_onnxruntime(network, tmp_path_factory.mktemp("ort"))


def rules_that_fire(model: onnx.ModelProto, target: str) -> set[str]:
    return {finding.rule for finding in lint_model(model, rules=rules_for(target))}


def test_every_rule_has_a_defect_and_every_defect_a_rule():
    assert {rule.name for rule in RULES} == set(DEFECTS)


@pytest.mark.parametrize("name", DEFECTS)
def test_rule_finds_its_defect_and_says_whether_it_can_be_fixed(name):
    defect = DEFECTS[name]()
    found = [f for f in lint_model(defect.model, rules=rules_for(defect.target)) if f.rule == name]
    assert found
    assert all(finding.fixable == (defect.fixed_db is not None) for finding in found)
    nodes = {node.name for node in defect.model.graph.node} | {"graph"}
    assert all(finding.node in nodes and len(finding.message) > 30 for finding in found)


@pytest.mark.parametrize("name", FIXABLE)
def test_fix_removes_the_finding_and_keeps_what_the_graph_means(name):
    defect = DEFECTS[name]()
    fixed = fix_model(defect.model, rules=rules_for(defect.target))
    onnx.checker.check_model(fixed, full_check=True)
    assert not [f for f in lint_model(fixed, rules=rules_for(defect.target)) if f.fixable]
    x = np.random.default_rng(3).uniform(-3, 3, (4, 3, 8, 8)).astype(np.float32)
    ought = run(defect.meaning or defect.model, x)
    assert sqnr_db(ought, run(fixed, x)) > defect.fixed_db


@pytest.mark.parametrize("name", DEFECTS)
def test_lint_and_fix_leave_the_given_model_as_it_was(name):
    defect = DEFECTS[name]()
    before = defect.model.SerializeToString(deterministic=True)
    lint_model(defect.model, rules=rules_for(defect.target))
    fix_model(defect.model, rules=rules_for(defect.target))
    assert defect.model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("target", TARGETS)
def test_own_graphs_have_no_findings(network, target):
    written = foreign.by_compress(network, target)
    assert lint_model(written, rules=rules_for(target)) == []


def test_raw_graphs_of_other_tools_have_findings(nncf_graph, onnxruntime_graph):
    assert {"unsigned-activation", "residual-both-sides", "needless-pair"} <= rules_that_fire(
        nncf_graph, "tensorrt"
    )
    assert {"activation-zero-point", "bias-quantized"} <= rules_that_fire(
        onnxruntime_graph, "tensorrt"
    )
    assert {"bias-float", "signed-activation"} <= rules_that_fire(nncf_graph, "onnxruntime")
    assert "signed-activation" in rules_that_fire(onnxruntime_graph, "onnxruntime")
    assert "signed-activation-with-zero-point" in rules_that_fire(onnxruntime_graph, "openvino")


def test_fix_raises_nncf_graph_under_tensorrts_reading(network, nncf_graph, tmp_path):
    path, out = tmp_path / "nncf.onnx", tmp_path / "fixed.onnx"
    onnx.save(nncf_graph, path)
    left = fix_onnx(path, out, "tensorrt")
    x = foreign.images(16, seed=99)
    ought = run(network, x)
    as_read = sqnr_db(ought, run(as_tensorrt_reads(onnx.load(path)), x))
    fixed = sqnr_db(ought, run(as_tensorrt_reads(onnx.load(out)), x))
    assert as_read < 15
    assert fixed > 30
    assert not any(finding.fixable for finding in left)
    assert left == lint_onnx(out, "tensorrt")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tool", ["nncf", "onnxruntime"])
def test_fixed_graphs_stay_true_on_every_target(network, request, tool, target):
    graph = request.getfixturevalue(f"{tool}_graph")
    fixed = fix_model(graph, rules=rules_for(target))
    onnx.checker.check_model(fixed, full_check=True)
    x = foreign.images(16, seed=99)
    before, after = (sqnr_db(run(network, x), run(graph_, x)) for graph_ in (graph, fixed))
    assert after > before - 3
    assert not [f for f in lint_model(fixed, rules=rules_for(target)) if f.fixable]
    assert len(run(fixed, foreign.images(3))) == 3  # the dimension of the batch is still free


@pytest.mark.parametrize("tool", ["nncf", "onnxruntime"])
def test_fixed_graphs_build_in_tensorrt_rtx_without_a_warning(request, tool):
    trt = pytest.importorskip("tensorrt_rtx")
    graph = request.getfixturevalue(f"{tool}_graph")
    assert foreign.build_messages(trt, graph) != []
    assert foreign.build_messages(trt, fix_model(graph, rules=rules_for("tensorrt"))) == []


@pytest.mark.parametrize("name", ["residual-both-sides", "residual-skip-float"])
def test_residual_add_reads_the_convolution_in_float_and_the_skip_quantized(name):
    fixed = fix_model(DEFECTS[name]().model, rules=[r for r in RULES if r.name == name])
    makers = {value: node for node in fixed.graph.node for value in node.output}
    add = next(node for node in fixed.graph.node if node.op_type == "Add")
    assert [makers[value].op_type for value in add.input] == ["Conv", "DequantizeLinear"]
    quantizers = [n.input[0] for n in fixed.graph.node if n.op_type == "QuantizeLinear"]
    assert len(quantizers) == len(set(quantizers)) == 3  # the skip shares the Q of the next layer


def test_relu_follows_its_convolution_directly_and_is_quantized_once():
    name = "quantized-before-activation"
    fixed = fix_model(DEFECTS[name]().model, rules=[r for r in RULES if r.name == name])
    makers = {value: node for node in fixed.graph.node for value in node.output}
    relu = next(node for node in fixed.graph.node if node.op_type == "Relu")
    assert makers[relu.input[0]].op_type == "Conv"
    assert [n.op_type for n in fixed.graph.node].count("QuantizeLinear") == 2


def test_silu_reads_its_convolution_in_float_and_is_quantized_once():
    name = "split-activation"
    fixed = fix_model(DEFECTS[name]().model, rules=[r for r in RULES if r.name == name])
    makers = {value: node for node in fixed.graph.node for value in node.output}
    gate = next(node for node in fixed.graph.node if node.op_type == "Sigmoid")
    product = next(node for node in fixed.graph.node if node.op_type == "Mul")
    assert makers[gate.input[0]].op_type == "Conv"
    assert {makers[value].op_type for value in product.input} == {"Conv", "Sigmoid"}
    assert [n.op_type for n in fixed.graph.node].count("QuantizeLinear") == 2


def test_an_answer_that_is_only_reshaped_on_its_way_out_may_stay_float():
    """SqueezeNet's order: the classifier is a convolution, then the image is averaged."""
    s = Sketch()
    y = s.conv(s.pair("input", 4 / 127), s.weight(s.kernel(8, 3, 3, 3)))
    pooled = s.add("GlobalAveragePool", s.pair(y, 4 / 255, 128, np.uint8))
    model = s.model(s.add("Flatten", pooled))
    assert "missing-output-quantization" not in rules_that_fire(model, "onnxruntime")


def test_relu6_that_a_quantizer_stood_for_comes_back_as_clip():
    s = Sketch()
    y = s.conv(s.pair("input", 4 / 127), s.weight(s.kernel(8, 3, 3, 3) * 4))
    y = s.pair(y, 6 / 255, -128)
    model = s.model(s.add("GlobalAveragePool", y))
    fixed = fix_model(model, rules=rules_for("tensorrt"))
    assert [n.op_type for n in fixed.graph.node].count("Clip") == 1
    x = np.random.default_rng(3).uniform(-3, 3, (4, 3, 8, 8)).astype(np.float32)
    assert sqnr_db(run(model, x), run(fixed, x)) > 35


def test_scales_kept_in_constant_nodes_are_understood():
    """The form in which PyTorch's own exporters write them."""
    defect = DEFECTS["unsigned-activation"]()
    model = onnx.ModelProto()
    model.CopyFrom(defect.model)
    constants = [
        onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in model.graph.initializer
    ]
    nodes = [*constants, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    assert "unsigned-activation" in rules_that_fire(model, "tensorrt")
    assert not rules_that_fire(fix_model(model, rules=rules_for("tensorrt")), "tensorrt")


def test_output_of_the_network_keeps_its_name_when_its_pair_goes():
    s = Sketch()
    y = s.conv(s.pair("input", 4 / 127), s.weight(s.kernel(8, 3, 3, 3)))
    s.pair(y, 4 / 127)
    model = s.model("unused")
    del model.graph.node[-1]
    model.graph.node[-1].output[0] = "logits"
    fixed = fix_model(model, rules=rules_for("tensorrt"))
    assert [value.name for value in fixed.graph.output] == ["logits"]
    assert [node.op_type for node in fixed.graph.node][-1] == "Conv"


def test_bias_that_was_cut_off_already_cannot_be_mended():
    model = biased(1.0, 1e-9, np.uint8).model("end_out")
    found = lint_model(model, rules=rules_for("onnxruntime"))
    assert [(f.rule, f.fixable) for f in found] == [("bias-overflow", False)]
    assert "cut off" in found[0].message


def test_findings_are_json():
    finding = lint_model(DEFECTS["bias-float"]().model, rules=rules_for("onnxruntime"))[0]
    assert set(json.loads(json.dumps(finding.to_json()))) == {"rule", "node", "message", "fixable"}


def test_unknown_target_is_refused_before_the_file_is_read(tmp_path):
    with pytest.raises(
        UnknownNameError, match=r"no such target 'tensort'. Did you mean 'tensorrt'"
    ):
        lint_onnx(tmp_path / "absent.onnx", "tensort")


def test_absent_and_damaged_files_are_refused_and_nothing_is_written(tmp_path):
    whole = DEFECTS["bias-float"]().model.SerializeToString()
    cases = {
        "absent.onnx": None,
        "short.onnx": whole[: len(whole) // 2],
        "empty.onnx": b"",
        "text.onnx": b"no model at all",
    }
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(EngineError, match=name):
            fix_onnx(tmp_path / name, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_invalid_graph_is_refused_with_the_reason(tmp_path):
    model = onnx.ModelProto()
    model.CopyFrom(DEFECTS["bias-float"]().model)
    model.graph.node[0].op_type = "NoSuchOperator"
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CompressError, match=r"x\.onnx: is not valid ONNX: .*NoSuchOperator"):
        lint_onnx(tmp_path / "x.onnx")


@pytest.mark.parametrize(
    ("op", "domain", "said"),
    [
        ("Conv", "com.microsoft.nchwc", "layout of the CPU"),  # its weights are stored in blocks
        ("FusedConv", "com.microsoft", "no int8 kernel"),
    ],
)
def test_operators_that_onnxruntime_made_of_others_are_named(op, domain, said):
    s = Sketch()
    model = s.model(s.conv(s.pair("input", 4 / 127), s.weight(s.kernel(8, 3, 3, 3))))
    assert rules_that_fire(model, "tensorrt") == set()
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    conv.op_type, conv.domain = op, domain
    model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    found = lint_model(model, rules=rules_for("tensorrt"))
    (told,) = [each for each in found if each.rule == "operator-format"]
    assert told.node == conv.name
    assert said in told.message


def test_an_output_that_says_no_shape_is_linted(tmp_path):
    """As runtimes read it; ONNX's checker asks for one."""
    model = onnx.ModelProto()
    model.CopyFrom(DEFECTS["bias-float"]().model)
    found = lint_model(model, rules=rules_for("onnxruntime"))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    assert lint_onnx(tmp_path / "x.onnx", "onnxruntime") == found
    fix_onnx(tmp_path / "x.onnx", tmp_path / "fixed.onnx", "onnxruntime")


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/hostname"])
def test_weights_outside_the_folder_are_refused(tmp_path, location):
    model = onnx.ModelProto()
    model.CopyFrom(DEFECTS["bias-float"]().model)
    tensor = model.graph.initializer[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(b"x" * 64)
    (folder / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CompressError, match="outside"):
        lint_onnx(folder / "x.onnx")


def without_pair(model: onnx.ModelProto, quantize: onnx.NodeProto) -> onnx.ModelProto:
    """Return a copy in which all that reads this pair reads what it quantizes."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    codes = quantize.output[0]
    real = {node.output[0] for node in model.graph.node if codes in node.input}
    kept = [node for node in bare.graph.node if not {codes, *real}.intersection(node.output)]
    for node in kept:
        for position, name in enumerate(node.input):
            if name in real:
                node.input[position] = quantize.input[0]
    del bare.graph.node[:]
    bare.graph.node.extend(kept)
    return bare


def test_every_pair_that_the_writer_places_is_missed_where_it_lacks(network):
    written = foreign.by_compress(network, "onnxruntime")
    pairs = [node for node in written.graph.node if node.op_type == "QuantizeLinear"]
    asks = {"missing-input-quantization", "missing-output-quantization", "half-quantized"}
    assert len(pairs) > 20
    for quantize in pairs:
        assert rules_that_fire(without_pair(written, quantize), "onnxruntime") & asks, quantize.name


def test_a_read_that_the_writer_leaves_in_float_is_needless_in_int8(network):
    written = foreign.by_compress(network, "tensorrt")
    sources = {n.output[0]: n.input[0] for n in written.graph.node if n.op_type == "QuantizeLinear"}
    real = {
        sources[node.input[0]]: node.output[0]
        for node in written.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in sources
    }
    tried = 0
    for index, node in enumerate(written.graph.node):
        for position, name in enumerate(node.input):
            if name in real and node.op_type not in ("QuantizeLinear", "Concat", "MaxPool"):
                other = onnx.ModelProto()
                other.CopyFrom(written)
                other.graph.node[index].input[position] = real[name]
                found = rules_that_fire(other, "tensorrt")
                assert found & {"needless-pair", "residual-both-sides"}, node.name
                tried += 1
    assert tried


def test_a_convolution_that_ends_the_network_is_to_be_quantized_as_the_writer_does():
    """Its output is moved on its way out; without Q behind it the convolution runs in float."""
    s = Sketch()
    y = s.conv(s.pair("input", 8 / 255, 128, np.uint8), s.weight(s.kernel(8, 3, 3, 3)))
    model = s.model(s.add("Transpose", y, perm=[0, 2, 3, 1]))
    assert "missing-output-quantization" in rules_that_fire(model, "onnxruntime")
