"""The report as one self-contained HTML file: no request, readable with and without scripts."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from compress.report import errors_by_class, numbers
from compress.report.charts import LINES_NARROW, lines, pareto_charts, reliability
from compress.report.schema import Calibration, Coverage, Island, Record, Report
from compress.report.tables import accuracies, compact, is_labelled, sizes, speeds
from compress.report.text import gate_sentence, missing
from compress.report.verdict import comparisons, sizes_mib, verdicts

if TYPE_CHECKING:
    from jinja2 import Environment

FLIPS, ATTRIBUTIONS = 48, 12  # shown at most; report.json holds all
LINES = 3  # of compressed networks in the chart of confidence
BIN_IMAGES = 10  # a bin of confidence with fewer is not drawn
PICTURES = 600_000  # characters of each kind of pictures, at most
ROWS = 400  # of tables about layers, at most


def html(report: Report) -> str:
    """Return the whole page; every name that comes from data is escaped."""
    return render(
        "report.html.j2",
        title=f"{report.name}: compression report",
        report=report,
        details=report.details,
        sentences=list(verdicts(report).values())[1:],  # the first is the verdict
        headline=next(comparisons(report), None),
        charts=pareto_charts([report]),
        labelled=is_labelled(report),
        tables=[compact(accuracies(report)), compact(speeds(report)), compact(sizes(report))],
        rows_limit=ROWS,
        flipped=errors_by_class.flipped(report),
        figures=_figures(report),
        class_metrics=errors_by_class.class_metric_table(report.details),
        similarities=errors_by_class.similarity_table(report.details),
        drawn=_shown(report.details.drawn, "truth", "before", "after", "change"),
        attributions=_shown(
            report.details.attributions[:ATTRIBUTIONS], "image", "before_map", "after_map"
        ),
        flips=_shown(report.details.flips[:FLIPS], "thumbnail"),
        **_lost(report),
    )


def _figures(report: Report) -> list[tuple[str, float | None, float | None, str]]:
    """Return the tile of accuracy: name, of the original, of the variant, unit."""
    _, before, after = next(comparisons(report), (None, None, None))
    if after is None:
        return []
    one, two = (None if each is None else each.figure for each in (before, after))
    shown = two or one
    if shown is None:
        return [("Top-1", None, None, "%")] if report.details.tells_classes else []
    name = shown.name.capitalize() if shown.name.islower() else shown.name
    first, last = (None if each is None else each.value for each in (one, two))
    return [(name, first, last, shown.unit)]


def _shown(items: Sequence[Record], *pictures: str) -> Sequence[Any]:
    """Return the first items, as many as the report has room for the pictures of."""
    found = [[getattr(item, name) for name in pictures] for item in items]
    return items[: errors_by_class.within_budget(found, PICTURES)]


def render(template: str, **content: Any) -> str:
    """Return a page made from one of the templates of this package."""
    from markupsafe import Markup

    folder = resources.files("compress.report") / "templates"
    script = (folder / "script.js").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template(template)
        .render(
            script=Markup(script),
            script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            style=Markup((folder / "style.css").read_text(encoding="utf-8")),
            **content,
        )
    )


def _lost(report: Report) -> dict[str, Any]:
    details = report.details
    places = [variant.name for variant in report.variants]
    bins = [(part.variant, *_well_filled(part)) for part in details.calibration]
    bins = [*bins[:1], *bins[1:][-LINES:]]  # the original, and what it became in the end
    return {
        "calibration": sorted(  # as variants stand in tables; in details the verdict's is last
            details.calibration,
            key=lambda part: places.index(part.variant) if part.variant in places else len(places),
        ),
        "class_tables": errors_by_class.class_tables(details),
        "matrices": [errors_by_class.matrix(details, each) for each in details.confusions],
        "confused": errors_by_class.grown_confusions(details),
        "subgroups": errors_by_class.subgroup_table(details),
        "reliability": reliability(bins) if any(points for _, points, _ in bins) else None,
    }


def _well_filled(part: Calibration) -> tuple[list[float], list[float]]:
    """Return confidence and accuracy of the bins with enough images to say something."""
    rows = zip(part.confidence_pct, part.accuracy_pct, part.images, strict=True)
    kept = [(sure, right) for sure, right, images in rows if images >= BIN_IMAGES]
    return [sure for sure, _ in kept], [right for _, right in kept]


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("compress.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        class_name=errors_by_class.class_name,
        gate_sentence=gate_sentence,
        in_float=in_float,
        place_lines=lambda curve: (lines(curve), lines(curve, LINES_NARROW)),
        missing=missing,
        plain_json=plain_json,
        sizes_mib=sizes_mib,
    )
    named = ("count", "fact", "factor", "interval", "number", "percent", "points")
    environment.filters.update({name: getattr(numbers, name) for name in named})
    environment.filters["spoken"] = numbers.in_words
    return environment


def in_float(part: Coverage) -> list[str]:
    """Return a line for each reason why operations stay in float."""
    found: dict[str | None, list[Island]] = {}
    for island in part.islands:
        if island.nodes:
            found.setdefault(island.reason, []).append(island)
    lines = []
    for reason, islands in found.items():
        names = dict.fromkeys(node for island in islands for node in island.nodes)
        places = f", in {len(islands)} places" if len(islands) > 1 else ""
        why = f" between int8 operations{places}" if reason is None else f": {reason}"
        macs = [island.macs for island in islands if island.macs is not None]
        work = f" ({numbers.count(sum(macs))} MACs)" if macs else ""
        lines.append(f"{numbers.staying(list(names))} in float{why}{work}")
    return lines


def plain_json(value: Any) -> str:
    """Return settings as indented JSON for reading, without what is not set."""
    return json.dumps(without_unset(value), indent=2, ensure_ascii=False)


def without_unset(value: Any) -> Any:
    """Return settings without keys that are not set, as a person would write them."""
    if isinstance(value, dict):
        return {key: without_unset(item) for key, item in value.items() if item is not None}
    return [without_unset(item) for item in value] if isinstance(value, list | tuple) else value
