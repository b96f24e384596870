"""Schema, verdict, figures, Markdown and the terminal: the report without a browser."""

import io
import json

import made_up
import pytest
from pydantic import ValidationError
from rich.console import Console

from compress.measure import METHODS
from compress.pipeline.reporting import gates
from compress.recipe.settings import Gates
from compress.report import Report, summary, verdict, write
from compress.report.html import html
from compress.report.numbers import (
    count,
    fact,
    factor,
    factor_within,
    in_words,
    interval,
    number,
    percent,
    points,
    ratio_db,
    reason,
)
from compress.report.schema import Details, Flip, Gate, Line, Result, Variant
from compress.report.tables import speeds
from compress.report.text import escaped_line, gate_sentence, markdown, missing
from compress.report.verdict import verdicts

OTHER = {"runtime": "onnxruntime", "precision": "fp32", "device": "cpu", "batch": 1}


def pair(report_gates=(), **after) -> Report:
    """An original of 10 ms, 90 % and 8 MiB, and a variant whose figures are given."""
    before = Result(**OTHER, latency_ms_p50=10.0, top1_pct=90.0)
    small = Result(**OTHER, **after)
    return Report(
        variants=(
            Variant(name="original", stage="train", size_mib=8.0, results=(before,)),
            Variant(name="small", stage="prune", size_mib=2.0, results=(small,)),
        ),
        gates=report_gates,
    )


def rendered(report: Report, width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(summary(report, "runs/x"))
    return file.getvalue()


def test_no_top_1_of_a_network_that_tells_no_classes_and_was_not_measured():
    report = Report(variants=(Variant(name="original", stage="train"),))
    assert "top-1" in rendered(report)
    detects = report.details.model_copy(update={"tells_classes": False})
    text = rendered(report.model_copy(update={"details": detects}))
    assert "accuracy" in text and "top-1" not in text


def test_written_report_reads_back_as_the_same_report(tmp_path):
    written = write(made_up.report(), tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert Report.model_validate(content) == written
    assert content["schema"] == 1
    assert {"recipe", "provenance", "variants", "gates", "verdict"} <= set(content)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "report.html"}


def test_what_was_not_measured_is_absent_and_not_null():
    content = Report(variants=(Variant(name="a", stage="s", results=(Result(**OTHER),)),)).to_json()
    result = content["variants"][0]["results"][0]
    assert result == {**OTHER, "memory_mib": {}, "energy_mj_per_image": {}, "skipped": {}}
    assert "params" not in content["variants"][0]


def test_keys_of_newer_versions_survive():
    content = made_up.report().to_json()
    content["variants"][0]["results"][0]["energy_mj_p50"] = 3.5
    again = Report.model_validate(content).to_json()
    assert again["variants"][0]["results"][0]["energy_mj_p50"] == 3.5


def test_infinite_numbers_are_refused():
    with pytest.raises(ValidationError, match="finite number"):
        Result(**OTHER, latency_ms_p50=float("nan"))


def test_a_picture_that_would_be_fetched_is_refused():
    with pytest.raises(ValidationError, match="PNG as data URI"):
        Flip(index=0, label=0, before=0, after=1, thumbnail="https://example.com/x.png")
    with pytest.raises(ValidationError, match="pattern"):
        Flip(index=0, label=0, before=0, after=1, thumbnail='data:image/png;base64,"onload=')


def test_lines_have_as_many_x_as_y():
    with pytest.raises(ValidationError, match=r"line 'a' has 2 x and 1 y"):
        Line(name="a", x=(1, 2), y=(1,))


def test_verdict_tells_gain_loss_intervals_and_place():
    report = pair(
        latency_ms_p50=2.56, speedup=3.9, speedup_ci95=(3.7, 4.1), top1_pct=88.0,
        top1_change_pct=-2.0, top1_change_ci95=(-2.5, -1.5),
    )  # fmt: skip
    assert verdict(report) == (
        "3.90x faster and 4.00x smaller at −2.00 points of top-1 (95 % CI −2.50..−1.50) "
        "on onnxruntime cpu, batch 1."
    )


def test_verdict_says_no_significant_difference_where_the_intervals_do():
    report = pair(
        latency_ms_p50=9.9, speedup=1.01, speedup_ci95=(0.97, 1.05), top1_pct=89.8,
        top1_change_pct=-0.2, top1_change_ci95=(-0.5, 0.1),
    )  # fmt: skip
    assert verdict(report) == (
        "No significant difference in speed (1.01x, 95 % CI 0.970..1.05) and 4.00x smaller "
        "with no significant difference in top-1 (−0.20 points, 95 % CI −0.50..+0.10) "
        "on onnxruntime cpu, batch 1."
    )


def test_verdict_of_few_images_says_what_they_cannot_rule_out():
    """A loss of 4.6 points on 153 images is not called no difference."""
    report = pair(top1_change_pct=-4.6, top1_change_ci95=(-9.8, 0.5), top1_p_value=0.12, images=153)
    said = verdict(report)
    assert "no significant difference in top-1" not in said
    assert (
        "at −4.60 points of top-1, where 153 images cannot rule out a loss of 9.8 points "
        "(95 % CI −9.80..+0.50)"
    ) in said


def test_mcnemar_decides_over_the_interval_of_the_change():
    report = pair(top1_change_pct=-0.2, top1_change_ci95=(-0.4, 0.0), top1_p_value=0.03)
    assert "at −0.20 points of top-1" in verdict(report)


def test_verdict_of_a_slower_variant_names_the_fastest_within_the_accuracy_gate():
    gate = Gate(name="top1_drop_pct", limit=1.0, measured=0.1, passed=True)
    report = pair((gate,), latency_ms_p50=12.0, speedup=0.833, top1_change_pct=-0.1)
    assert verdict(report).startswith("1.20x slower and 4.00x smaller at −0.10 points")
    assert verdict(report).endswith(
        "; the fastest variant that loses at most 1 point is original (10.0 ms)."
    )


@pytest.mark.parametrize(
    ("small", "smaller", "busy", "is_told"),
    [(5.0, 5.02, None, False), (5.0, 5.6, None, True), (5.0, 5.2, "others", False),
     (5.0, 5.6, "others", True)],
)  # fmt: skip
def test_a_variant_is_called_the_fastest_where_it_can_be_told(small, smaller, busy, is_told):
    report = pair(latency_ms_p50=small, latency_ms_p50_ci95=(small - 0.01, small + 0.01))
    last = Result(**OTHER, latency_ms_p50=smaller, busy=busy, speedup=10.0 / smaller,
                  latency_ms_p50_ci95=(smaller - 0.01, smaller + 0.01))  # fmt: skip
    last = Variant(name="smaller", stage="distill", results=(last,))
    report = report.model_copy(update={"variants": (*report.variants, last)})
    assert ("the fastest variant is small (5.00 ms)" in verdict(report)) == is_told


def test_an_interval_without_1_that_the_machine_cannot_tell_is_no_contradiction():
    report = pair(latency_ms_p50=10.2, speedup=0.98, speedup_ci95=(0.97, 0.99),
                  verdict="no difference", busy="others")  # fmt: skip
    assert verdict(report).startswith(
        "No difference in speed that this machine can tell (0.980x, 95 % CI 0.970..0.990)"
    )


@pytest.mark.parametrize(
    ("speedup", "bounds", "told", "shown"),
    [
        (50.5, (1.2, 72.4), "1.2..72x faster", "1.2..72x"),  # calls of 2 ms and of 110 ms
        (0.2, (0.1, 0.5), "2.0..10x slower", "0.10..0.50x"),
        (3.9, (3.2, 4.7), "3.90x faster", "3.90x"),
    ],
)
def test_a_speed_up_that_no_one_number_tells_is_its_interval(speedup, bounds, told, shown):
    report = pair(latency_ms_p50=10 / speedup, speedup=speedup, speedup_ci95=bounds)
    assert verdict(report).startswith(told)
    assert shown in rendered(report).split()


@pytest.mark.parametrize("slower", [False, True])
def test_a_speed_up_that_no_one_number_tells_is_its_interval_in_every_format(slower):
    value, bounds = (0.42, (0.41, 4.3)) if slower else (50.5, (1.2, 72.4))
    told = "0.41..4.3x" if slower else "1.2..72x"
    report = pair(latency_ms_p50=10 / value, speedup=value, speedup_ci95=bounds)
    speed = speeds(report)
    name = [column.name for column in speed.columns].index("Speed-up")
    assert (speed.rows[-1][name].text, speed.rows[-1][name].bounds) == (told, "")
    for page in (markdown(report), html(report), verdict(report)):
        assert told in page and number(value) + "x" not in page
    assert factor_within(value, bounds) == told
    assert factor_within(3.9, (3.2, 4.7)) == "3.90x (3.20..4.70)"


def test_every_negative_number_has_the_same_minus_sign():
    assert (number(-2.5), points(-2.5), percent(-2.5)) == ("−2.50", "−2.50", "−2.50")
    assert interval((-1.0, 2.0), "percent") == "−1.00..2.00"
    assert ratio_db({"sqnr_db": -3.0}) == "−3.0"


def test_a_gain_that_is_asked_for_is_no_loss_of_the_original():
    gate = Gate(name="top1_drop_pct", limit=-1.0, measured=0.1, passed=False)
    report = pair((gate,), latency_ms_p50=12.0, speedup=0.833, top1_change_pct=-0.1)
    assert "the fastest" not in verdict(report)
    assert "at most −1 points" in gate_sentence(gate)


def test_a_faster_variant_beyond_the_accuracy_gate_is_not_recommended():
    gate = Gate(name="top1_drop_pct", limit=1.0, measured=5.0, passed=False)
    report = pair((gate,), latency_ms_p50=2.0, speedup=5.0, top1_change_pct=-5.0)
    assert "the fastest variant that loses at most 1 point is original" in verdict(report)


def test_a_faster_variant_that_missed_its_budget_on_validation_images_is_not_recommended():
    gate = Gate(name="max_drop_pct", limit=1.0, measured=5.0, passed=False, variant="small")
    report = pair((gate,), latency_ms_p50=2.0, speedup=5.0, top1_change_pct=-0.5)
    assert "the fastest variant that loses at most 1 point is original" in verdict(report)
    assert gate_sentence(gate) == (
        "loss of top-1 on validation images at most 1 point (small): measured 5.00, failed"
    )


def test_verdict_compares_the_last_variant_of_each_runtime():
    sentences = verdicts(made_up.report())
    assert list(sentences) == ["onnxruntime", "openvino"]
    assert sentences["onnxruntime"].startswith("3.91x faster and 7.39x smaller")
    assert sentences["openvino"].startswith("1.72x faster and 2.19x smaller")


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (Report(), "the run has no variants"),
        (Report(variants=(Variant(name="original", stage="train"),)), "Only the original"),
        (
            Report(variants=(Variant(name="a", stage="s"), Variant(name="b", stage="s"))),
            "no runtime has results of both",
        ),
        (pair(), "with accuracy not measured"),
    ],
)
def test_verdict_of_what_cannot_be_compared_says_so(report, words):
    assert words in verdict(report)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(0.7263), "0.726"),
        (number(1234.5), "1,234"),
        (number(99.96), "100"),
        (number(-2.0), "−2.00"),
        (number(0), "0"),
        (number(None), "–"),
        (count(272_474), "272 k"),
        (count(40_813_184), "40.8 M"),
        (count(999_900), "1.00 M"),
        (count(17), "17"),
        (points(-0.004), "0.00"),
        (points(0.1), "+0.10"),
        (points(-12.34), "−12.3"),
        (factor(3.906), "3.91x"),
        (interval((1.0, 2.5)), "1.00..2.50"),
        (interval(None), ""),
    ],
)
def test_figures(text, expected):
    assert text == expected


def test_reason_prefers_the_most_specific():
    variant = Variant(name="a", stage="s", skipped={"onnxruntime": "of the variant"})
    plain_result = Result(**OTHER)
    assert reason("latency_ms_p50", plain_result, variant) == "of the variant"
    told = Result(**OTHER, skipped={"latency": "of the result", "top1_pct": "of the field"})
    assert reason("latency_ms_p99", told, variant) == "of the result"
    assert reason("top1_pct", told, variant) == "of the field"
    assert reason("params", None, Variant(name="a", stage="s")) == "no reason was recorded"
    told = told.model_copy(update={"skipped": {"activations_mib": "of the number"}})
    assert reason("activations", told, variant) == "of the number"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("activations_mib", "activations (MiB)"),
        ("peak_rss_mib", "peak memory of the process (MiB)"),
        ("first_call_ms", "first call (ms)"),
        ("sqnr_db", "SQNR (dB)"),
        ("latency_ms_ci95", "interval of latency"),
        ("my_runtime, batch 1", "my_runtime, batch 1"),  # no name of ours
        ("_ms", "_ms"),
    ],
)
def test_figures_have_titles(name, words):
    assert in_words(name) == words


def test_no_name_of_a_program_is_in_what_people_read():
    assert not [name for name in METHODS if "_" in in_words(name)]
    assert fact({"cpu_clock_mhz": 2400}) == "cpu clock (MHz) 2400"
    skipped = dict.fromkeys(METHODS, "it was not told")
    result = Result(**OTHER | {"device": "cuda"}, memory_mib={"peak_rss_mib": 2.0}, skipped=skipped)
    variants = (Variant(name="a", stage="s", results=(result,)),)
    report = Report(variants=variants, details=Details(methods=METHODS))
    assert "Peak memory of the process" in [column.name for column in speeds(report).columns]
    told = " ".join((*missing(report), markdown(report), html(report).partition("</style>")[2]))
    shown = [name for name in METHODS if "_" in name and f">{name}<" in told]
    assert not shown
    assert not [name for name in METHODS if "_" in name and f"measured: {name}" in told]


def test_terminal_has_the_same_facts_and_fits_80_columns():
    text = rendered(made_up.report(variants=4))
    assert max(map(len, text.splitlines())) <= 80
    for figure in ("91.39", "272 k", "40.8 M", "0.142", "50.5", "0.726", "3.91x", "runs/x"):
        assert figure in text
    assert "✗ loss of any class at most 2 points: measured 2.21, failed" in text
    assert "not measured: tensorrt-rtx: no NVIDIA GPU was found" in text


@pytest.mark.parametrize(
    ("name", "limit", "measured", "words"),
    [
        (
            "top1_drop_pct",
            1.0,
            -0.278,
            "loss of top-1 at most 1 point (b on r): gained 0.278, passed",
        ),
        ("worst_class_drop_pct", 2.0, 0, "loss of any class at most 2 points (b on r): measured 0"),
        ("size_ratio", 4.0, 8.61, "reduction of size at least 4x (b on r): measured 8.61, passed"),
        ("speedup", 2.0, 3.1, "speed-up at least 2x (b on r, batch 8): measured 3.10, passed"),
        ("latency_ms", 3.0, 2.5, "latency at most 3 ms (b on r): measured 2.50, passed"),
        ("some_other", 3.0, 2.5, "some other at most 3 (b on r): measured 2.50, passed"),
    ],
)
def test_a_gate_is_told_in_words(name, limit, measured, words):
    gate = Gate(
        name=name, limit=limit, measured=measured, passed=True, variant="b", runtime="r", batch=8
    )
    assert gate_sentence(gate).startswith(words)


def test_the_memory_of_a_gpu_is_missed_only_where_one_was_used():
    lines = []
    for device in ("cpu", "cuda"):
        skipped = {"peak_device_mib": "it used no GPU that PyTorch sees"}
        result = Result(**OTHER | {"device": device}, skipped=skipped)
        lines.append(missing(Report(variants=(Variant(name="a", stage="s", results=(result,)),))))
    assert [len(each) for each in lines] == [0, 1]


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"max_abs_diff": 0.0}, "with equal outputs (accuracy not measured)"),
        (
            {"max_abs_diff": 0.0, "zero_reference": 1.0},
            "with outputs that are zero for every image, which tells nothing",
        ),
    ],
)
def test_equal_zeros_are_no_proof(told, words):
    rows = [
        Variant(name=name, stage="s", results=(Result(**OTHER, outputs=outputs, size_mib=1.0),))
        for name, outputs in (("original", None), ("int8", {"boxes": told}))
    ]
    assert words in verdict(Report(variants=tuple(rows)))


def test_terminal_shows_markup_in_names_as_it_is():
    report = Report(variants=(Variant(name="[red]x[/red]", stage="s"),))
    assert "[red]x[/red]" in rendered(report)


def test_gate_that_could_not_be_measured_says_why():
    gate = Gate(name="speedup", limit=2.0, passed=False, reason="no GPU")
    text = rendered(Report(gates=(gate,), variants=(Variant(name="a", stage="s"),)))
    assert "speed-up at least 2x: not measured because no GPU, failed" in text


def test_markdown_escapes_what_markdown_or_html_would_read():
    assert escaped_line("<script>|*a*\nb") == r"\<script\>\|\*a\* b"
    report = made_up.report().model_copy(update={"name": "<b>x</b>"})
    assert "<b>" not in markdown(report)


def test_markdown_tables_have_equal_columns():
    lines = [line for line in markdown(made_up.report()).splitlines() if line.startswith("|")]
    widths = {line.count("|") for line in lines if "variant | stage" in line or "train" in line}
    assert len(widths) == 1
    assert any("no significant difference" in line for line in lines)


# Precision, size and gates


def in_place(precision: str, **values) -> Result:
    return Result(**(OTHER | {"precision": precision}), **values)


def test_an_original_in_half_precision_is_a_row_and_a_verdict_of_its_own():
    report = Report(
        variants=(
            Variant(
                name="original",
                stage="original",
                size_mib=8.0,
                results=(
                    in_place("fp32", size_mib=8.0, latency_ms_p50=10.0, verdict="reference"),
                    in_place("fp16", size_mib=4.0, latency_ms_p50=5.0, speedup=2.0),
                ),
            ),
        )
    )
    rows = [line.split() for line in rendered(report).splitlines() if "original" in line]
    assert [row[1] for row in rows] == ["fp32", "fp16"]
    assert [row[-3:] for row in rows] == [["–", "10.0", "–"], ["–", "5.00", "2.00x"]]
    assert verdict(report) == (
        "2.00x faster and 2.00x smaller with accuracy not measured in fp16 on onnxruntime cpu, "
        "batch 1."
    )


def test_what_runs_is_what_is_smaller_and_not_the_file_it_was_made_from():
    """The ONNX file shrinks to an eighth, what OpenVINO loads to a quarter."""
    report = pair(size_mib=1.0, latency_ms_p50=5.0, speedup=2.0)
    original, small = report.variants
    before = original.results[0].model_copy(update={"size_mib": 4.0})
    original = original.model_copy(update={"results": (before,)})
    small = small.model_copy(update={"size_mib": 1.0})
    report = report.model_copy(update={"variants": (original, small)})
    assert "4.00x smaller" in verdict(report)
    (gate,) = gates(Gates(size_ratio=5.0), report.variants)
    assert gate.measured == 4.0 and not gate.passed
    assert "4.00 MiB" in html(report) and "8.00 MiB" not in html(report).split("<nav")[0]


def test_a_failed_gate_says_why_in_every_format():
    why = "0.168 ms is 16 % faster than asked for: no network between was found, so more was cut"
    gate = Gate(name="latency_ms", limit=0.2, measured=0.168, passed=False, reason=why)
    report = pair((gate,), latency_ms_p50=5.0)
    sentence = f"latency at most 0.2 ms: measured 0.168 ({why})"
    assert gate_sentence(gate) == f"{sentence}, failed"
    assert sentence in " ".join(rendered(report).split())
    assert escaped_line(sentence) in markdown(report)
    assert f"✗ failed</b> {sentence}</li>" in html(report)


def test_a_failed_gate_near_its_limit_is_told_with_all_digits():
    gate = Gate(name="speedup", limit=1.5, measured=1.4993, passed=False)
    assert gate_sentence(gate) == "speed-up at least 1.5x: measured 1.4993, failed"


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"speedup": 2.0}, "because it ran out of memory, failed"),
        ({"top1_drop_pct": 2.0}, "because the task is judged by map50, not by classes"),
        ({"metric_drop": 2.0}, "because the images have no labels, failed"),
    ],
)
def test_a_gate_that_was_not_measured_says_why(limits, words):
    skipped = {"latency": "it ran out of memory", "accuracy": "the images have no labels"}
    primary = "map50" if "top1_drop_pct" in limits else None
    report = pair(skipped=skipped, primary=primary)
    (gate,) = gates(Gates(**limits), report.variants)
    assert words in gate_sentence(gate)


def test_what_was_tried_is_told_on_request_only():
    result = Result(**OTHER, top1_pct=90.0, skipped={"activations_mib": "free", "latency": "off"})
    report = Report(
        variants=(Variant(name="int8-x", stage="s", results=(result,)),),
        notes=("int8-x: mse ranges: 30.0 dB",),
        trials=("int8-x: equalization 0.5: 29.0 dB, not kept",),
    )
    for verbose in (False, True):
        file = io.StringIO()
        Console(file=file, width=160).print(summary(report, verbose=verbose))
        assert "mse ranges" in file.getvalue() and "not measured: latency" in file.getvalue()
        assert ("not kept" in file.getvalue()) == verbose
        assert ("activations (MiB)" in file.getvalue()) == verbose
    assert "equalization 0.5" in markdown(report)


def test_an_equal_size_is_said_in_words():
    report = pair(latency_ms_p50=5.0, top1_pct=90.0, speedup=2.0)
    same = report.variants[1].model_copy(update={"size_mib": 7.99})
    report = report.model_copy(update={"variants": (report.variants[0], same)})
    assert verdict(report).startswith("2.00x faster and of the same size ")


def test_int8_files_are_named_where_they_are_though_the_report_is_elsewhere():
    result = Result(**OTHER, top1_pct=90.0)
    variant = Variant(name="int8-x", stage="s", artifact="01/model.x.onnx", results=(result,))
    file = io.StringIO()
    shown = summary(Report(variants=(variant,)), "elsewhere", run="runs/a")
    Console(file=file, width=160).print(shown)
    assert "Int8: runs/a/01/model.x.onnx" in file.getvalue()
    assert "Report: elsewhere/report.html" in file.getvalue()
