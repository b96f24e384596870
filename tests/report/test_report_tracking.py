"""The figures of a report in TensorBoard and MLflow, read back with their own readers."""

from __future__ import annotations

import made_up
import pytest

from compress.errors import MissingPackageError, UnknownNameError
from compress.report import write
from compress.report.tracking import tracked_metrics, tracked_settings, tracker


def test_every_figure_has_a_name_of_its_own():
    report = made_up.report()
    found = tracked_metrics(report)
    assert found["int8-onnxruntime/onnxruntime/batch-1/latency_ms_p50"] == pytest.approx(
        2.84 / 3.91
    )
    assert found["original/params"] == 272_474
    assert found["pruned/openvino/batch-8/activations_mib"] == 12.0
    assert "original/onnxruntime/batch-1/agreement_pct" not in found


def test_the_recipe_is_flattened():
    found = tracked_settings(made_up.report())
    assert found["stages.0.prune.keep_macs"] == "0.5"
    assert found["targets.0.runtime"] == "onnxruntime"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_the_figures_back(tmp_path):
    pytest.importorskip(
        "tensorboard", reason="no tensorboard: pip install 'compress-cnn[tracking]'"
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = write(made_up.report(), tmp_path)
    assert f"--logdir {tmp_path}" in tracker("tensorboard")(report, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "report"))
    events.Reload()
    for name, value in tracked_metrics(report).items():
        assert events.Scalars(name)[0].value == pytest.approx(value, rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_mlflow_reads_the_figures_back(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="no mlflow: pip install 'compress-cnn[tracking]'")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    try:
        client = mlflow.MlflowClient()
        client.create_experiment("compress", artifact_location=(tmp_path / "files").as_uri())
        report = write(made_up.report(), tmp_path / "run")
        told = tracker("mlflow")(report, tmp_path / "run")
        (run,) = client.search_runs([client.get_experiment_by_name("compress").experiment_id])
        assert run.data.metrics == pytest.approx(tracked_metrics(report))
        assert run.data.params == tracked_settings(report)
        assert run.info.status == "FINISHED"
        assert run.info.run_id in told
        names = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert names == {"report.html", "report.md", "report.json"}
    finally:
        mlflow.set_tracking_uri(None)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_an_absent_tracker_names_the_extra(monkeypatch, name):
    monkeypatch.setattr("compress.packages.is_installed", lambda name: False)
    with pytest.raises(MissingPackageError, match=r"compress-cnn\[tracking\]"):
        tracker(name)


def test_an_unknown_tracker_names_those_there_are():
    with pytest.raises(UnknownNameError, match=r"no such tracker 'wandb'.*mlflow, tensorboard"):
        tracker("wandb")
