"""A made-up report with every part filled, of any size, that no measurement stands behind."""

from __future__ import annotations

import hashlib
import io
from base64 import b64encode

import numpy as np
from PIL import Image

from compress.report.schema import (
    ArtifactRecord,
    Attribution,
    Calibration,
    Channels,
    ClassScores,
    Confusion,
    Coverage,
    Curve,
    DataRecord,
    Details,
    Flip,
    Gate,
    Island,
    Line,
    Provenance,
    Report,
    Result,
    Similarity,
    Subgroup,
    TensorRange,
    Variant,
)

NAMES = ("original", "pruned", "distilled", "int8-onnxruntime")
CIFAR = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905


def hashed(number: int) -> str:
    """A hash that stands for a file."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def result(variant: int, runtime: str, batch: int, *, top1: float = 91.7) -> Result:
    """One result: later variants are faster, and a little worse."""
    first = {"onnxruntime": 2.84, "openvino": 2.31, "pytorch": 7.9}.get(runtime, 1.0)
    latency = first * batch**0.8 / (1.0, 1.71, 1.72, 3.91, 4.4, 5, 6, 7, 8, 9)[variant]
    change = (0.0, -3.4, -0.28, -0.31, -0.4, -0.5, -0.6, -0.7, -0.8, -0.9)[variant]
    speedup = first * batch**0.8 / latency
    after = variant > 0
    return Result(
        runtime=runtime,
        precision="int8" if variant >= 3 else "fp32",
        device="cpu",
        batch=batch,
        threads=2,
        latency_ms_p50=latency,
        latency_ms_p50_ci95=(latency * 0.97, latency * 1.04),
        latency_ms_p90=latency * 1.1,
        latency_ms_p99=latency * 1.31,
        latency_ms_p99_ci95=(latency * 1.2, latency * 1.6),
        throughput_ips=1000 * batch / latency,
        speedup=speedup,
        speedup_ci95=(speedup * 0.96, speedup * 1.05) if after else None,
        peak_memory_mib=61.5 - 4 * variant + batch,
        memory_mib={"weights_mib": 1.5 / (variant + 1), "activations_mib": 1.5 * batch},
        energy_mj_per_image={"cpu_package": 9.0 * latency / batch},
        load_ms=21.0 + variant,
        first_call_ms=3 * latency,
        images=10_000,
        top1_pct=top1 + change,
        top1_ci95=(top1 + change - 0.55, top1 + change + 0.53),
        top5_pct=99.6 + change / 10,
        top5_ci95=(99.4 + change / 10, 99.7 + change / 10),
        top1_change_pct=change if after else None,
        top1_change_ci95=(change - 0.31, change + 0.31) if after else None,
        top1_p_value=(0.001 if abs(change) > 0.31 else 0.2) if after else None,
        agreement_pct=100.0 + change * 2 if after else None,
        flip_pct=-change * 1.4 if after else None,
        sqnr_db=(None, 8.1, 21.0, 18.7, 18.0, 17.0, 16.0, 15.0, 14.0, 13.0)[variant],
        ece_pct=3.9 + 0.4 * variant,
        worst_class_drop_pct=1.9 - change if after else None,
        worst_class="cat" if after else None,
    )


def report(
    variants: int = 4, classes: int = 10, *, names: tuple[str, ...] | None = None, seed: int = 0
) -> Report:
    """A report of so many variants and classes, with every part of the details filled."""
    rng = np.random.default_rng(seed)
    named = list(NAMES[:variants]) + [f"int8-{i}" for i in range(4, variants)]
    labels = names or tuple(CIFAR if classes == 10 else (f"class {i:04d}" for i in range(classes)))
    return Report(
        name="resnet20-cifar10",
        recipe={
            "model": {"name": "networks.py:resnet20"},
            "data": {"name": "cifar10"},
            "stages": [{"prune": {"keep_macs": 0.5}}, {"distill": {}}, {"quantize": {}}],
            "targets": [{"runtime": "onnxruntime", "precision": "int8", "batch": 1}],
            "gates": {"top1_drop_pct": 1.0, "speedup": 2.0},
        },
        provenance=_provenance(),
        variants=tuple(_variant(i, name, named) for i, name in enumerate(named)),
        gates=(
            Gate(
                name="top1_drop_pct", limit=1.0, measured=0.31, passed=True, runtime="onnxruntime"
            ),
            Gate(name="speedup", limit=2.0, measured=3.91, passed=True, runtime="onnxruntime"),
            Gate(name="worst_class_drop_pct", limit=2.0, measured=2.21, passed=False),
        ),
        details=_details(named, labels, rng),
        skipped={"tensorrt-rtx": "no NVIDIA GPU was found; the engine was built, not run"},
    )


def png(rng: np.random.Generator, size: int = 32) -> str:
    """A picture of soft noise as a PNG data URI."""
    coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def _variant(position: int, name: str, named: list[str]) -> Variant:
    own = "openvino" if name.endswith("openvino") else "onnxruntime"
    runtimes = ("onnxruntime", "openvino") if position < 3 else (own,)
    stages = ("train", "prune", "distill", "quantize")
    return Variant(
        name=name,
        stage=stages[min(position, 3)],
        artifact=f"{position:02d}-{stages[min(position, 3)]}/model.onnx",
        sha256=hashed(position),
        parent=named[position - 1] if position else None,
        params=(272_474, 121_006, 121_006)[min(position, 2)],
        macs=(40_813_184, 20_202_000, 20_202_000)[min(position, 2)],
        size_mib=(1.05, 0.48, 0.48, 0.142)[min(position, 3)],
        results=tuple(result(position, r, b) for r in runtimes for b in (1, 8)),
        skipped={} if position < 3 else {"openvino": "this graph is written for onnxruntime"},
    )


def _provenance() -> Provenance:
    return Provenance(
        created="2026-11-21T20:15:00Z",
        command="compress run recipes/resnet20-cifar10.yaml --set seed=0",
        commit="78c7279a0c1b",
        seed=0,
        data=DataRecord(
            name="cifar10",
            fingerprint="sha256:" + "ab" * 32,
            images={"train": 45_000, "validation": 5_000, "test": 10_000},
            calibration_sha256="cd" * 32,
        ),
        device={"cpu": "Intel Xeon Platinum 8481C", "cores": 2, "clock_mhz": 2700},
        versions={"compress": "0.1.0", "torch": "2.15.0", "onnxruntime": "1.31.1"},
        settings={"prune": {"criterion": "l2", "keep_macs": 0.5, "round_to": 8}},
    )


def _details(named: list[str], labels: tuple[str, ...], rng: np.random.Generator) -> Details:
    layers = [f"layer{s}.{i}.conv{j}" for s in (1, 2, 3) for i in range(3) for j in (1, 2)]
    return Details(
        classes=labels,
        channels=tuple(
            Channels(layer=layer, before=16 << n // 6, after=int(rng.integers(5, 16)) << n // 6)
            for n, layer in enumerate(layers)
        ),
        frozen={"linear": "it makes the output", "layer2.0": "padded shortcut, net.py:41"},
        ranges=tuple(_range(layer, named[-1], rng) for layer in layers),
        coverage=(
            Coverage(
                variant=named[-1],
                runtime="onnxruntime",
                int8_macs_pct=97.2,
                islands=(Island(nodes=("ReduceMean_12",), reason="stays float", macs=4096),),
            ),
        ),
        learning=(_learning("Distillation", rng), _learning("Fine-tuning", rng)),
        sensitivity=(_sensitivity(layers, rng),),
        class_scores=tuple(_scores(name, labels, i) for i, name in enumerate(named)),
        confusions=tuple(_confusion(name, len(labels), rng) for name in (named[0], named[-1])),
        flips=tuple(_flip(n, len(labels), named[-1], rng) for n in range(24)),
        subgroups=tuple(
            Subgroup(
                column="weather", value=value, variant=name, images=400, top1_pct=top1 - 2 * i,
                top1_ci95=(top1 - 2 * i - 3.0, top1 - 2 * i + 3.0),
            )
            for value, top1 in (("sun", 93.0), ("rain", 88.0))
            for i, name in enumerate((named[0], named[-1]))
        ),
        calibration=tuple(_calibration(name, i) for i, name in enumerate((named[0], named[-1]))),
        attributions=tuple(_attribution(n, named[-1], rng) for n in range(4)),
        similarities=(
            Similarity(method="grad-cam", variant=named[-1], mean=0.9, ci95=(0.8, 0.9), images=64),
        ),
        artifacts=tuple(
            ArtifactRecord(
                path=f"{i:02d}-{name}/model.onnx", sha256=hashed(i), stage=name,
                parent=hashed(i - 1) if i else None, bytes=1_101_004,
            )
            for i, name in enumerate(named)
        ),
        methods={
            "latency": "host clock, warm-up, interleaved rounds; bootstrap of the ratio",
            "top-1": "10,000 test images, none used in training; Wilson; paired bootstrap",
        },
    )  # fmt: skip


def _range(layer: str, variant: str, rng: np.random.Generator) -> TensorRange:
    high = float(rng.uniform(1, 9))
    return TensorRange(
        tensor=f"{layer}.output", kind="activation", bits=8, low=0.0, high=high, variant=variant,
    )  # fmt: skip


def _learning(title: str, rng: np.random.Generator) -> Curve:
    epochs = np.arange(1, 21)
    rise = 91 - 30 * np.exp(-epochs / 4) + rng.normal(0, 0.4, len(epochs))
    lines = (
        Line(name="train", x=tuple(epochs), y=tuple(rise + 1.5)),
        Line(name="validation", x=tuple(epochs), y=tuple(rise)),
    )
    return Curve(title=title, x_label="epoch", y_label="top-1, %", lines=lines)


def _sensitivity(layers: list[str], rng: np.random.Generator) -> Curve:
    kept = (0.25, 0.5, 0.75, 1.0)
    lines = tuple(
        Line(name=layer, x=kept, y=tuple(91.7 - rng.uniform(0, 60) * (1 - k) ** 2 for k in kept))
        for layer in layers[:6]
    )
    return Curve(title="Pruning", x_label="channels kept", y_label="top-1, %", lines=lines)


def _scores(name: str, labels: tuple[str, ...], position: int) -> ClassScores:
    base = [95.0 - position * 0.3 - (n * 7 % 11) * (1 + 0.1 * position) for n in range(len(labels))]
    return ClassScores(
        variant=name, runtime="onnxruntime", images=tuple([1000] * len(labels)),
        precision_pct=tuple(b - 0.5 for b in base), recall_pct=tuple(base),
        f1_pct=tuple(b - 0.25 for b in base),
    )  # fmt: skip


def _confusion(name: str, classes: int, rng: np.random.Generator) -> Confusion:
    cells = [(c, c, 900) for c in range(classes)]
    wrong = {
        (c, int(p)) for c in range(classes) for p in rng.integers(0, classes, 5) if int(p) != c
    }
    return Confusion(
        variant=name,
        runtime="onnxruntime",
        cells=(*cells, *((a, b, int(rng.integers(1, 40))) for a, b in sorted(wrong))),
    )


def _flip(n: int, classes: int, variant: str, rng: np.random.Generator) -> Flip:
    label, after = n % classes, (n + 1 + n // classes) % classes
    return Flip(
        index=37 * n, label=label, before=label, after=after,
        before_confidence_pct=float(rng.uniform(40, 99)),
        after_confidence_pct=float(rng.uniform(40, 99)),
        variant=variant, runtime="onnxruntime", thumbnail=png(rng),
    )  # fmt: skip


def _calibration(name: str, position: int) -> Calibration:
    confidence = tuple(float(c) for c in range(15, 100, 10))
    return Calibration(
        variant=name, runtime="onnxruntime", ece_pct=3.9 + position,
        confidence_pct=confidence,
        accuracy_pct=tuple(c * (0.95 - 0.04 * position) for c in confidence),
        images=tuple(range(100, 1000, 100)),
    )  # fmt: skip


def _attribution(n: int, variant: str, rng: np.random.Generator) -> Attribution:
    return Attribution(
        index=37 * n, method="grad-cam", label=n, before=n, after=n + 1, variant=variant,
        similarity=0.9 - 0.1 * n, image=png(rng), before_map=png(rng), after_map=png(rng),
    )  # fmt: skip
