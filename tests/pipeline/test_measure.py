"""What is measured on every target: precisions, and the sizes of what runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from onnx import TensorProto, load

from compress import pipeline
from compress.pipeline.measure import Measured, int8_coverage, places
from compress.recipe.loading import validate_recipe
from compress.recipe.settings import Target
from compress.report.schema import Report
from compress.runtimes._fusion import FloatLayer, Fusion

RECIPE = {
    "name": "halves",
    "model": {"name": "compress.models.cifar:resnet8", "options": {"in_channels": 1, "width": 4}},
    "data": {"name": "digits", "calibration": 32},
    "targets": [
        {"runtime": "onnxruntime", "precision": "fp16"},
        {"runtime": "openvino", "precision": "fp16"},
        {"runtime": "pytorch", "precision": "fp16"},
    ],
    "gates": {"size_ratio": 1.5},
    "measure": {"rounds": 3, "round_ms": 5, "test_images": 64},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A network that only becomes half as precise: no stage, three fp16 targets."""
    folder = tmp_path_factory.mktemp("runs") / "halves"
    return folder, pipeline.run(validate_recipe(RECIPE, where="test"), folder)


def test_an_fp16_target_of_the_original_alone_is_measured_in_fp16(
    run: tuple[Path, Report],
) -> None:
    _, report = run
    found = [(result.runtime, result.precision) for result in report.variants[0].results]
    assert found == [
        (runtime, precision)
        for runtime in ("onnxruntime", "openvino", "pytorch")
        for precision in ("fp32", "fp16")
    ]
    halves = [result for result in report.variants[0].results if result.precision == "fp16"]
    assert all(result.speedup and result.verdict != "reference" for result in halves)
    assert all(result.sqnr_db and 20 < result.sqnr_db < 90 for result in halves)  # it is fp16


def test_sizes_are_those_of_the_files_that_runtimes_open(run: tuple[Path, Report]) -> None:
    folder, report = run
    stage = folder / report.variants[0].stage
    sizes = {(r.runtime, r.precision): r.size_mib for r in report.variants[0].results}
    opened = {
        ("onnxruntime", "fp32"): ["model.onnx"],
        ("onnxruntime", "fp16"): ["model.fp16.onnxruntime-b1.onnx"],
        ("openvino", "fp32"): ["model.openvino-b1.xml", "model.openvino-b1.bin"],
        ("openvino", "fp16"): ["model.fp16.openvino-b1.xml", "model.fp16.openvino-b1.bin"],
        ("pytorch", "fp32"): ["model.safetensors"],
        ("pytorch", "fp16"): ["model.safetensors"],
    }
    for place, names in opened.items():
        size = sum((stage / name).stat().st_size for name in names)
        assert sizes[place] == pytest.approx(size / 2**20), place
    half = load(stage / "model.fp16.onnxruntime-b1.onnx")
    assert any(each.data_type == TensorProto.FLOAT16 for each in half.graph.initializer)


def test_gates_judge_the_half_of_the_original_by_what_runs(run: tuple[Path, Report]) -> None:
    _, report = run
    sizes = {(r.runtime, r.precision): r.size_mib for r in report.variants[0].results}
    for gate in report.gates:
        ratio = sizes[gate.runtime, "fp32"] / sizes[gate.runtime, "fp16"]
        assert gate.measured == pytest.approx(ratio)
        assert gate.passed == (ratio >= 1.5)
    assert [gate.runtime for gate in report.gates] == ["onnxruntime", "openvino", "pytorch"]


def test_the_report_names_the_precision_of_every_row(run: tuple[Path, Report]) -> None:
    folder, _ = run
    text = (folder / "report.md").read_text()
    for runtime in ("onnxruntime", "openvino", "pytorch"):
        for precision in ("fp32", "fp16"):
            assert f"| original | {runtime} {precision}" in text
    content = json.loads((folder / "report.json").read_text())
    assert "in fp16" in content["verdict"]


def test_targets_of_one_place_are_timed_side_by_side() -> None:
    targets = [
        Target(runtime="onnxruntime", precision=precision, batch=batch)
        for precision in ("int8", "fp16", "fp32")
        for batch in (1, 8)
    ]
    found = [[(t.precision, t.batch) for t in place] for place in places(targets)]
    assert found == [
        [("int8", 1), ("fp16", 1), ("fp32", 1)],
        [("int8", 8), ("fp16", 8), ("fp32", 8)],
    ]


def test_coverage_names_islands_and_float_layers_once():
    fusion = Fusion(
        runtime="onnxruntime",
        macs=1000,
        int8_macs=900,
        float_layers=(
            FloatLayer("conv", "Conv", 80, "fp32", "no int8 kernel"),
            FloatLayer("fc", "Gemm", 20, "fp32", "a float bias"),
        ),
        islands=(("conv", "relu"),),
        reformats=("cast",),
    )
    found = int8_coverage(fusion, "int8")
    assert found.int8_macs_pct == pytest.approx(90)
    assert [(part.nodes, part.macs) for part in found.islands] == [
        (("conv", "relu"), 80),
        (("fc",), 20),
    ]
    assert found.islands[1].reason == "a float bias"


def test_measurements_of_earlier_versions_are_read():
    """They had every number of memory beside the others."""
    place = {"runtime": "onnxruntime", "precision": "fp32", "device": "cpu", "batch": 1}
    memory = {"weights_mib": 1.5, "peak_rss_mib": 9.0, "peak_memory_mib": 3.0}
    rows = {"original": [place | memory | {"skipped": {}}]}
    record = {"results": rows, "skipped": {}, "conditions": {}, "coverage": []}
    (result,) = Measured.model_validate(record).results["original"]
    assert result.memory_mib == {"weights": 1.5, "peak_rss": 9.0}
    assert result.peak_memory_mib == 3.0
    again = Measured.model_validate(Measured.model_validate(record).model_dump(mode="json"))
    assert again.results["original"] == (result,)
