"""The tables of the report, once for every format: configurations, columns, cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from compress.report import numbers as figures
from compress.report.schema import ChangeRecord, Interval, Report, Result, Variant
from compress.report.verdict import accuracy_of, same_speed

Setting = tuple[str, str, int, int | None]  # runtime, device, batch, threads


def settings(report: Report) -> list[Setting]:
    """Return every setting that has results, in order of appearance."""
    results = [result for variant in report.variants for result in variant.results]
    return list(dict.fromkeys(map(setting_of, results)))


def setting_of(result: Result) -> Setting:
    """Return what two results must share to be compared in speed."""
    return (result.runtime, result.device, result.batch, result.threads)


def setting_name(setting: Setting) -> str:
    """Return a setting in words: "onnxruntime cpu, 2 threads, batch 1"."""
    return f"{place_name(setting)}, batch {setting[2]}"


def place_name(setting: Setting) -> str:
    """Return a setting but for its batch: "onnxruntime cpu, 2 threads"."""
    runtime, device, _, threads = setting
    many = "" if threads is None else f", {threads} thread{'s' if threads > 1 else ''}"
    return f"{runtime} {device}{many}"


@dataclass(frozen=True)
class Cell:
    """One cell: its text, what it is sorted by, its interval and remark, or why it is empty."""

    text: str
    sort: float | str | None = None
    bounds: str = ""  # of the 95 % interval
    remark: str = ""
    reason: str = ""  # why it was not measured

    @classmethod
    def of(
        cls,
        value: float | None,
        form: str = "number",
        bounds: Interval | None = None,
        remark: str = "",
    ) -> Cell:
        """Return what shows a figure as a number, percent, points or factor, or a dash."""
        if form == "factor":
            told = figures.factor(value, bounds)
            return cls(told, value, figures.beside_factor(bounds), remark)
        return cls(getattr(figures, form)(value), value, figures.interval(bounds, form), remark)


@dataclass(frozen=True)
class Column:
    """A column: heading, unit, and what it means."""

    name: str
    unit: str = ""
    about: str = ""
    is_number: bool = True
    is_optional: bool = False  # not missed where nobody measured it


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()  # "column: why nothing of it was measured"


def sizes(report: Report) -> Table:
    """Return parameters, MACs and file size of each variant."""
    original = report.original
    columns = (
        Column("Variant", is_number=False),
        Column("Stage", is_number=False),
        Column("Parameters"),
        Column("MACs", about="multiply-accumulate operations for one image"),
        Column("File", "MiB", "of the artifact; what runs where is below speed and memory"),
        Column("Smaller by", about="size of the original's file over this one's"),
        Column("Artifact", is_number=False),
    )
    return Table("sizes", "Size", columns, tuple(_size(v, original) for v in report.variants))


def accuracies(report: Report) -> Table:
    """Return the accuracy of each variant on each runtime, and its change from the original."""
    own = _task_columns(report)
    filled = _ACCURACY
    if own or not report.details.tells_classes:
        kept = {"Agreement"} - {column.name for column, _ in own}
        if not is_labelled(report):
            kept |= {"SQNR"}
        filled = (*own, *(fill for fill in _ACCURACY if fill[0].name in kept))
    columns = (*_PLACE, *(column for column, _ in filled))
    rows = []
    for variant in report.variants:
        for result in variant.results:
            source = accuracy_of(variant, result)
            cells = (_measured(variant, source, fill) for _, fill in filled)
            rows.append((*_place(variant, source), *cells))
    heading = "Accuracy" if is_labelled(report) else "Agreement with the original"
    return Table("accuracy", heading, columns, tuple(dict.fromkeys(rows)))  # once for all batches


def is_labelled(report: Report) -> bool:
    """Return whether the report is about labelled images: only they tell how right a network is."""
    results = (result for variant in report.variants for result in variant.results)
    return report.details.tells_classes or any(result.metrics for result in results)


def speeds(report: Report) -> Table:
    """Return latency, throughput and memory of each variant, runtime and batch size."""
    results = [(v, result) for v in report.variants for result in v.results]
    kinds = dict.fromkeys(key for _, result in results for key in result.memory_mib)
    meters = dict.fromkeys(key for _, result in results for key in result.energy_mj_per_image)
    filled: list[tuple[Column, Fill]] = [*_SPEED]
    for kind in kinds:
        column = Column(figures.titled(kind)[0].capitalize(), "MiB")
        filled.append((column, _fill_entry("memory_mib", kind)))
    for meter in meters:
        column = Column(f"Energy, {meter.replace('_', ' ')}", "mJ/image")
        filled.append((column, _fill_entry("energy_mj_per_image", meter)))
    rows = [
        (
            *_place(variant, result),
            Cell(str(result.batch), result.batch),
            *(_measured(variant, result, fill) for _, fill in filled),
        )
        for variant, result in results
    ]
    columns = (*_PLACE, Column("Batch"), *(column for column, _ in filled))
    return Table("speed", "Speed and memory", columns, tuple(rows))


_PLACE = (Column("Variant", is_number=False), Column("Runtime", is_number=False))


def _place(variant: Variant, result: Result) -> tuple[Cell, ...]:
    where = place_name(setting_of(result)).removeprefix(result.runtime).strip()
    return (Cell(variant.name), Cell(f"{result.runtime} {result.precision}", remark=where))


def _size(variant: Variant, original: Variant | None) -> tuple[Cell, ...]:
    ratio = None
    if original is not None and original.size_mib and variant.size_mib:
        ratio = original.size_mib / variant.size_mib
    numbers = (
        ("params", variant.params, figures.count),
        ("macs", variant.macs, figures.count),
        ("size_mib", variant.size_mib, figures.number),
        ("size_mib", ratio, figures.factor),
    )
    return (
        Cell(variant.name),
        Cell(variant.stage),
        *(
            _absent(variant, None, field) if value is None else Cell(write(value), value)
            for field, value, write in numbers
        ),
        Cell(variant.artifact or figures.ABSENT),
    )


class FieldValue(NamedTuple):
    """What a cell shows of a result."""

    field: str
    value: float | None = None
    form: str = "number"
    bounds: Interval | None = None
    remark: str = ""


Fill = Callable[[Result], FieldValue]


def _fill(
    field: str,
    form: str = "number",
    bounds: str | None = None,
    remark: Callable[[Result], str] = lambda _: "",
) -> Fill:
    """Return what reads a field of a result, its interval and what is to be said of it."""

    def fill(result: Result) -> FieldValue:
        interval = getattr(result, bounds) if bounds else None
        return FieldValue(field, getattr(result, field), form, interval, remark(result))

    return fill


def _open(change: ChangeRecord | None) -> str:
    """Return what an insignificant change of accuracy leaves open, or why it says nothing."""
    return "" if change is None or change.differs else change.verdict


def _worst_class(result: Result) -> str:
    lost = result.worst_class and result.worst_class_drop_pct
    return f"class {result.worst_class}" if lost else ""


_ACCURACY: tuple[tuple[Column, Fill], ...] = (
    (Column("Top-1", "%"), _fill("top1_pct", "percent", "top1_ci95")),
    (
        Column("Change", "points", "of top-1 against the original, on the same images"),
        _fill("top1_change_pct", "points", "top1_change_ci95", lambda r: _open(r.change)),
    ),
    (Column("Top-5", "%", is_optional=True), _fill("top5_pct", "percent", "top5_ci95")),
    (
        Column("Agreement", "%", "images that get the original's answer"),
        _fill("agreement_pct", "percent", "agreement_ci95"),
    ),
    (
        Column("Flips", "%", "images the original has right and this has wrong"),
        _fill("flip_pct", "percent"),
    ),
    (
        Column("Worst class", "points lost", "largest loss of recall of any class"),
        _fill("worst_class_drop_pct", "percent", "worst_class_drop_ci95", _worst_class),
    ),
    (Column("ECE", "%", "expected calibration error"), _fill("ece_pct", "percent")),
    (Column("SQNR", "dB", "of the logits, against the original"), _fill("sqnr_db")),
)


def _task_columns(report: Report) -> tuple[tuple[Column, Fill], ...]:
    """Return a column for each metric of the task and its change, where it has its own metrics."""
    results = [result for variant in report.variants for result in variant.results]
    kinds = {name: (m.unit, m.title or name)
             for result in results for name, m in (result.metrics or {}).items()}  # fmt: skip
    found: list[tuple[Column, Fill]] = []
    for name, (unit, title) in kinds.items():
        sign, spoken, form = ("%", "points", "percent") if unit == "pct" else (unit, unit, "number")
        change = Column(
            f"Change of {title}", spoken, f"of {title} against the original, on the same images"
        )
        found.append((Column(title, sign), _fill_record("metrics", form, name)))
        found.append((change, _fill_record("changes", "points", name)))
    for unit in {result.agreement.unit for result in results if result.agreement}:
        alike = Column("Agreement", unit, "with the original's predictions")
        found.append((alike, _fill_record("agreement", "number")))
    return tuple(found)


def _fill_record(field: str, form: str, key: str | None = None) -> Fill:
    """Return what reads the record that a field of a result holds, or holds by the name ``key``."""
    absent = "agreement_pct" if field == "agreement" else field

    def fill(result: Result) -> FieldValue:
        held = getattr(result, field)
        found = held if key is None else (held or {}).get(key)
        if found is None:
            return FieldValue(absent)
        remark = _open(found) if isinstance(found, ChangeRecord) else ""
        return FieldValue(absent, found.value, form, found.ci95, remark)

    return fill


def _fill_entry(field: str, key: str) -> Fill:
    return lambda result: FieldValue(key, getattr(result, field).get(key))


_SPEED: tuple[tuple[Column, Fill], ...] = (
    (Column("p50", "ms"), _fill("latency_ms_p50", "number", "latency_ms_p50_ci95")),
    (Column("p99", "ms"), _fill("latency_ms_p99", "number", "latency_ms_p99_ci95")),
    (Column("Throughput", "images/s"), _fill("throughput_ips")),
    (
        Column("Speed-up", "", "the original's p50 over this one's, in the same setting"),
        _fill("speedup", "factor", "speedup_ci95", same_speed),
    ),
    (
        Column("p50 on GPU", "ms", "without copies", is_optional=True),
        _fill("device_latency_ms_p50"),
    ),
    (
        Column("p99 on GPU", "ms", "without copies", is_optional=True),
        _fill("device_latency_ms_p99"),
    ),
    (Column("Loading", "ms", "from path to session", is_optional=True), _fill("load_ms")),
    (Column("First call", "ms", is_optional=True), _fill("first_call_ms")),
    (
        Column("Runs from", "MiB", "size of the file that the runtime opens", is_optional=True),
        _fill("size_mib"),
    ),
    (Column("Peak memory", "MiB", "what the artifact itself costs"), _fill("peak_memory_mib")),
)


def _measured(variant: Variant, result: Result, fill: Fill) -> Cell:
    field, value, form, bounds, remark = fill(result)
    if value is None:
        return _absent(variant, result, field)
    return Cell.of(value, form, bounds, remark)


_AGAINST_ITSELF = {
    "changes",
    "top1_change_pct",
    "agreement_pct",
    "flip_pct",
    "worst_class_drop_pct",
    "sqnr_db",
}


def _absent(variant: Variant, result: Result | None, field: str) -> Cell:
    if field in _AGAINST_ITSELF and variant.name == "original":
        return Cell(figures.ABSENT)
    return Cell(figures.ABSENT, reason=figures.reason(field, result, variant))


def compact(table: Table) -> Table:
    """Return ``table`` without number columns that hold nothing; its notes say why they do."""
    rows = [[cell.text not in _EMPTY for cell in row] for row in table.rows]
    kept, notes = list[int](), list[str]()
    for position, column in enumerate(table.columns):
        if not column.is_number or any(row[position] for row in rows):
            kept.append(position)
            continue
        found = dict.fromkeys(row[position].reason for row in table.rows)
        silent = {"", figures.UNRECORDED} if column.is_optional else {""}
        if why := "; ".join(each for each in found if each not in silent):
            notes.append(f"{column.name}: {why}")
    return Table(
        table.key,
        table.title,
        tuple(table.columns[position] for position in kept),
        tuple(tuple(row[position] for position in kept) for row in table.rows),
        tuple(notes),
    )


_EMPTY = (figures.ABSENT, "")
