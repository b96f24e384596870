"""The doctor tells what is there, what is missing and what that would enable."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from compress import packages, plugins
from compress.cli import doctor


def test_examination_names_every_runtime_and_says_why_not() -> None:
    found = doctor.examine()
    assert [state.name for state in found.runtimes] == plugins.names("runtimes")
    assert all(state.reason for state in found.runtimes)
    onnxruntime = next(s for s in found.runtimes if s.name == "onnxruntime")
    assert onnxruntime.runs
    assert "CPU" in onnxruntime.reason
    assert json.loads(json.dumps(found.to_json()))["machine"]["python"]


def test_missing_packages_come_with_what_they_enable_and_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packages, "version", lambda name: None if name == "timm" else "1.0")
    found = {piece.name: piece for piece in doctor.pieces()}
    assert found["timm"].version is None
    assert found["timm"].install == "pip install 'compress-cnn[timm]'"
    assert found["openvino"].version == "1.0"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(doctor.Examination({}, tuple(found.values()), ()).table())
    shown = console.export_text()
    assert "networks by timm:NAME" in shown
    assert "pip install 'compress-cnn[timm]'" in shown
    assert "pip install 'compress-cnn[openvino]'" not in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.skipif(not packages.is_installed("tensorrt_rtx"), reason="not installed")
def test_tensorrt_rtx_without_a_gpu_builds_all_the_same() -> None:
    found = doctor.state("tensorrt-rtx")
    assert not found.runs
    assert "builds engines here all the same" in found.reason


class Answers(nn.Module):
    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        self.values = torch.tensor([list(values)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.values


@pytest.mark.parametrize(
    ("values", "outcome"), [((1.0, 2.0), "passed"), ((1.0, 2.1), "failed")], ids=["right", "wrong"]
)
def test_a_trial_compares_and_never_raises(values: tuple[float, ...], outcome: str) -> None:
    images, expected = np.zeros((1, 2), np.float32), np.array([[1.0, 2.0]])
    trial = doctor._try("pytorch", "fp32", Answers(values), images, expected)
    assert trial.outcome == outcome
    broken = doctor._try("pytorch", "fp32", nn.Linear(3, 3), images, expected)
    assert (broken.outcome, broken.detail[:9]) == ("failed", "PyTorch: ")


@pytest.mark.slow
def test_selftest_tries_every_runtime_in_fp32_and_int8() -> None:
    found = doctor.examine(selftest=True)
    assert [t for t in found.trials if t.outcome == "failed"] == []
    tried = {(t.runtime, t.precision): t.outcome for t in found.trials}
    assert tried["onnxruntime", "int8"] == "passed"
    assert tried["pytorch", "fp32"] == "passed"
    assert {runtime for runtime, _ in tried} == set(plugins.names("runtimes"))
