"""An int8 graph that brings nothing, or costs too much, is not passed off as a success."""

from __future__ import annotations

import sys

import onnx
import pytest
from int8_graphs import Sketch

from compress.cli import app

SMALL = (
    "--samples", "16", "--method", "plain", "--set", "measure.rounds=3",
    "--set", "measure.round_ms=5", "--set", "measure.test_images=64",
)  # fmt: skip


@pytest.fixture
def quantize(monkeypatch, capsys, tmp_path):
    """Quantize a network for the bundled digits; returns (exit code, what was printed)."""
    s = Sketch((1, 8, 8))
    s.head(s.relu(s.conv(s.relu(s.conv("input", "a", 1, 8)), "b", 8, 12)), 12)
    onnx.save(s.model(), str(tmp_path / "m.onnx"))

    def call(*options):
        arguments = [tmp_path / "m.onnx", "--data", "digits", *SMALL, "--out", tmp_path / "run"]
        words = ["compress", "quantize", *arguments, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        with pytest.raises(SystemExit) as ended:
            app.main()
        out, _ = capsys.readouterr()
        return ended.value.code, " ".join(out.split())

    return call


def test_int8_that_is_not_fast_enough_fails_its_gate(quantize):
    code, said = quantize("--set", "gates.speedup=1000")
    assert code == 1
    assert "speed-up at least 1000x (int8-onnxruntime on onnxruntime, batch 1)" in said
    assert "failed" in said


def test_a_budget_of_accuracy_fails_where_the_original_is_untrained(quantize):
    code, said = quantize("--max-drop", "0", "--set", "gates.top1_drop_pct=-100")
    assert code == 1
    assert "not measured because the original is no fair reference" in said


def test_without_a_gate_the_work_is_done_and_the_verdict_and_the_plan_tell(quantize):
    code, said = quantize()
    assert code == 0
    assert "int8-onnxruntime: judged on 8 images: an SQNR may be some dB off" in said
    assert "on onnxruntime cpu, batch 1" in said
