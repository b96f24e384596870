"""Run folders read back, and several runs in one comparison."""

from __future__ import annotations

import io
import json
from pathlib import Path

import made_up
import pytest
from rich.console import Console

from compress.artifact import sha256
from compress.errors import RunError
from compress.report import Report, compare_runs, read_run, write
from compress.report.html import html
from compress.report.runs import histories, incomparable, named_reports, regressions
from compress.report.schema import ArtifactRecord, DataRecord, Details, Variant


def with_files(folder: Path, **changes) -> Report:
    """A finished run whose two artifacts are really there."""
    records = []
    for name in ("00-train/model.onnx", "01-prune/model.onnx"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
        records.append(ArtifactRecord(path=name, sha256=sha256(path), stage=name[:8]))
    report = made_up.report(3)
    variants = tuple(v.model_copy(update={"artifact": None}) for v in report.variants)
    details = report.details.model_copy(update={"artifacts": tuple(records)})
    return write(
        report.model_copy(update={"variants": variants, "details": details} | changes), folder
    )


def moved(
    report: Report, *, name="run", created="2026-11-20", slower=1.0, machine=1.0, **provenance
) -> Report:
    """The same run at another time: a slower network, a slower machine, other provenance."""
    facts = report.provenance.model_copy(update={"created": created} | provenance)
    variants = tuple(
        variant.model_copy(
            update={
                "results": tuple(
                    result.model_copy(
                        update={
                            "latency_ms_p50": result.latency_ms_p50 * slower * machine,
                            "latency_ms_p50_ci95": tuple(
                                end * slower * machine for end in result.latency_ms_p50_ci95
                            ),
                            "speedup": result.speedup and result.speedup / slower,
                            "speedup_ci95": result.speedup_ci95
                            and tuple(end / slower for end in result.speedup_ci95),
                        }
                    )
                    for result in variant.results
                )
            }
        )
        for variant in report.variants
    )
    return report.model_copy(update={"name": name, "provenance": facts, "variants": variants})


def text_of(renderable) -> str:
    file = io.StringIO()
    Console(file=file, width=200).print(renderable)
    return file.getvalue()


def test_a_finished_run_reads_back_whole(tmp_path):
    written = with_files(tmp_path)
    assert read_run(tmp_path) == written
    assert written.incomplete == ()


def test_a_changed_file_is_named_with_both_hashes(tmp_path):
    written = with_files(tmp_path)
    (tmp_path / "01-prune/model.onnx").write_bytes(b"other")
    (tmp_path / "00-train/model.onnx").unlink()
    first, second = read_run(tmp_path).incomplete
    assert first == "files are missing: 00-train/model.onnx"
    assert second == (
        f"01-prune/model.onnx: changed; expected SHA-256 {written.details.artifacts[1].sha256}, "
        f"found {sha256(tmp_path / '01-prune/model.onnx')}; the figures are not about this file"
    )


def test_a_recorded_path_outside_the_folder_is_not_followed(tmp_path):
    record = ArtifactRecord(path="../secret", sha256="0" * 64, stage="x")
    (tmp_path / "secret").write_text("x")
    write(Report(details=Details(artifacts=(record,))), tmp_path / "run")
    (line,) = read_run(tmp_path / "run").incomplete
    assert line.startswith("../secret: outside the run folder; expected a path inside it")
    assert "found" not in line  # not even its hash


def test_a_half_finished_run_tells_what_is_there_and_what_is_missing(tmp_path):
    stage = tmp_path / "00-train"
    stage.mkdir()
    (stage / "model.onnx").write_bytes(bytes(2**20))
    entry = {"name": "original", "path": "00-train/model.onnx", "stage": "00-train", "params": 7}
    (stage / "metrics.json").write_text(json.dumps({"variants": [entry], "facts": {}}))
    (tmp_path / "01-prune").mkdir()
    run = {"schema": 1, "recipe": {"name": "quick", "seed": 3}, "artifacts": []}
    (tmp_path / "run.json").write_text(json.dumps(run))
    report = read_run(tmp_path)
    assert report.name == "quick"
    assert report.variants[0].params == 7
    assert report.variants[0].size_mib == 1.0
    assert report.verdict.startswith("Not finished: the run was stopped before it was measured")
    assert report.incomplete == (
        "the run is not finished; finished stages: 00-train",
        "begun and not finished: 01-prune; the same command goes on there",
    )
    write(report, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "begun and not finished: 01-prune" in page
    write(report, tmp_path)  # what compress report does; then the run goes on a little
    (tmp_path / "01-prune/metrics.json").write_text(json.dumps({"variants": [], "facts": {}}))
    assert read_run(tmp_path).incomplete == (
        "the run is not finished; finished stages: 00-train, 01-prune",
    )


def test_the_learning_curve_of_a_stage_that_was_stopped_is_shown_up_to_there(tmp_path):
    training = tmp_path / "00-train" / "training"
    training.mkdir(parents=True)
    rows = [{"epoch": 0.5, "loss": 2.0}, {"epoch": 1.0, "loss": 1.0, "validation_top1_pct": 50.0}]
    lines = [json.dumps(row) for row in rows]
    (training / "metrics.jsonl").write_text("\n".join([*lines, '{"epoch": 1.5, "lo']))
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "recipe": {}, "artifacts": []}))
    report = read_run(tmp_path)
    (curve,) = report.details.learning  # one point is no curve
    assert curve.title == "Training loss, 00-train"
    assert curve.lines[0].x == (0.5, 1.0)
    assert curve.lines[0].y == (2.0, 1.0)
    page = html(report)
    assert "Training loss, 00-train" in page
    assert "<h3>Accuracy</h3>" not in page  # no table without rows


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "this folder is no run"),
        ({"report.json": "{"}, "cannot be read as JSON"),
        ({"report.json": "{}"}, "has no schema number"),
        ({"report.json": '{"schema": 2}'}, "schema 2, by a newer version.*Update compress"),
        ({"report.json": '{"schema": 1, "variants": [{}]}'}, r"variants\.0\.name: Field required"),
        ({"run.json": '{"schema": 9}'}, "schema 9, by a newer version"),
        ({"run.json": '{"schema": 9}', "report.json": '{"schema": 1}'}, "schema 9, by a newer"),
        ({"run.json": '{"schema": 1}'}, "does not describe a run"),
    ],
)
def test_a_folder_that_is_no_run_is_one_clear_error(tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(RunError, match=words) as error:
        read_run(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_an_absent_folder_is_an_error(tmp_path):
    with pytest.raises(RunError, match="no such folder"):
        read_run(tmp_path / "x")


def test_runs_get_names_of_their_own_in_order_of_time():
    report = made_up.report()
    later, earlier = moved(report, created="2026-02"), moved(report, created="2026-01")
    runs = named_reports([(Path("b"), later), (Path("a"), earlier)])
    assert [run.name for run in runs] == ["a", "b"]
    twins = named_reports([(Path("x/a"), later), (Path("y/a"), earlier)])
    assert [run.name for run in twins] == ["a (1)", "a (2)"]


def test_other_data_devices_or_classes_are_not_comparable():
    report = made_up.report()
    data = DataRecord(name="cifar10", fingerprint="sha256:other")
    cpu = report.provenance.device | {"cpu": "Another"}
    others = {
        "different data": moved(report, name="b", data=data),
        "different devices (cpu: Intel": moved(report, name="b", device=cpu),
        "data of at least one is not recorded": moved(report, name="b", data=None),
        "different classes": moved(made_up.report(classes=11), name="b"),
    }
    assert incomparable([report, moved(report, name="b")]) == []
    for words, other in others.items():
        (line,) = incomparable([report, other])
        assert words in line


def test_a_reading_that_varies_makes_no_other_device():
    report = made_up.report()
    warm = report.provenance.device | {"temperature": {"min": 1.0, "mean": 2.0, "max": 3.0}}
    cold = report.provenance.device | {"temperature": {"min": 0.0, "mean": 1.0, "max": 2.0}}
    assert incomparable([moved(report, device=warm), moved(report, device=cold)]) == []


def test_what_is_not_comparable_is_refused_unless_forced_and_then_marked(tmp_path):
    report = made_up.report()
    other = moved(report, name="b", device={"cpu": "Another"})
    write(report, tmp_path / "a")
    write(other, tmp_path / "b")
    folders = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(RunError, match=r"cannot be compared: .*different devices.*--force"):
        compare_runs(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    text = text_of(compare_runs(folders, tmp_path / "out", force=True))
    assert "! not comparable" in text
    assert json.loads((tmp_path / "out/report.json").read_text())["comparable"] is False
    assert "not comparable" in (tmp_path / "out/report.md").read_text()
    assert "Not comparable:" in (tmp_path / "out/report.html").read_text()


def test_a_slower_run_of_one_recipe_is_marked_as_a_regression(tmp_path):
    report = made_up.report()
    runs = [
        moved(report, name="first", created="2026-01"),
        moved(report, name="same", created="2026-02", slower=1.02),
        moved(report, name="another day", created="2026-03", slower=1.02, machine=3.0),
        moved(report, name="slow", created="2026-04", slower=1.3, machine=0.5),
    ]
    lines = regressions(histories(runs))
    assert lines == [
        "slow: Speed-up on onnxruntime cpu, 2 threads, batch 1 is worse than before (3.01x)",
        "slow: Speed-up on openvino cpu, 2 threads, batch 1 is worse than before (1.32x)",
    ]


def test_a_speed_up_that_fell_within_the_resolution_of_the_bench_is_no_regression():
    report = made_up.report()

    def run(name: str, low: float, high: float) -> Report:
        variants = tuple(
            v.model_copy(
                update={
                    "results": tuple(
                        r.model_copy(update={"speedup_ci95": (low, high)}) for r in v.results
                    )
                }
            )
            for v in report.variants
        )
        return moved(report, name=name, created=name).model_copy(update={"variants": variants})

    assert regressions(histories([run("1", 2.00, 2.02), run("2", 1.97, 1.99)])) == []
    assert regressions(histories([run("1", 2.00, 2.02), run("2", 1.90, 1.95)])) != []


def test_runs_of_different_recipes_have_no_common_history():
    report = made_up.report()
    other = moved(report, name="b").model_copy(update={"recipe": {"stages": []}})
    assert histories([report, other]) == []


def test_a_worse_accuracy_and_a_larger_file_are_regressions():
    report = made_up.report()
    last = report.variants[-1]
    bad = tuple(
        r.model_copy(update={"top1_pct": 80.0, "top1_ci95": (79.0, 81.0)}) for r in last.results
    )
    worse = last.model_copy(update={"results": bad, "size_mib": last.size_mib * 1.5})
    later = moved(report, name="later", created="2026-12").model_copy(
        update={"variants": (*report.variants[:-1], worse)}
    )
    lines = regressions(histories([moved(report, name="first", created="2026-01"), later]))
    assert len(lines) == 2
    assert "Top-1" in lines[0]
    assert "File" in lines[1]


def test_a_comparison_holds_every_variant_of_every_run(tmp_path):
    report = made_up.report()
    for name in ("a", "b"):
        write(moved(report, name=name), tmp_path / name)
    compare_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    content = json.loads((tmp_path / "out/report.json").read_text())
    assert [run["name"] for run in content["runs"]] == ["a", "b"]
    assert content["comparable"] is True
    page = (tmp_path / "out/report.html").read_text()
    assert page.count('<th scope="row">a</th>') == page.count('<th scope="row">b</th>') > 0


def test_a_run_without_figures_can_be_compared(tmp_path):
    report = made_up.report()
    bare = report.model_copy(update={"variants": (Variant(name="original", stage="train"),)})
    write(report, tmp_path / "a")
    write(bare, tmp_path / "b")
    compare_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert "Only the original" in (tmp_path / "out/report.md").read_text()


def judged_by(report: Report, name: str, *, higher: bool = True, plus: float = 0.0) -> Report:
    """The same run of a task with metrics of its own, in decibels."""

    def told(result, value: float):
        metric = {"value": value, "unit": "db", "ci95": (value - 0.5, value + 0.5),
                  "higher_is_better": higher}  # fmt: skip
        changed = result.model_copy(update=dict.fromkeys(("top1_pct", "top1_ci95")))
        return type(result).model_validate(
            changed.model_dump() | {"metrics": {name: metric}, "primary": name}
        )

    variants = tuple(
        variant.model_copy(update={"results": tuple(told(r, 30.0 + plus) for r in variant.results)})
        for variant in report.variants
    )
    return report.model_copy(update={"variants": variants})


@pytest.mark.parametrize(("higher", "plus"), [(True, -2.0), (False, 2.0)])
def test_a_history_speaks_of_the_metric_of_the_task(higher, plus):
    first = judged_by(moved(made_up.report(3), name="a", created="2026-01"), "psnr", higher=higher)
    run = moved(made_up.report(3), name="b", created="2026-02")
    worse = judged_by(run, "psnr", higher=higher, plus=plus)
    better = judged_by(run, "psnr", higher=higher, plus=-plus)
    tables = histories([first, worse])
    assert tables
    for table in tables:
        (column,) = (c for c in table.columns if c.name in {"Psnr", "Top-1"})
        assert (column.name, column.unit) == ("Psnr", "db")
        cells = [row[table.columns.index(column)] for row in table.rows]
        assert [cell.sort for cell in cells] == [30.0, 30.0 + plus]
    assert all("Psnr on" in line for line in regressions(tables)) and regressions(tables)
    assert regressions(histories([first, better])) == []


def test_runs_judged_by_different_metrics_are_not_comparable():
    one, two = (moved(made_up.report(3), name=name) for name in "ab")
    assert incomparable([one, two]) == []
    assert incomparable([one, judged_by(two, "psnr")]) == [
        "a and b were judged by different metrics (top-1, psnr)"
    ]
