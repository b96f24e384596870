"""What report.json holds: frozen records; what was not measured is absent, with the reason."""

from __future__ import annotations

import math
import operator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from compress.statistics import excludes, undecided

SCHEMA = 1  # later versions only add keys
LEVEL = 0.05  # of significance
SAME = "no significant difference"
BUSY_RESOLUTION_PCT = 10.0  # speeds that differ by less are not told apart on a busy machine

Interval = tuple[float, float]  # a 95 % confidence interval: low, high
Class = Annotated[int, Field(ge=0, lt=2**24)]  # its number
Count = Annotated[int, Field(ge=0, lt=2**48)]
Reasons = dict[str, str]  # name of what was not measured -> "not measured because ..." it


def _check_png(value: object) -> object:
    if isinstance(value, str) and not value.startswith("data:image/png;base64,"):
        raise ValueError("an image must be a PNG as data URI (data:image/png;base64,...)")
    return value


Png = Annotated[
    str, Field(pattern=r"^data:image/png;base64,[A-Za-z0-9+/]+={0,2}$"), BeforeValidator(_check_png)
]


class Record(BaseModel):
    """A part of the report: immutable, finite, and keeping keys of newer versions as they are."""

    model_config = ConfigDict(
        frozen=True,
        extra="allow",
        allow_inf_nan=False,
        populate_by_name=True,
        protected_namespaces=(),
    )

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able data; what was not measured is absent."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class MetricRecord(Record):
    """One metric of a task."""

    value: float
    unit: str
    ci95: Interval | None = None
    higher_is_better: bool | None = None  # yes unless it says no
    title: str | None = None  # what people call it; its name if absent


class Figure(Record):
    """The headline figure of a result, shown in charts, tiles and tables."""

    name: str  # "top-1", the task's primary metric, "SQNR"
    value: float
    unit: str  # "%", "dB", ...
    ci95: Interval | None = None
    higher_is_better: bool = True

    @property
    def title(self) -> str:
        """Its name with its unit."""
        return f"{self.name}, {self.unit}" if self.unit else self.name


class ChangeRecord(Record):
    """One metric of a variant less the original's, on the same images."""

    value: float
    unit: str
    ci95: Interval | None = None  # paired
    drop: float  # how much worse; negative where better
    verdict: str  # "better", "worse", "no significant difference", or what images cannot tell

    @property
    def differs(self) -> bool:
        """Whether the change is significant."""
        return self.verdict in {"better", "worse"}


class Result(Record):
    """One variant on one runtime at one batch size and thread count."""

    runtime: str
    precision: Literal["fp32", "fp16", "int8"]
    device: str
    batch: int = Field(ge=1)
    threads: int | None = None
    options: dict[str, Any] | None = None  # of the runtime, where the recipe gives any
    size_mib: float | None = None  # of what the runtime opened: the engine, where there is one

    latency_ms_p50: float | None = None
    latency_ms_p50_ci95: Interval | None = None
    latency_ms_p90: float | None = None
    latency_ms_p99: float | None = None
    latency_ms_p99_ci95: Interval | None = None
    latency_ms_mean: float | None = None
    throughput_ips: float | None = None  # images per second
    speedup: float | None = None  # original's p50 / this p50, same runtime, batch and threads
    speedup_ci95: Interval | None = None  # bootstrap of the ratio
    busy: str | None = None  # what kept the processors from it while it was timed
    verdict: str | None = None  # of the speed: "faster", "slower", "no difference", ...
    device_latency_ms_p50: float | None = None  # on the GPU alone, without copies
    device_latency_ms_p99: float | None = None
    energy_mj_per_image: dict[str, float] = {}  # by meter
    load_ms: float | None = None
    first_call_ms: float | None = None

    peak_memory_mib: float | None = None
    memory_mib: dict[str, float] = {}  # every further memory number, by name: load, activations...

    images: int | None = None  # labelled images the accuracy is taken over
    top1_pct: float | None = None
    top1_ci95: Interval | None = None
    top5_pct: float | None = None
    top5_ci95: Interval | None = None
    top1_change_pct: float | None = None  # this top-1 minus the original's, same images, points
    top1_change_ci95: Interval | None = None  # paired
    top1_p_value: float | None = None  # McNemar, against the original
    top1_verdict: str | None = None  # "no significant difference", or what it is instead
    agreement_pct: float | None = None  # images with the same answer as the original
    agreement_ci95: Interval | None = None
    flip_pct: float | None = None  # images the original had right and this has wrong
    sqnr_db: float | None = None  # of the logits, against the original
    ece_pct: float | None = None  # expected calibration error
    worst_class_drop_pct: float | None = None  # largest loss of recall of any class, points
    worst_class_drop_ci95: Interval | None = None
    worst_class: str | None = None

    agreement: MetricRecord | None = None  # with the original, where it is no percentage
    outputs: dict[str, dict[str, float]] | None = None  # of each output: sqnr_db, max_abs_diff
    metrics: dict[str, MetricRecord] | None = None  # of the task, where it is no classification
    primary: str | None = None  # the metric that gates and the verdict use
    changes: dict[str, ChangeRecord] | None = None  # of the metrics, against the original

    skipped: Reasons = {}  # field (or "latency", "memory", "accuracy") -> why it is absent

    @property
    def worst_sqnr_db(self) -> float | None:
        """Signal-to-noise ratio of the worst output, where images have no labels."""
        known = [each["sqnr_db"] for each in (self.outputs or {}).values() if "sqnr_db" in each]
        return min(known, default=None)

    @property
    def figure(self) -> Figure | None:
        """How good this is: the primary metric, top-1, or where nothing is labelled the SQNR."""
        main = self.main_metric
        if main is not None:
            unit = "%" if main.unit == "pct" else main.unit
            higher = main.higher_is_better is not False
            name = self.title_of(self.primary or "")
            return Figure(name=name, value=main.value, unit=unit, ci95=main.ci95,
                          higher_is_better=higher)  # fmt: skip
        if self.worst_sqnr_db is not None:
            return Figure(name="SQNR", value=self.worst_sqnr_db, unit="dB")
        if self.top1_pct is None:
            return None
        return Figure(name="top-1", value=self.top1_pct, unit="%", ci95=self.top1_ci95)

    def title_of(self, name: str) -> str:
        """Return what people call a metric of the task."""
        metric = (self.metrics or {}).get(name)
        return (metric and metric.title) or name

    @property
    def main_metric(self) -> MetricRecord | None:
        """The task's primary metric, where it is no classification."""
        return (self.metrics or {}).get(self.primary or "")

    @property
    def change(self) -> ChangeRecord | None:
        """The change of the task's primary metric, or of top-1, against the original."""
        value = self.top1_change_pct
        if self.primary is not None or value is None or not math.isfinite(value):
            return (self.changes or {}).get(self.primary or "")
        verdict = "worse" if value < 0 else "better"
        if not self._top1_differs:
            said = self.top1_verdict if self.top1_verdict != SAME else None
            bounds = self.top1_change_ci95
            verdict = said or (undecided(self.images, bounds) if bounds else None) or SAME
        return ChangeRecord(
            value=value, unit="pct", ci95=self.top1_change_ci95, drop=-value, verdict=verdict
        )

    @property
    def _top1_differs(self) -> bool:
        """Whether top-1 differs from the original's, as far as anything says."""
        if self.top1_p_value is not None:
            return self.top1_p_value < LEVEL
        if self.top1_verdict is not None:
            return self.top1_verdict != SAME
        return self.top1_change_ci95 is None or excludes(self.top1_change_ci95, 0.0)


class Variant(Record):
    """One network of the run: the original, or what a stage made of it."""

    name: str
    stage: str
    artifact: str | None = None  # path relative to the run folder
    sha256: str | None = None
    parent: str | None = None  # name of the variant it was made from
    params: int | None = None
    macs: int | None = None  # for one image
    size_mib: float | None = None  # of the artifact; what runs is in the results
    results: tuple[Result, ...] = ()
    skipped: Reasons = {}  # field or runtime -> why it is absent

    def results_beside(self, result: Result) -> list[Result]:
        """Return the results on the runtime of ``result``, of its batch and threads."""
        place = operator.attrgetter("runtime", "batch", "threads")
        return [each for each in self.results if place(each) == place(result)]

    def result_like(self, result: Result) -> Result | None:
        """Return that of ``results_beside`` in the same precision, or None."""
        beside = self.results_beside(result)
        return next((each for each in beside if each.precision == result.precision), None)


class Gate(Record):
    """A limit of the recipe, and what was measured against it."""

    name: str
    limit: float
    measured: float | None = None
    passed: bool
    variant: str | None = None
    runtime: str | None = None
    batch: int | None = None
    metric: str | None = None  # the primary metric of the task, where the gate is on that
    title: str | None = None  # what people call that metric; its name if absent
    unit: str | None = None  # of limit and measured, where that is the metric's
    reason: str | None = None  # why it is not passed, where the two figures do not say it


class Line(Record):
    """One line of a chart."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    is_reference: bool = False  # drawn in the background: a diagonal, a limit

    @model_validator(mode="after")
    def _same_length(self) -> Line:
        if len(self.x) != len(self.y):
            raise ValueError(f"line {self.name!r} has {len(self.x)} x and {len(self.y)} y values")
        return self


class Curve(Record):
    """A chart of lines: learning curves of a stage, or sensitivity of layers."""

    title: str
    x_label: str  # with its unit
    y_label: str  # with its unit
    lines: tuple[Line, ...]


class Channels(Record):
    """Channels of one layer before and after pruning."""

    layer: str
    before: int
    after: int


class Sparsity(Record):
    """Single weights of a variant that are zero, and what runtimes gain from them."""

    variant: str
    pattern: str  # unstructured, 2:4
    zero_weights_pct: float  # of the weights of convolutions and linear layers in its file
    runtimes: dict[str, str] = {}  # runtime -> what it does with zeros, and what was measured


class TensorRange(Record):
    """How one tensor is quantized."""

    tensor: str
    kind: Literal["weight", "activation"]
    bits: int
    low: float  # of the real values the codes cover
    high: float
    variant: str | None = None


class Island(Record):
    """Operations that stay in float between quantized ones."""

    nodes: tuple[str, ...]
    reason: str | None = None
    macs: int | None = None


class Coverage(Record):
    """How much of a variant really runs in int8 on a runtime."""

    variant: str
    runtime: str
    int8_macs_pct: float | None = None
    reformats: int | None = None
    islands: tuple[Island, ...] = ()


class ClassScores(Record):
    """Precision, recall and F1 of every class, in the order of ``Details.classes``."""

    variant: str
    runtime: str | None = None
    images: tuple[int, ...]  # of each class
    precision_pct: tuple[float | None, ...]  # None: never predicted
    recall_pct: tuple[float | None, ...]  # None: no image of the class
    f1_pct: tuple[float | None, ...]

    @model_validator(mode="after")
    def _same_length(self) -> ClassScores:
        columns = (self.images, self.precision_pct, self.recall_pct, self.f1_pct)
        if len(set(map(len, columns))) > 1:
            raise ValueError(f"the scores of {self.variant!r} are of different numbers of classes")
        return self


class Confusion(Record):
    """A confusion matrix by its non-zero cells."""

    variant: str
    runtime: str | None = None
    cells: tuple[tuple[Class, Class, Count], ...]  # true class, predicted class, images


class Flip(Record):
    """An image whose answer changed; a report holds those that were right before."""

    index: int  # in the test split
    label: int  # classes are positions in Details.classes
    before: int
    after: int
    before_confidence_pct: float | None = None
    after_confidence_pct: float | None = None
    variant: str | None = None
    runtime: str | None = None
    thumbnail: Png | None = None

    @property
    def kind(self) -> Literal["lost", "won", "other"]:
        """Return "lost" (was right, now wrong), "won" (the reverse) or "other" (wrong twice)."""
        if self.before == self.label:
            return "lost"
        return "won" if self.after == self.label else "other"


class Subgroup(Record):
    """Accuracy of one variant on the images with one value of a column of the data."""

    column: str
    value: str
    variant: str
    images: int
    top1_pct: float
    top1_ci95: Interval | None = None


class Calibration(Record):
    """Confidence against accuracy of one variant, in bins of confidence."""

    variant: str
    runtime: str | None = None
    ece_pct: float
    confidence_pct: tuple[float, ...] = ()  # mean of each bin that holds images
    accuracy_pct: tuple[float, ...] = ()
    images: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _one_of_each(self) -> Calibration:
        if not len(self.confidence_pct) == len(self.accuracy_pct) == len(self.images):
            raise ValueError("confidence, accuracy and images differ in their number of bins")
        return self


class Attribution(Record):
    """What the original and a variant looked at in one image."""

    index: int  # in the test split
    method: str
    label: int
    before: int  # answer of the original
    after: int
    variant: str
    similarity: float | None = None  # of the two maps, -1 to 1
    image: Png
    before_map: Png
    after_map: Png


class Similarity(Record):
    """Mean similarity of attribution maps of the original and a variant over a sample."""

    method: str
    variant: str
    mean: float  # -1 to 1
    ci95: Interval | None = None
    images: int
    measure: str = "Spearman rank correlation"


class ArtifactRecord(Record):
    """One file of the run and what it was made from."""

    path: str  # relative to the run folder
    sha256: str
    stage: str
    parent: str | None = None  # sha256
    settings: dict[str, Any] = {}
    bytes: int | None = None


class ClassMetrics(Record):
    """The task's metric of each class, where a task is not about one class an image."""

    variant: str
    runtime: str
    metric: str  # "IoU", "AP"; percent
    classes: tuple[str, ...]
    values: tuple[float | None, ...]  # None: the class never occurs
    ci95: tuple[Interval | None, ...]


class DrawnChange(Record):
    """A test image with what the original and a variant predict for it."""

    index: int
    variant: str
    runtime: str
    agreement: float | None  # of the two predictions; None: neither finds anything
    unit: str
    before: Png
    after: Png
    truth: Png | None = None
    change: Png | None = None  # where they differ


class Details(Record):
    """Details of a report: layers, classes, images, charts; each part is optional."""

    classes: tuple[str, ...] = ()
    tells_classes: bool = True  # one class an image: what follows from that is told
    class_metrics: tuple[ClassMetrics, ...] = ()  # the original first
    drawn: tuple[DrawnChange, ...] = ()  # the least alike first
    drawn_legend: str | None = None  # what these pictures leave out or stress
    channels: tuple[Channels, ...] = ()
    frozen: dict[str, str] = {}  # layer -> why it could not be cut
    sparsities: tuple[Sparsity, ...] = ()
    ranges: tuple[TensorRange, ...] = ()
    coverage: tuple[Coverage, ...] = ()
    learning: tuple[Curve, ...] = ()
    sensitivity: tuple[Curve, ...] = ()
    class_scores: tuple[ClassScores, ...] = ()  # the original first
    confusions: tuple[Confusion, ...] = ()  # the original first
    flips: tuple[Flip, ...] = ()
    subgroups: tuple[Subgroup, ...] = ()
    calibration: tuple[Calibration, ...] = ()
    attributions: tuple[Attribution, ...] = ()
    similarities: tuple[Similarity, ...] = ()
    artifacts: tuple[ArtifactRecord, ...] = ()
    methods: dict[str, str] = {}  # quantity -> how it was measured, and what the number is not
    skipped: Reasons = {}  # name of a part above -> why it is absent


class DataRecord(Record):
    """The images a run used."""

    name: str
    fingerprint: str
    images: dict[str, int] = {}  # of each split
    calibration_sha256: str | None = None  # of the pixels of the images that int8 ranges are from


class Provenance(Record):
    """Everything needed to judge the numbers and to make them again."""

    created: str | None = None  # ISO 8601, UTC
    command: str | None = None  # reproduces the run
    commit: str | None = None
    seed: int | None = None
    settings: dict[str, Any] = {}  # resolved
    data: DataRecord | None = None
    device: dict[str, Any] = {}  # cpu, cores, gpu, ...
    conditions: dict[str, Any] = {}  # clocks, temperature, throttling while it was measured
    versions: dict[str, str] = {}


class Report(Record):
    """The content of report.json."""

    schema_version: int = Field(SCHEMA, alias="schema")
    name: str = "run"
    recipe: dict[str, Any] = {}
    provenance: Provenance = Provenance()
    variants: tuple[Variant, ...] = ()  # the original first, each stage after it
    gates: tuple[Gate, ...] = ()
    verdict: str = ""  # filled by `write` when empty
    details: Details = Details()
    skipped: Reasons = {}  # runtime, stage or anything else -> why it is absent
    refused: Reasons = {}  # kind of int8 graph that the recipe wants -> why none was written
    incomplete: tuple[str, ...] = ()  # what is missing or wrong in the run folder itself
    cautions: tuple[str, ...] = ()  # likely mistakes of the recipe; machines that were busy
    notes: tuple[str, ...] = ()  # of int8 plans: what was decided, what stays in float
    trials: tuple[str, ...] = ()  # of int8 plans: what was tried, and what it brought
    untrained: str | None = None  # why the original's accuracy means nothing, if it does not

    @property
    def original(self) -> Variant | None:
        """The variant everything is compared with: the one called original, else the first."""
        return self.variant("original") or (self.variants[0] if self.variants else None)

    def variant(self, name: str) -> Variant | None:
        """Return the variant of that name, or None."""
        return next((variant for variant in self.variants if variant.name == name), None)
