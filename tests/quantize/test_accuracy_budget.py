"""Sensitivity finds the layer that was spoiled, and the budget gives that layer back to float."""

import json

import foreign
import numpy as np
import onnx
import pytest
import torch
from sketch import run

from compress.errors import DataError, RunError
from compress.qdq import ActivationRange, QuantPlan, WeightScales, prepare, write_qdq
from compress.quantize import accuracy_budget, calibrate, make_quant_plan
from compress.quantize.accuracy_budget import _BudgetSearch, meet_budget
from compress.quantize.sensitivity import (
    Seen,
    diagnose,
    plot_quantize_sensitivity,
    quantize_sensitivity,
)


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    """The network with the mean of its answers taken away, so that every class is met."""
    model = foreign.network()
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    bias = next(t for t in model.graph.initializer if t.name == gemm.input[2])
    mean = run(model, foreign.images(64, 49)).mean(0)
    centred = onnx.numpy_helper.to_array(bias) - mean
    bias.CopyFrom(onnx.numpy_helper.from_array(centred, bias.name))
    return model


@pytest.fixture(scope="module")
def statistics(network):
    return calibrate(network, [foreign.images(4, seed) for seed in range(4)])


@pytest.fixture(scope="module")
def labelled(network):
    """The images that the fp32 network is surest of, labelled with what it says."""
    x = foreign.images(256, 50)
    answers = run(network, x)
    ordered = np.sort(answers, axis=1)
    surest = np.argsort(ordered[:, -2] - ordered[:, -1])[:32]
    images, labels = torch.from_numpy(x[surest]), torch.from_numpy(answers[surest].argmax(1))
    return list(zip(images.split(16), labels.split(16), strict=True))


def convs(network) -> list[onnx.NodeProto]:
    return [node for node in prepare(network).graph.node if node.op_type == "Conv"]


def with_spoiled_weight(network, plan: QuantPlan, node: onnx.NodeProto) -> QuantPlan:
    """Scales so large that every weight is rounded to zero."""
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in prepare(network).graph.initializer}
    peaks = np.abs(stored[node.input[1]]).max(axis=(1, 2, 3))
    scales = tuple(float(np.float32(p * 10)) for p in peaks)
    return plan.changed(weights={node.input[1]: WeightScales(0, scales)})


def with_spoiled_input(plan: QuantPlan, node: onnx.NodeProto) -> QuantPlan:
    """Only a twentieth of the range is kept."""
    name = node.input[0]
    r = plan.activations[name]
    clipped = ActivationRange(r.low / 20, r.high / 20, r.limit / 20)
    return plan.changed(activations={**plan.activations, name: clipped})


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_spoiled_weight_is_the_most_sensitive_and_is_said_to_be_the_weight(
    network, statistics, labelled, target
):
    node = convs(network)[1]
    plan = with_spoiled_weight(network, make_quant_plan(statistics, target=target), node)
    found = quantize_sensitivity(network, plan, labelled)
    worst = found.worst_first()[0]
    assert worst.node == node.name
    assert worst.sqnr_weight_db < worst.sqnr_activation_db - 10
    assert worst.diagnosis.startswith("Its weight costs most")
    assert found.float_value == 100.0
    assert {layer.node for layer in found.layers} | set(found.left_float) >= {
        n.name for n in convs(network)
    }


def test_spoiled_input_is_found_and_said_to_be_clipped(network, statistics, labelled):
    node = convs(network)[1]
    plan = with_spoiled_input(make_quant_plan(statistics, target="tensorrt"), node)
    worst = quantize_sensitivity(network, plan, labelled).worst_first()[0]
    assert worst.node == node.name
    assert worst.sqnr_activation_db < worst.sqnr_weight_db - 10
    assert worst.saturation_pct > 20
    assert "are clipped; try observer minmax" in worst.diagnosis


def test_figures_of_a_layer_equal_those_computed_by_hand(network, statistics, labelled):
    """The plan with every other layer in float is the same graph, written by the writer."""
    plan = make_quant_plan(statistics, target="tensorrt")
    found = {layer.node: layer for layer in quantize_sensitivity(network, plan, labelled).layers}
    nodes = [n.name for n in prepare(network).graph.node if n.op_type in ("Conv", "Gemm")]
    node = convs(network)[3]
    alone = write_qdq(network, plan.keep_float([n for n in nodes if n != node.name], "test"))
    x = np.concatenate([images.numpy() for images, _ in labelled])
    reference, answer = run(network, x), run(alone, x)
    noise = np.square(reference - answer, dtype=np.float64).sum()
    sqnr_db = 10 * np.log10(np.square(reference, dtype=np.float64).sum() / noise)
    assert found[node.name].sqnr_db == pytest.approx(sqnr_db, abs=0.05)
    assert found[node.name].macs == 32 * 8 * 8 * 16 * 9  # 3x3, 16 to 32 channels, 8x8 pixels


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((50.0, 0.0, Seen(0, 4, 2), 4), "Harmless"),
        ((20.0, -9.0, Seen(0, 4, 2), 4), "method rounding, or bias-correction"),
        ((20.0, -9.0, Seen(0, 4, 2), 12), "single weights reach 12.0 times"),
        ((20.0, 5.0, Seen(3.2, 4, 2), 4), "3.2 % of the values are clipped"),
        ((20.0, 5.0, Seen(0, 4, 40), 4), "largest channel reaches 40 times"),
        ((20.0, 5.0, Seen(0, 60, 2), 4), "few values reach 60 times"),
        ((20.0, 5.0, Seen(0, 4, 2), 4), "Both cost alike"),
    ],
)
def test_diagnosis_names_cause_and_remedy(arguments, words):
    assert words in diagnose(*arguments)


def test_table_is_json_and_plot_is_drawn(network, statistics, labelled, tmp_path):
    found = quantize_sensitivity(
        network, make_quant_plan(statistics, target="tensorrt"), labelled[:1]
    )
    assert len(json.loads(json.dumps(found.to_json()))["layers"]) == len(found.layers)
    plot_quantize_sensitivity(found, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("spoil", ["weight", "input"])
def test_budget_gives_back_the_spoiled_layer_and_no_other(
    network, statistics, labelled, tmp_path, spoil
):
    node = convs(network)[2]
    plan = make_quant_plan(statistics, target="tensorrt")
    if spoil == "weight":
        plan = with_spoiled_weight(network, plan, node)
    else:
        plan = with_spoiled_input(plan, node)
    met = meet_budget(network, plan, labelled, max_drop=2.0, folder=tmp_path)
    assert met.met
    assert met.trials[0].float_nodes == ()
    assert met.trials[0].drop > 2
    assert met.best.float_nodes == (node.name,)
    assert met.plan.float_nodes[node.name].startswith("given back to float")
    x = foreign.images(8)
    written = onnx.load(tmp_path / "model.tensorrt.onnx")
    assert np.array_equal(run(written, x), run(write_qdq(network, met.plan), x))
    assert QuantPlan.load(tmp_path / "plan.tensorrt.json") == met.plan


def test_budget_that_is_met_already_costs_one_evaluation(network, statistics, labelled, tmp_path):
    plan = make_quant_plan(statistics, target="onnxruntime")
    met = meet_budget(network, plan, labelled, max_drop=20.0, folder=tmp_path)
    assert met.met
    assert met.best.float_nodes == ()
    assert len(met.trials) == 1
    assert (tmp_path / "model.onnxruntime.onnx").is_file()


def test_budget_that_cannot_be_met_says_so_and_leaves_the_best(
    network, statistics, labelled, tmp_path
):
    node = convs(network)[1]
    plan = with_spoiled_weight(network, make_quant_plan(statistics, target="tensorrt"), node)
    met = meet_budget(network, plan, labelled, max_drop=-1.0, folder=tmp_path)
    assert not met.met
    assert met.best.drop == min(trial.drop for trial in met.trials)
    assert QuantPlan.load(tmp_path / "plan.tensorrt.json") == met.plan


def test_costs_decide_which_of_two_remedies_is_taken(
    network, statistics, labelled, tmp_path, monkeypatch
):
    """Layers that cost nothing in float are preferred to the one that costs all."""
    first, second = convs(network)[1], convs(network)[3]
    plan = make_quant_plan(statistics, target="tensorrt")
    both = {
        **with_spoiled_weight(network, plan, first).weights,
        **with_spoiled_weight(network, plan, second).weights,
    }
    costs = {node.name: 1 for node in convs(network)} | {second.name: 10**9}
    monkeypatch.setattr(accuracy_budget, "layer_macs", lambda _: costs)
    met = meet_budget(network, plan.changed(weights=both), labelled, max_drop=0.0, folder=tmp_path)
    heads = [trial.float_nodes for trial in met.trials if len(trial.float_nodes) == 1]
    assert heads[0] != (second.name,)


def test_killed_search_goes_on_without_repeating_an_evaluation(
    network, statistics, labelled, tmp_path, monkeypatch
):
    node = convs(network)[1]
    plan = with_spoiled_weight(network, make_quant_plan(statistics, target="tensorrt"), node)
    whole = meet_budget(network, plan, labelled, max_drop=2.0, folder=tmp_path / "whole")
    real = _BudgetSearch._value
    evaluations = []

    def dying(search, model):
        evaluations.append(1)
        if len(evaluations) == 3:
            raise KeyboardInterrupt
        return real(search, model)

    monkeypatch.setattr(_BudgetSearch, "_value", dying)
    with pytest.raises(KeyboardInterrupt):
        meet_budget(network, plan, labelled, max_drop=2.0, folder=tmp_path / "killed")
    assert (tmp_path / "killed" / "model.tensorrt.onnx").is_file()  # the best so far
    done = len(evaluations)
    again = meet_budget(network, plan, labelled, max_drop=2.0, folder=tmp_path / "killed")
    assert [t.float_nodes for t in again.trials] == [t.float_nodes for t in whole.trials]
    assert again.best == whole.best
    assert len(evaluations) - done == 1 + len(whole.trials) - 1  # fp32 once more, all but one trial


def test_no_images_and_damaged_journal_are_refused(network, statistics, tmp_path, labelled):
    plan = make_quant_plan(statistics, target="tensorrt")
    with pytest.raises(DataError, match="no images"):
        meet_budget(network, plan, [], max_drop=1.0, folder=tmp_path)
    (tmp_path / "budget.tensorrt.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read as JSON"):
        meet_budget(network, plan, labelled, max_drop=1.0, folder=tmp_path)
