"""Charts, tables and pictures of the report against closed forms and brute force."""

from __future__ import annotations

import base64
import io
import math
import re

import made_up
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from compress.report import errors_by_class
from compress.report.charts import (
    NARROW,
    Dot,
    Scale,
    learning_curves,
    lines,
    pareto,
    scale,
    scatter,
)
from compress.report.html import html, in_float
from compress.report.pictures import thumbnail
from compress.report.schema import (
    Calibration,
    ClassScores,
    Confusion,
    Coverage,
    Curve,
    Details,
    Flip,
    Island,
    Line,
    Report,
    Result,
    Subgroup,
    Variant,
)
from compress.report.tables import Cell, accuracies, compact, sizes, speeds
from compress.report.verdict import same_speed

PLACE = {"runtime": "onnxruntime", "precision": "fp32", "device": "cpu", "batch": 1}
NUMBERS = st.integers(1, 6).map(float)  # few values: ties are common


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12))
def test_the_front_is_what_no_other_beats_in_both(points):
    dots = [Dot(str(n), "", x, y) for n, (x, y) in enumerate(points)]
    front = {(dot.x, dot.y) for dot in pareto(dots)}
    beaten = {
        (x, y) for x, y in points if any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)
    }
    assert front == set(points) - beaten


@given(st.floats(-1e3, 1e3), st.floats(0.1, 1e6), st.integers(3, 9))
def test_ticks_are_round_few_and_inside(low, width, count):
    ticks = Scale(low, low + width, 0.0, 300.0).ticks(count)
    values = [float(text.replace("−", "-").replace(",", "")) for _, text in ticks]
    assert 1 <= len(values) <= count + 1
    slack = width * 1e-6
    assert all(low - slack <= value <= low + width + slack for value in values)
    if len(values) > 1:
        step = values[1] - values[0]
        assert np.allclose(np.diff(values), step, rtol=1e-3)
        lead = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(lead - nice) for nice in (1, 2, 5, 10)) < 1e-3 * lead


def test_a_logarithmic_scale_puts_equal_ratios_at_equal_distances():
    along = scale([1.0, 100.0], 0.0, 300.0, is_log=True)
    assert along(10.0) - along(1.0) == pytest.approx(along(100.0) - along(10.0), abs=0.2)
    assert [text for _, text in along.ticks()] == ["1", "2", "5", "10", "20", "50", "100"]


@pytest.mark.parametrize("value", [0.0, 100.0])
def test_an_axis_of_percent_ends_at_0_and_100_where_all_are_alike(value):
    dots = [Dot(name, name, x, value) for name, x in (("original", 2.0), ("pruned", 1.0))]
    told = [float(text.replace("−", "-")) for _, text in scatter(dots).y_ticks]
    assert value in told
    assert min(told) >= 0
    assert max(told) <= 100


def test_labels_of_a_crowded_chart_do_not_cover_each_other():
    rng = np.random.default_rng(0)
    dots = [Dot(f"variant-{n}", f"variant-{n}", *rng.uniform(1, 1.3, 2)) for n in range(25)]
    chart = scatter(dots)
    boxes = []
    for place in chart.dots:
        if place.label:
            x, y, anchor = place.label
            width = 6.6 * len(place.dot.label)
            left = {"start": x, "end": x - width, "middle": x - width / 2}[anchor]
            boxes.append((left, y - 11, left + width, y + 3))
    assert len(boxes) > 5
    for n, one in enumerate(boxes):
        for other in boxes[:n]:
            apart = one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
            assert apart


def test_a_label_lies_on_no_line_where_there_is_room():
    dots = [
        Dot("original", "original", 2.0, 92.0, is_original=True),
        Dot("fast", "fast", 1.0, 85.0),
        Dot("between", "between", 1.5, 84.9, x_ci=(1.3, 1.7), y_ci=(84.0, 86.0)),
    ]
    chart = scatter(dots)
    placed = {place.dot.name: place for place in chart.dots}
    x, y, anchor = placed["between"].label
    width = 6.6 * len("between")
    left = {"start": x, "end": x - width, "middle": x - width / 2}[anchor]
    own = placed["between"]
    assert y + 3 < own.y or own.y < y - 11 or left + width < own.across[0] or own.across[1] < left
    assert left + width < own.x or own.x < left or max(own.upright) < y - 11
    one, other = placed["fast"], placed["original"]  # the front joins them
    for step in np.linspace(0, 1, 200):
        px, py = one.x + step * (other.x - one.x), one.y + step * (other.y - one.y)
        assert not (left <= px <= left + width and y - 11 <= py <= y + 3)


def test_flipped_images_are_counted_though_not_all_are_recorded():
    flips = tuple(
        Flip(index=n, label=0, before=0, after=1, variant="int8", runtime="onnxruntime")
        for n in range(3)
    )
    result = Result(**PLACE, images=600, flip_pct=100 * 61 / 600)
    variants = (Variant(name="int8", stage="s", results=(result,)),)
    report = Report(variants=variants, details=Details(flips=flips))
    assert errors_by_class.flipped(report) == 61
    page = html(report)
    assert (
        "wrong now with int8: 61 images; 3 of those whose wrong answer is surest are shown" in page
    )
    assert errors_by_class.flipped(Report(details=Details(flips=flips))) == 3


def test_the_chart_of_confidence_always_shows_the_original():
    names = ("original", "b", "c", "d", "e", "f")
    bins = {"confidence_pct": (50.0, 90.0), "accuracy_pct": (40.0, 80.0), "images": (20, 20)}
    parts = tuple(Calibration(variant=name, ece_pct=10.0, **bins) for name in names)
    page = html(Report(details=Details(calibration=parts)))
    figure = page[page.index("Expected calibration error") :]
    figure = figure[: figure.index("Bins of fewer")]
    drawn = {name for name in names if f">{name}</text>" in figure}
    assert drawn == {"original", "d", "e", "f"}


def test_errors_of_confidence_are_told_in_the_order_of_the_variants():
    bins = {"confidence_pct": (50.0,), "accuracy_pct": (40.0,), "images": (20,)}
    names = ("original", "int8-openvino", "pruned")  # in details the verdict's is the last
    parts = tuple(Calibration(variant=name, ece_pct=10.0, **bins) for name in names)
    variants = tuple(
        Variant(name=name, stage="s") for name in ("original", "pruned", "int8-openvino")
    )
    page = html(Report(variants=variants, details=Details(calibration=parts)))
    assert "original 10.00 %, pruned 10.00 %, int8-openvino 10.00 %." in page


def test_a_long_name_at_the_edge_of_a_phone_is_moved_inside():
    dots = [Dot("a", "int8-onnxruntime", 1.0, 90.0), Dot("b", "original", 9.0, 95.0)]
    chart = scatter(dots, NARROW)
    label = next(place.label for place in chart.dots if place.dot.name == "a")
    assert label is not None
    assert chart.frame[0] < label[0]


def test_a_single_dot_without_intervals_is_drawn():
    chart = scatter([Dot("a", "a", 2.0, 90.0, is_original=True)])
    assert chart.front == ""
    assert chart.dots[0].is_best
    left, top, right, bottom = chart.frame
    assert left < chart.dots[0].x < right
    assert top < chart.dots[0].y < bottom


def test_of_many_lines_those_that_fall_the_lowest_are_named():
    many = tuple(Line(name=f"layer{n}", x=(0.0, 1.0), y=(float(n), 10.0)) for n in range(9))
    chart = lines(Curve(title="t", x_label="x", y_label="y", lines=many))
    named = [path.name for path in chart.paths if path.label_y is not None]
    assert named == [f"layer{n}" for n in range(5)]
    heights = sorted(path.label_y for path in chart.paths if path.label_y is not None)
    assert min(np.diff(heights)) >= 14 - 0.1


def test_an_empty_curve_is_no_chart():
    empty = Line(name="a", x=(), y=())
    assert lines(Curve(title="t", x_label="x", y_label="y", lines=(empty,))) is None


def test_every_figure_of_every_result_is_in_a_table():
    report = made_up.report()
    shown = {
        cell.sort
        for kind in (accuracies, speeds, sizes)
        for row in kind(report).rows
        for cell in row
    }
    for variant in report.variants:
        assert {variant.params, variant.macs, variant.size_mib} <= shown
        for result in variant.results:
            for field in type(result).model_fields:
                value = getattr(result, field)
                hidden = field in {"latency_ms_p90", "latency_ms_mean", "top1_p_value"}
                if isinstance(value, float) and not hidden:
                    assert value in shown, field


def test_a_column_that_nobody_measured_becomes_a_note_with_its_reason():
    result = Result(**PLACE, top1_pct=90.0, skipped={"top5_pct": "only four classes"})
    report = Report(variants=(Variant(name="a", stage="s", results=(result,)),))
    table = compact(accuracies(report))
    assert "Top-5" not in [column.name for column in table.columns]
    assert "Top-5: only four classes" in table.notes
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_a_cell_that_was_not_measured_says_why_on_the_page():
    results = (
        Result(**PLACE, latency_ms_p50=2.0),
        Result(**(PLACE | {"batch": 8}), skipped={"latency": "the batch <8> does not fit"}),
    )
    page = html(Report(variants=(Variant(name="a", stage="s", results=results),)))
    assert "not measured because the batch &lt;8&gt; does not fit" in page


def test_an_empty_report_is_a_page():
    page = html(Report())
    assert "No chart of accuracy against latency" in page
    assert "Flipped images: not measured because no reason was recorded" in page


def test_a_part_that_is_absent_says_why():
    details = Details(skipped={"attributions": "captum is not installed"})
    page = html(Report(details=details, skipped={"everything": "it was stopped"}))
    assert "Attribution maps: not measured because captum is not installed" in page
    assert "Flipped images: not measured because it was stopped" in page


def test_no_flipped_image_is_good_news_and_not_a_gap():
    cells = ((0, 0, 5), (1, 1, 5))
    confusions = tuple(Confusion(variant=name, cells=cells) for name in ("original", "int8"))
    page = html(Report(details=Details(classes=("a", "b"), confusions=confusions)))
    assert "No image that original had right is wrong with int8." in page
    assert "Flipped images: not measured" not in page


def test_the_worst_class_is_named_where_it_lost():
    def cell(drop: float) -> Cell:
        result = Result(**PLACE, worst_class_drop_pct=drop, worst_class="3")
        table = accuracies(Report(variants=(Variant(name="a", stage="s", results=(result,)),)))
        position = [column.name for column in table.columns].index("Worst class")
        return table.rows[0][position]

    assert (cell(1.5).text, cell(1.5).remark) == ("1.50", "class 3")
    assert cell(0.0).remark == ""


def scores(name: str, recall: tuple[float | None, ...]) -> ClassScores:
    return ClassScores(
        variant=name, images=(5,) * 3, precision_pct=recall, recall_pct=recall, f1_pct=recall
    )


def test_classes_that_lost_the_most_come_first_and_the_unknown_last():
    details = Details(
        classes=("a", "b", "c"),
        class_scores=(scores("original", (90.0, 90.0, None)), scores("int8", (89.0, 70.0, 50.0))),
    )
    (table,) = errors_by_class.class_tables(details)
    assert [row[0].text for row in table.rows] == ["b", "a", "c"]
    assert [row[2].text for row in table.rows] == ["−20.0", "−1.00", "–"]


def test_a_matrix_of_few_classes_is_numbers_and_of_many_a_picture():
    few = Details(
        classes=("a", "b"), confusions=(Confusion(variant="v", cells=((0, 0, 3), (0, 1, 1))),)
    )
    matrix = errors_by_class.matrix(few, *few.confusions)
    assert matrix.rows == (((3, 0.75), (1, 0.25)), ((0, 0.0), (0, 0.0)))
    cells = tuple((n, n, 10) for n in range(0, 1000, 4))
    many = Details(confusions=(Confusion(variant="v", cells=cells),))
    matrix = errors_by_class.matrix(many, *many.confusions)
    raw = base64.b64decode(matrix.picture.removeprefix("data:image/png;base64,"))
    opacity = np.asarray(Image.open(io.BytesIO(raw)))[..., 3]
    assert opacity.shape == (250, 250)  # each pixel is the largest of 4 x 4 classes
    np.testing.assert_array_equal(opacity, 255 * np.eye(250))


def test_confusions_that_grew_are_listed_the_largest_first():
    before = Confusion(variant="o", cells=((0, 1, 5), (1, 0, 2), (0, 0, 9)))
    after = Confusion(variant="i", cells=((0, 1, 6), (1, 0, 9), (1, 2, 3), (0, 0, 1)))
    table = errors_by_class.grown_confusions(
        Details(classes=("a", "b", "c"), confusions=(before, after))
    )
    rows = [[cell.text for cell in row] for row in table.rows]
    assert rows == [
        ["b", "a", "2", "9", "+7"],
        ["b", "c", "0", "3", "+3"],
        ["a", "b", "5", "6", "+1"],
    ]


def test_subgroups_are_rows_and_variants_columns():
    groups = (
        Subgroup(column="light", value="day", variant="o", images=9, top1_pct=90.0),
        Subgroup(column="light", value="day", variant="i", images=9, top1_pct=80.0),
        Subgroup(column="light", value="night", variant="o", images=4, top1_pct=70.0),
    )
    table = errors_by_class.subgroup_table(Details(subgroups=groups))
    assert [column.name for column in table.columns] == ["Column", "Value", "Images", "o", "i"]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["light", "day", "9", "90.00", "80.00"],
        ["light", "night", "4", "70.00", "–"],
    ]


def test_pictures_stay_within_the_budget():
    assert errors_by_class.within_budget([("a" * 10,), ("a" * 10, None), ("a",)], 20) == 2
    assert errors_by_class.within_budget([], 20) == 0


@pytest.mark.parametrize("shape", [(100, 50, 3), (100, 50, 1), (100, 50)])
def test_thumbnails_keep_proportions_and_small_images(shape):
    image = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    raw = base64.b64decode(thumbnail(image, 20).removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(raw)).size == (10, 20)
    raw = base64.b64decode(thumbnail(image, 200).removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(raw))), image.squeeze())


def test_what_stays_in_float_is_told_once_for_each_reason():
    islands = (
        *(Island(nodes=(f"gate_{n}", "Mul")) for n in range(20)),
        *(Island(nodes=(f"conv_{n}",), macs=1000, reason="a float bias") for n in range(3)),
        Island(nodes=("head",), macs=5, reason="no int8 kernel"),
    )
    coverage = Coverage(variant="int8", runtime="onnxruntime", islands=islands)
    page = html(Report(name="run", details=Details(coverage=(coverage,))))
    lines = re.findall("<li>([^<]* in float[^<]*)</li>", page)
    assert lines == [
        "gate_0, Mul and 19 more stay in float between int8 operations, in 20 places",
        "conv_0, conv_1 and 1 more stay in float: a float bias (3.00 k MACs)",
        "head stays in float: no int8 kernel (5 MACs)",
    ]


def test_islands_without_a_node_are_no_line():
    islands = (Island(nodes=(), reason="x"), Island(nodes=("pool",), reason="y"))
    part = Coverage(variant="int8", runtime="onnxruntime", islands=islands)
    assert in_float(part) == ["pool stays in float: y"]


def test_a_class_that_is_none_is_a_number():
    details = Details(classes=("cat", "dog"))
    assert [errors_by_class.class_name(details, n) for n in (0, 1, 2, -3)] == [
        "cat",
        "dog",
        "2",
        "-3",
    ]


def test_calibration_has_one_of_each_for_every_bin():
    with pytest.raises(ValueError, match="differ in their number of bins"):
        Calibration(variant="x", ece_pct=1.0, confidence_pct=(50.0,), accuracy_pct=(), images=(3,))


def test_a_curve_of_a_tasks_metric_has_its_name_and_its_unit():
    history = [{"epoch": n, "validation_psnr": 20.0 + n} for n in (1, 2)]
    (curve,) = learning_curves("00-train", history, {"psnr": "PSNR, dB"})
    assert (curve.title, curve.y_label) == ("Validation images, 00-train", "PSNR, dB")


@pytest.mark.parametrize(
    ("interval", "words"),
    [((0.9, 1.1), "no significant difference"), ((0.97, 0.99), "no difference that this machine")],
)
def test_a_speed_that_cannot_be_told_says_why(interval, words):
    result = Result(**PLACE, speedup=1.0, speedup_ci95=interval, verdict="no difference")
    assert same_speed(result).startswith(words)
    assert same_speed(result.model_copy(update={"verdict": "slower"})) == ""
