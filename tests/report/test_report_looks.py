"""What a page must show whatever its width: points of single bins, and that tables go on."""

from compress.report.charts import lines, reliability
from compress.report.html import html
from compress.report.schema import Calibration, Details, Report, Result, Variant

RESULT = Result(runtime="a", precision="fp32", device="cpu", batch=1, latency_ms_p50=1.0)
VARIANTS = (Variant(name="original", stage="s", results=(RESULT,)),)


def page(*bins):
    confidence, accuracy, images = zip(*bins, strict=True)
    part = Calibration(
        variant="original", ece_pct=1.0, confidence_pct=confidence, accuracy_pct=accuracy,
        images=images,
    )  # fmt: skip
    return html(Report(variants=VARIANTS, details=Details(calibration=(part,))))


def test_a_reliability_curve_of_one_bin_is_a_point():
    one, two = page((90.0, 80.0, 50)), page((60.0, 55.0, 50), (90.0, 80.0, 50))
    assert one.count('<circle class="point"') == 2  # wide and narrow
    assert '<circle class="point"' not in two
    path = lines(reliability([("original", [90.0], [80.0])])).paths[0]
    assert f'cx="{path.end[0]}" cy="{path.end[1]}"' in one


def test_every_table_that_may_scroll_has_a_sign_for_it():
    text = page((90.0, 80.0, 50))
    tables = text.count('<div class="scroll')
    assert tables == text.count('<p class="aside"') > 0
    assert ".aside.needed" in text
