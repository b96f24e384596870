"""The figures of a report in TensorBoard or MLflow, beside the curves of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from compress.errors import UnknownNameError
from compress.packages import require
from compress.report.schema import Report, Result
from compress.report.text import markdown

EXPERIMENT = "compress"
LONGEST = 500  # characters of a parameter in MLflow


def tracker(name: str) -> Callable[[Report, Path], str]:
    """Return a function that logs every figure of a report, its recipe, and the report itself.

    It takes a report and the folder of its run, below which event files of TensorBoard go, and
    returns in a sentence where the figures are. ``name`` is "tensorboard", or "mlflow" with the
    server that MLflow is configured for.

    Raises:
        UnknownNameError: there is no such tracker.
        MissingPackageError: the tracker is not installed.
    """
    known = {"tensorboard": _to_tensorboard, "mlflow": _to_mlflow}
    if name not in known:
        raise UnknownNameError("tracker", name, known)
    require(name, extra="tracking", purpose=f"tracker {name!r}")
    return known[name]


def tracked_metrics(report: Report) -> dict[str, float]:
    """Return "variant/runtime/batch-n/field" -> value for every figure that was measured."""
    found: dict[str, float] = {}
    for variant in report.variants:
        own = {"params": variant.params, "macs": variant.macs, "size_mib": variant.size_mib}
        found |= {f"{variant.name}/{key}": float(v) for key, v in own.items() if v is not None}
        for result in variant.results:
            place = f"{variant.name}/{result.runtime}/batch-{result.batch}"
            found |= {f"{place}/{key}": value for key, value in _figures(result)}
    return found


def _figures(result: Result) -> Iterator[tuple[str, float]]:
    for key in type(result).model_fields:
        value = getattr(result, key)
        if isinstance(value, float):
            yield key, value
    yield from result.memory_mib.items()
    for meter, value in result.energy_mj_per_image.items():
        yield f"energy_mj_per_image_{meter}", value


def tracked_settings(report: Report) -> dict[str, str]:
    """Return the recipe as dotted keys, each value as text."""
    return dict(_flat("", report.recipe))


def _flat(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{prefix}{key}.", item)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _flat(f"{prefix}{position}.", item)
    elif value is not None:
        yield prefix[:-1], str(value)[:LONGEST]


def _to_tensorboard(report: Report, folder: Path) -> str:
    from torch.utils.tensorboard import SummaryWriter

    logs = folder / "tensorboard"
    with SummaryWriter(str(logs / "report")) as writer:
        for name, value in tracked_metrics(report).items():
            writer.add_scalar(name, value, 0)
        writer.add_text("report", markdown(report), 0)
    return f"{report.name} is in TensorBoard: tensorboard --logdir {logs}"


def mlflow_run(name: str) -> tuple[Any, str]:
    """Return a client of MLflow's server and the id of a new run, one experiment for all."""
    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    identity = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
    return client, client.create_run(identity, run_name=name).info.run_id


def _to_mlflow(report: Report, folder: Path) -> str:
    import mlflow

    client, run = mlflow_run(report.name)
    for name, text in tracked_settings(report).items():
        client.log_param(run, name, text)
    for name, value in tracked_metrics(report).items():
        client.log_metric(run, name, value)
    client.set_tag(run, "verdict", report.verdict)
    for name in ("report.html", "report.md", "report.json"):
        if (folder / name).is_file():  # a half-finished run has none
            client.log_artifact(run, str(folder / name))
    client.set_terminated(run)
    return f"{report.name} is in MLflow: run {run} of {EXPERIMENT!r} at {mlflow.get_tracking_uri()}"
