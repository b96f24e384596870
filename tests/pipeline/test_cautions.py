"""What a run says of a training that trains nothing and of an original that knows nothing."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from compress import pipeline
from compress.cli import app
from compress.data import load_data
from compress.models import load_model
from compress.pipeline import cautions
from compress.pipeline.reporting import gates
from compress.recipe.loading import validate_recipe
from compress.recipe.settings import DataSettings, Gates
from compress.report.schema import Result, Variant
from compress.report.text import gate_sentence

NETWORK = {"name": "compress.models.cifar:resnet8", "options": {"in_channels": 1, "width": 4}}
QUICK = {"rounds": 3, "round_ms": 2, "test_images": 64}
TARGETS = [{"runtime": "onnxruntime", "precision": "fp32"}]


def recipe(*stages, **changes):
    content = {
        "name": "doubtful",
        "model": NETWORK,
        "data": {"name": "digits", "calibration": 128},
        "stages": list(stages),
        "targets": TARGETS,
        "measure": QUICK,
    }
    return validate_recipe(content | changes, where="test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a network that tells digits apart, and its run's report."""
    folder = tmp_path_factory.mktemp("trained")
    stage = {"train": {"epochs": 4, "batch_size": 32, "lr": 0.1, "precision": "fp32"}}
    return folder, pipeline.run(recipe(stage), folder)


def test_a_network_without_weights_is_never_called_as_good_as_before(tmp_path):
    report = pipeline.run(recipe({"prune": {"criterion": "l1", "keep_macs": 0.5}}), tmp_path)
    assert "no significant difference in top-1" not in report.verdict
    assert "its accuracy says nothing, because the original is no fair reference" in report.verdict
    assert report.untrained.startswith("9") and "random values" in report.untrained
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "the original network is untrained" in text.replace("\\", "")
    stored = json.loads((tmp_path / "report.json").read_text())
    rows = [row for variant in stored["variants"] for row in variant["results"]]
    assert {row.get("top1_verdict") for row in rows} == {None, "the original is no fair reference"}


def test_a_trained_network_is_not_doubted(trained):
    folder, report = trained
    assert report.untrained is None
    assert [line for line in report.cautions if "busy machine" not in line] == []
    again = recipe({"prune": {"criterion": "l1", "keep_macs": 0.9}}, model={"name": str(folder)})
    assert pipeline.run(again, folder.parent / "again").untrained is None


def test_an_onnx_file_of_an_untrained_network_is_recognised_by_its_predictions(tmp_path):
    from compress.export import export_onnx

    torch.manual_seed(0)
    model = load_model(NETWORK["name"], options=NETWORK["options"])
    path = export_onnx(model, torch.zeros(1, 1, 8, 8), tmp_path / "any.onnx")
    chosen = recipe({"quantize": {"samples": 16, "method": "plain"}}, model={"name": str(path)})
    report = pipeline.run(chosen, tmp_path / "run")
    assert "cannot be told from guessing" in report.untrained
    assert "its accuracy says nothing" in report.verdict
    said = next(line for line in report.cautions if "guessing" in line)
    assert said.startswith("the original network does not beat guessing: its top-1")
    assert "untrained" not in said  # it came with weights: they may be right, and the images wrong


def test_a_new_head_that_nobody_trained_is_found(trained, tmp_path):
    folder, _ = trained
    weights = folder / "00-train" / "model.safetensors"
    model = NETWORK | {"weights": str(weights), "replace_head": True}
    chosen = recipe({"prune": {"criterion": "l1", "keep_macs": 0.9}}, model=model)
    report = pipeline.run(chosen, tmp_path)
    assert "of its parameters are random values" in report.untrained


@pytest.mark.parametrize(
    ("bounds", "passed"),
    [((1.2, 72.0), False), ((2.1, 72.0), True), ((1.4, 2.0), True), (None, True)],
)
def test_a_speed_up_that_the_timing_leaves_open_passes_no_gate(bounds, passed):
    result = Result(
        runtime="a", precision="fp32", device="cpu", batch=1, speedup=50.5, speedup_ci95=bounds
    )
    rows = [Variant(name=name, stage="s", size_mib=1.0, results=(result,)) for name in "ab"]
    (gate,) = gates(Gates(speedup=1.5), rows)
    assert (gate.passed, gate.measured) == (passed, 50.5)
    told = "it may be anything from 1.2..72x: measure again on an idle machine"
    assert gate.reason == (None if passed else told)


def test_gates_on_accuracy_fail_where_the_original_knows_nothing():
    result = Result(
        runtime="a", precision="fp32", device="cpu", batch=1, speedup=2.0, top1_change_pct=0.0
    )
    rows = [Variant(name=name, stage="s", size_mib=1.0, results=(result,)) for name in "ab"]
    limits = Gates(top1_drop_pct=1.0, speedup=1.5, metric_drop=1.0)
    found = {gate.name: gate for gate in gates(limits, rows, "its weights are random")}
    assert {name: gate.passed for name, gate in found.items()} == {
        "metric_drop": False,
        "top1_drop_pct": False,
        "speedup": True,
    }
    assert (
        found["top1_drop_pct"].reason == "the original is no fair reference: its weights are random"
    )


@pytest.mark.parametrize(
    ("value", "chance", "at_chance"), [(52.0, 50.0, True), (71.0, 50.0, False)]
)
def test_the_sentence_names_the_figures(value, chance, at_chance):
    trust = cautions.Trust(
        metric="top-1", value=value, chance=chance, at_chance=at_chance, images=48
    )
    sentence = "its top-1 of 52 % on 48 images cannot be told from guessing (50 %)"
    assert trust.untrained == (sentence if at_chance else None)


def test_a_training_that_taught_nothing_is_not_told_to_begin_with_a_training(tmp_path):
    stage = {"train": {"epochs": 1, "batch_size": 64, "lr": 1e-9, "precision": "fp32"}}
    chosen = recipe(
        stage, {"prune": {"criterion": "l1", "keep_macs": 0.9}}, gates={"metric_drop": 1}
    )
    report = pipeline.run(chosen, tmp_path)
    (said,) = [line for line in report.cautions if "cannot be told from guessing" in line]
    assert said.startswith("the training taught the network nothing that shows: its top-1 of")
    assert "begin with a stage train" not in said
    (gate,) = report.gates
    assert not gate.passed
    assert gate_sentence(gate).startswith("loss of top-1 at most 1 point (pruned on onnxruntime)")


def test_validation_images_help_to_tell_a_network_from_guessing(tmp_path):
    data = {"name": "digits", "calibration": 40, "validation": 0.1}
    chosen = recipe({"prune": {"criterion": "l1", "keep_macs": 0.9}}, data=data)
    pipeline.run(chosen, tmp_path)
    facts = json.loads((tmp_path / "00-original" / "metrics.json").read_text())["facts"]
    assert facts["trust"]["images"] > 40 + 64


def test_an_untrained_segmentation_network_is_found(tmp_path):
    """Its metric is judged as well: masks of other images do as well as the right ones."""
    random = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 4)):
        for kind, shape in (("images", (16, 16, 3)), ("masks", (16, 16))):
            (tmp_path / part / kind).mkdir(parents=True)
            for n in range(count):
                pixels = random.integers(0, 3, shape).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / kind / f"{n}.png")
    chosen = recipe(
        {"prune": {"criterion": "l1", "keep_macs": 0.9, "refit": False}},
        model={"name": "compress.models.cifar:unet", "options": {"width": 4}},
        data={"name": "masks", "root": str(tmp_path), "image_size": 16, "calibration": 8}
        | {"options": {"classes": ["a", "b", "c"]}},
        task="segmentation",
    )
    report = pipeline.run(chosen, tmp_path / "run")
    assert "random values" in report.untrained
    trust = json.loads((tmp_path / "run/00-original/metrics.json").read_text())["facts"]["trust"]
    assert (trust["metric"], trust["at_chance"]) == ("mIoU", True)


def test_few_steps_an_epoch_are_told_with_a_batch_size_that_has_more():
    dataset = load_data(DataSettings(name="digits"))
    images = len(dataset.splits["train"])
    doubtful = recipe(
        {"train": {"epochs": 2, "batch_size": 1024}},
        {"prune": {"keep_macs": 0.5, "round_training": {"batch_size": 1024}}},
    )
    lines = list(cautions.of_training(doubtful, dataset))
    assert [line.split(":")[0] for line in lines] == [
        "stages[0].train",
        "stages[1].prune.round_training",
    ]
    assert f"{images} training images in batches of 1024 are 1 step an epoch" in lines[0]
    proposed = int(lines[0].rpartition(" ")[2].rstrip("."))
    better = recipe({"train": {"epochs": 2, "batch_size": proposed}})
    assert list(cautions.of_training(better, dataset)) == []


def test_of_few_images_more_epochs_are_asked_for_and_no_small_batch():
    dataset = load_data(DataSettings(name="digits")).with_fewer("train", 21)
    (line,) = cautions.of_training(recipe({"train": {"epochs": 3, "batch_size": 8}}), dataset)
    assert "batches of 8 are 2 steps an epoch" in line
    proposed = int(line.removesuffix(".").rpartition("Set more epochs (--epochs): ")[2])
    better = recipe({"train": {"epochs": proposed, "batch_size": 8}})
    assert list(cautions.of_training(better, dataset)) == []


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["train", "a.b:c"], ["stages", 0, "train"]),
        (["prune", "a.b:c", "--epochs", "1"], ["stages", 1, "finetune"]),
        (["distill", "a.b:c", "--teacher", "d.e:f"], ["stages", 0, "distill"]),
        (["quantize", "a.b:c", "--qat-epochs", "1"], ["stages", 0, "quantize", "qat"]),
    ],
)
def test_batch_size_reaches_training(monkeypatch, arguments, place):
    seen = []
    monkeypatch.setattr(pipeline, "run", lambda recipe, *_, **__: seen.append(recipe))
    options = ["--data", "digits", "--batch-size", "16"]
    monkeypatch.setattr("sys.argv", ["compress", *arguments, *options])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 0
    part = seen[0].model_dump()
    for key in place:
        part = part[key]
    assert part["batch_size"] == 16
    assert seen[0].data.batch_size == 16


def test_the_command_line_warns_before_the_first_stage(monkeypatch, capsys, tmp_path):
    path = tmp_path / "few.yaml"
    content = recipe({"train": {"epochs": 1, "batch_size": 1500}})
    path.write_text(yaml.safe_dump(content.model_dump(mode="json", exclude_unset=True)))
    monkeypatch.setattr("sys.argv", ["compress", "run", str(path), "--out", str(tmp_path / "r")])
    with pytest.raises(SystemExit):
        app.main()
    error = capsys.readouterr().err
    assert error.splitlines()[1].startswith("compress: warning: stages[0].train: ")


def timed(name, *results):
    rows = [
        Result(
            runtime=runtime, precision=precision, device="cpu", batch=1, threads=1,
            latency_ms_p50=milliseconds, speedup=speedup, verdict=verdict or None,
        )
        for runtime, precision, milliseconds, speedup, verdict in results
    ]  # fmt: skip
    return Variant(name=name, stage="s", results=tuple(rows))


def test_what_is_slower_is_said_to_be_so_and_the_fastest_is_named():
    rows = (
        timed("original", ("onnxruntime", "fp32", 10.0, 1.0, ""), ("openvino", "fp32", 9, 1.0, "")),
        timed("int8-onnxruntime", ("onnxruntime", "int8", 16.0, 0.625, "slower")),
        timed("int8-openvino", ("openvino", "int8", 4.0, 2.25, "faster")),
    )  # fmt: skip
    (line,) = cautions.of_slower(rows)
    assert line.startswith("int8-onnxruntime is 1.60x slower than the original on onnxruntime")
    assert line.endswith("int8-openvino on openvino is fastest (4.00 ms)")
    same = timed("int8-onnxruntime", ("onnxruntime", "int8", 10.1, 0.99, "no difference"))
    assert not list(cautions.of_slower((rows[0], same)))
    cut = timed("pruned", ("onnxruntime", "fp32", 17.5, 0.571, "slower"))
    (line,) = cautions.of_slower((rows[0], cut))
    assert line.startswith("pruned is 1.75x slower than the original on onnxruntime")


@pytest.mark.parametrize(
    ("round_to", "advised"), [(1, True), (4, True), (8, False), ("auto", False)]
)
def test_a_cut_that_made_a_network_slower_is_told_the_widths_that_kernels_are_made_for(
    round_to, advised
):
    original = timed("original", ("onnxruntime", "fp32", 10.0, 1.0, ""))
    cut = timed("pruned", ("onnxruntime", "fp32", 17.5, 0.571, "slower"))
    rows = [one.model_copy(update={"macs": n}) for one, n in ((original, 100), (cut, 60))]
    (line,) = cautions.of_slower(rows, round_to)
    assert line.endswith("multiples of 8: prune with round_to: auto (--round-to)") == advised
    (line,) = cautions.of_slower([rows[0], rows[1].model_copy(update={"macs": 100})], round_to)
    assert "round_to" not in line


def judged(name, parent, stage, **measured):
    result = Result(
        runtime="onnxruntime", precision="fp32", device="cpu", batch=1, threads=1, **measured
    )
    return Variant(name=name, parent=parent, stage=stage, results=(result,))


def of_images(top1_pct, half_pct):
    return {"top1_pct": top1_pct, "top1_ci95": (top1_pct - half_pct, top1_pct + half_pct)}


def of_outputs(sqnr_db):
    return {"outputs": {"picture": {"sqnr_db": sqnr_db}}}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (of_images(90.8, 0.5), of_images(87.0, 0.6), "top-1 87.0 % against 90.8 on onnxruntime"),
        (of_images(90.8, 0.5), of_images(90.3, 0.6), None),  # within the intervals
        (of_images(80.0, 0.5), of_images(90.3, 0.6), None),
        (of_outputs(20.8), of_outputs(15.9), "SQNR 15.9 dB against 20.8 on onnxruntime"),
        (of_outputs(20.8), of_outputs(20.1), None),
        (of_outputs(20.8), of_images(90.3, 0.6), None),  # of another kind
    ],
)
def test_a_training_that_made_it_worse_is_said_to_have_done_so(before, after, said):
    rows = [
        judged("original", None, "00-original", **of_images(99.0, 0.1)),
        judged("pruned", "original", "01-prune", **before),
        judged("distilled", "pruned", "02-distill", **after),
    ]
    lines = list(cautions.of_trained(rows))
    assert len(lines) == (said is not None)
    for line in lines:
        assert line.startswith("distilled answers worse than pruned, which it was trained from")
        assert said in line and line.endswith("or leave distill out")
    assert not list(cautions.of_trained(rows[:2])), "a cut is no training"


def test_what_a_training_noted_is_told():
    facts = {"training": {"notes": ["every epoch left the network worse than it came"]}}
    assert list(cautions.of_stage(facts)) == facts["training"]["notes"]


def test_a_metric_of_which_less_is_better_is_worse_where_it_rises():
    def of_error(value):
        metric = {"value": value, "unit": "px", "ci95": (value - 0.1, value + 0.1)}
        metric["higher_is_better"] = False
        return {"metrics": {"error": metric}, "primary": "error"}

    rows = [
        judged("pruned", "original", "01-prune", **of_error(2.0)),
        judged("finetuned", "pruned", "02-finetune", **of_error(3.0)),
    ]
    (line,) = cautions.of_trained(rows)
    assert "error 3.00 px against 2.00" in line
    better = judged("finetuned", "pruned", "02-finetune", **of_error(1.0))
    assert not list(cautions.of_trained([rows[0], better]))


def test_int8_that_answers_far_from_the_original_is_said_to_do_so():
    def variant(name, precision, **each_db):
        outputs = {key: {"sqnr_db": value} for key, value in each_db.items()}
        result = Result(
            runtime="openvino", precision=precision, device="cpu", batch=1, threads=1,
            outputs=outputs,
        )  # fmt: skip
        return Variant(name=name, stage="s", results=(result,))

    rows = [
        variant("pruned", "fp32", boxes=9.0),
        variant("int8-fine", "int8", boxes=31.0, scores=12.0),
        variant("int8-far", "int8", boxes=31.0, scores=5.4),
    ]
    (line,) = cautions.of_noise(rows)
    assert line.startswith("int8-far answers far from the original: its worst output has 5.4 dB")
    assert "leave layers in float" in line
    rows[0] = variant("pruned", "fp32", boxes=6.0)  # as far before anything was int8
    (line,) = cautions.of_noise(rows)
    assert "pruned has 6.0 dB in float: keep more" in line and "exclude" not in line
