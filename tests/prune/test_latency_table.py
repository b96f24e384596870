"""The table interpolates only what is smooth, the knapsack spends time where it matters most."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import compress
from compress.cli import app
from compress.errors import EngineError, PlanError
from compress.groups import trace
from compress.measure import count_module
from compress.prune import latency as latency_budget
from compress.prune import latency_table, one_budget
from compress.prune.latency import (
    LatencyCheck,
    LayerTimes,
    Stopwatch,
    check_latency,
    knapsack,
)
from compress.prune.latency_table import (
    LatencyTable,
    LayerShape,
    kernel_step,
    layer_graph,
    layer_module,
    time_calls,
)
from compress.prune.selection import CandidateCounts, candidate_counts

CONV = LayerShape((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (16, 16))


def smooth(_shape: LayerShape, inputs: int, outputs: int) -> float:
    return 0.01 + 1e-4 * inputs * outputs


def stairs(_shape: LayerShape, inputs: int, outputs: int) -> float:
    return 0.01 + 1e-3 * inputs * math.ceil(outputs / 16)


def test_a_smooth_layer_is_interpolated_from_few_points() -> None:
    table = LatencyTable(smooth)
    for inputs, outputs in [(64, 128), (33, 77), (5, 128), (64, 9)]:
        assert table.ms(CONV, inputs, outputs, (64, 128)) == pytest.approx(
            smooth(CONV, inputs, outputs)
        )
    assert table.measured <= 6


def test_a_staircase_is_measured_until_it_is_followed() -> None:
    table = LatencyTable(stairs)
    for outputs in (128, 120, 113, 112, 100, 97, 96):
        answer = table.ms(CONV, 64, outputs, (64, 128))
        assert answer == pytest.approx(stairs(CONV, 64, outputs), rel=0.15)
    assert table.measured > 6


def test_measurements_outlive_the_process(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "table.json"
    first = LatencyTable(smooth, file)
    answer = first.ms(CONV, 20, 30, (64, 64))
    first.save()

    def refuse(*_: Any) -> float:
        raise RuntimeError("measured again")

    assert LatencyTable(refuse, file).ms(CONV, 20, 30, (64, 64)) == answer


def test_a_damaged_cache_is_measured_anew(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text("{broken")
    table = LatencyTable(smooth, file)
    assert table.ms(CONV, 20, 30, (64, 64)) == pytest.approx(smooth(CONV, 20, 30))
    table.save()
    assert LatencyTable(smooth, file).measured == 0


def test_depthwise_layers_lie_on_a_line() -> None:
    seen = []

    def measure(shape: LayerShape, inputs: int, outputs: int) -> float:
        seen.append(inputs)
        return 0.1 * outputs

    shape = LayerShape((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (16, 16), groups=0)
    assert LatencyTable(measure).ms(shape, 24, 24, (64, 64)) == pytest.approx(2.4)
    assert set(seen) == {1}


@pytest.mark.parametrize(("width", "expected"), [(16, 16), (8, 8), (1, 1)])
def test_the_step_of_the_kernels_is_found(width: int, expected: int) -> None:
    def measure(_shape: LayerShape, inputs: int, outputs: int) -> float:
        return inputs * math.ceil(outputs / width) * width

    assert kernel_step(LatencyTable(measure), CONV, 64, 70) == expected


@pytest.mark.parametrize(
    ("shape", "inputs", "module"),
    [
        (LayerShape((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), (9, 9)), 6, nn.Conv2d(6, 8, 3, 2, 1)),
        (
            LayerShape((3, 3), (1, 1), (2, 2, 2, 2), (2, 2), (9, 9), 2),
            6,
            nn.Conv2d(6, 8, 3, 1, 2, 2, 2),
        ),
        (LayerShape((3,), (1,), (0, 0), (1,), (9,), 0), 8, nn.Conv1d(8, 8, 3, groups=8)),
        (LayerShape((), (), (), (), (), rows=5), 6, nn.Linear(6, 8)),
    ],
    ids=["strided", "dilated in groups", "depthwise 1d", "linear"],
)
def test_a_layer_is_written_as_torch_runs_it(
    shape: LayerShape, inputs: int, module: nn.Module
) -> None:
    graph = layer_graph(shape, inputs, 8)
    onnx.checker.check_model(graph, full_check=True)
    weights = {i.name: torch.tensor(onnx.numpy_helper.to_array(i)) for i in graph.graph.initializer}
    weight = weights["weight"].T if not shape.kernel else weights["weight"]
    module.load_state_dict({"weight": weight, "bias": weights["bias"]})
    size = [d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim]
    x = torch.randn(size)
    from onnx.reference import ReferenceEvaluator

    (answer,) = ReferenceEvaluator(graph).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(answer, module(x).detach().numpy(), atol=1e-4)
    same = layer_module(shape, inputs, 8)
    same.load_state_dict(module.state_dict())
    torch.testing.assert_close(same(x), module(x))


def test_a_layer_with_more_padding_after_than_before_is_torchs_pad() -> None:
    shape = LayerShape((3, 3), (2, 2), (0, 1, 2, 3), (1, 1), (9, 9))
    made = layer_module(shape, 3, 4)
    x = torch.randn(1, 3, 9, 9)
    pad, layer = made.children()
    expected = layer(nn.functional.pad(x, (1, 3, 0, 2)))
    assert isinstance(pad, nn.ConstantPad2d)
    torch.testing.assert_close(made(x), expected)


def test_a_call_is_timed_by_a_quantile(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    calls = itertools.count()
    monkeypatch.setattr(latency_table.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += 0.002 if next(calls) % 3 else 0.010  # 2 ms, disturbed every third time

    assert time_calls(call, 0.2, quantile=0.1) == pytest.approx(2.0)
    assert time_calls(call, 0.2, quantile=0.9) == pytest.approx(10.0)
    assert time_calls(call, 0.2) == pytest.approx(2.0)


def tiny_case(seed: int) -> tuple[list[CandidateCounts], list[np.ndarray], Any, list[list[int]]]:
    draw = np.random.default_rng(seed)
    candidates = [candidate_counts(draw.random(6), step=1, at_least=1) for _ in range(3)]
    importance = [one.scores for one in candidates]
    rates = draw.random(3) + 0.1

    def total(counts: np.ndarray, layers: Any = None) -> float:
        chosen = range(3) if layers is None else layers
        return float(sum(rates[i] * counts[i] * counts[(i + 1) % 3] for i in chosen))

    return candidates, importance, total, [[g, (g - 1) % 3] for g in range(3)]


@pytest.mark.parametrize("seed", range(6))
def test_knapsack_is_close_to_the_best_there_is(seed: int) -> None:
    candidates, importance, total, changed = tiny_case(seed)
    target = 0.5 * total(np.array([6, 6, 6]))
    counts = knapsack(candidates, importance, total, changed, target)
    assert total(counts) <= target

    def value(candidate: Any) -> float:
        return float(sum(v[:c].sum() for v, c in zip(importance, candidate, strict=True)))

    every = itertools.product(range(1, 7), repeat=3)
    best = max(value(c) for c in every if total(np.array(c)) <= target)
    assert value(counts) >= 0.93 * best


def test_knapsack_steps_over_plateaus() -> None:
    """Cutting one unit saves nothing, cutting four does: the step must be seen as a whole."""
    scores = np.array([4.0, 3.0, 2.0, 1.0, 0.9, 0.8, 0.7, 0.6])
    one = candidate_counts(scores, step=1, at_least=1)

    def total(counts: np.ndarray, _layers: Any = None) -> float:
        return float(math.ceil(counts[0] / 4))

    assert knapsack([one], [one.scores], total, [[0]], 1.0).tolist() == [4]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1, groups=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


EXAMPLE = torch.zeros(1, 3, 8, 8)


def test_layer_times_follow_the_channels() -> None:
    model = Net()
    network = trace(model, EXAMPLE)
    seen: list[tuple[int, int]] = []

    def measure(_shape: LayerShape, inputs: int, outputs: int) -> float:
        return 1e-3 * inputs * outputs

    times = LayerTimes(model, EXAMPLE, network, LatencyTable(measure))
    counts = np.array([group.size for group in network.groups])
    assert times.total(counts) == pytest.approx(1e-3 * (3 * 32 + 32 * 32 + 32 * 5))
    counts[0] = 10
    assert times.total(counts) == pytest.approx(1e-3 * (3 * 10 + 10 * 32 + 32 * 5))
    assert not seen


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a network takes 0.2 ms plus 1 ns for each multiply-accumulate, at first.

    Every stopwatch finds it at another pace, as virtual machines are.
    """

    def measure(shape: LayerShape, inputs: int, outputs: int) -> float:
        places = int(np.prod(shape.size)) if shape.kernel else 1
        return 1e-6 * inputs * outputs * places * int(np.prod(shape.kernel or (1,)))

    table = LatencyTable(measure)
    monkeypatch.setattr(latency_budget, "table_for", lambda runtime: table)

    torch.manual_seed(0)  # which channels go decides how finely time can be cut
    paces = itertools.cycle([1.0, 1.7, 0.6])  # of the machine, from one stopwatch to the next

    class Simulated(Stopwatch):
        def __init__(self, *args: Any) -> None:
            self.pace = next(paces)
            super().__init__(*args)

        def _session(self, model: nn.Module, _stack: Any) -> Any:
            return 0.2 + 1e-6 * count_module(model, self._example).macs

        def _time(self, session: Any, _seconds: float) -> float:
            return self.pace * float(session)

    monkeypatch.setattr(latency_budget, "Stopwatch", Simulated)


@pytest.mark.usefixtures("simulated")
class TestLatencyBudget:
    def test_the_promise_is_kept_and_used(self) -> None:
        plan = compress.plan_pruning(Net(), EXAMPLE, latency_ms=0.5)
        took = 0.2 + 1e-6 * count_module(compress.apply_pruning(Net(), plan), EXAMPLE).macs
        assert 0.4 <= took <= 0.5
        assert plan.about["latency"]["planned_ms"] == pytest.approx(took, abs=1e-3)
        assert plan.about["budget"] == {"latency_ms": 0.5, "runtime": "onnxruntime"}

    def test_a_share_of_the_latency_does_not_depend_on_the_machines_pace(self) -> None:
        model = Net()
        plans = [compress.plan_pruning(model, EXAMPLE, keep_latency=0.5) for _ in range(3)]
        first, *others = [plan.about.pop("latency") for plan in plans]
        assert {first["original_ms"]}.isdisjoint(other["original_ms"] for other in others)
        assert all(plan.to_json() == plans[0].to_json() for plan in plans)
        assert 0.45 <= first["planned_ms"] / first["original_ms"] <= 0.5
        assert first["kept"]
        assert plans[0].about["budget"] == {"keep_latency": 0.5, "runtime": "onnxruntime"}

    @pytest.mark.parametrize("rounds", [1, 3])
    def test_rounds_share_the_latency_and_keep_the_promise_together(self, rounds: int) -> None:
        model = small = Net()
        total = None
        for number in range(1, rounds + 1):
            budget = one_budget(keep_latency=0.5).in_round(number, rounds, total).to_json()
            plan = compress.plan_pruning(small, EXAMPLE, criterion="l2", **budget)
            small = compress.apply_pruning(small, plan)
            total = plan if total is None else total.then(plan)
        assert total is not None
        found = check_latency(small, model, total, EXAMPLE)
        original_ms = 0.2 + 1e-6 * count_module(model, EXAMPLE).macs
        assert found.measured_ms / found.promised_ms == pytest.approx(
            (0.2 + 1e-6 * count_module(small, EXAMPLE).macs) / (0.5 * original_ms), rel=1e-3
        )
        assert found.missed is None

    @pytest.mark.parametrize("budget", [("--keep-latency", "0.7"), ("--latency-ms", "0.6")])
    def test_the_command_holds_its_budget_and_reports_it(
        self, budget: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The network takes 0.97 ms at the first pace."""
        command = [
            "compress", "prune", "compress.models.cifar:resnet8", "--data", "digits", *budget,
            "--runtime", "onnxruntime", "--criterion", "l2", "--out", str(tmp_path / "run"),
            "--set", "data.channels=3", "--set", "measure.test_images=16",
            "--set", "measure.rounds=3",
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert ended.value.code == 0
        report = json.loads((tmp_path / "run" / "report.json").read_text())
        (gate,) = report["gates"]
        assert (gate["name"], gate["runtime"], gate["passed"]) == (
            "latency_ms",
            "onnxruntime",
            True,
        )
        assert 0.8 * gate["limit"] < gate["measured"] <= gate["limit"]

    def test_a_network_that_is_fast_enough_is_left_whole(self) -> None:
        plan = compress.plan_pruning(Net(), EXAMPLE, latency_ms=50.0)
        assert plan.macs_after == plan.macs_before
        assert plan.about["latency"]["kept"]

    def test_a_promise_between_two_steps_is_not_called_kept(self) -> None:
        """With 32 channels of the second layer it takes 0.84 ms, with 16 it takes 0.55."""
        plan = compress.plan_pruning(Net(), EXAMPLE, latency_ms=0.7, round_to=16, exclude=["first"])
        assert plan.about["latency"]["planned_ms"] == pytest.approx(0.55, abs=0.01)
        assert not plan.about["latency"]["kept"]

    def test_the_pruned_network_is_held_against_the_plan(self) -> None:
        model = Net()
        plan = compress.plan_pruning(model, EXAMPLE, latency_ms=0.5)
        found = check_latency(compress.apply_pruning(model, plan), model, plan, EXAMPLE)
        assert found.missed is None
        assert found.measured_ms == pytest.approx(plan.about["latency"]["planned_ms"], abs=1e-3)
        assert "slower than asked" in str(check_latency(model, model, plan, EXAMPLE).missed)
        with pytest.raises(PlanError, match="has no latency target"):
            plan = compress.plan_pruning(model, EXAMPLE, keep_macs=0.9)
            check_latency(model, model, plan, EXAMPLE)
        small = compress.apply_pruning(model, plan)
        plan = plan.then(compress.plan_pruning(small, EXAMPLE, keep_latency=0.7))
        with pytest.raises(PlanError, match="in every round of it"):
            check_latency(compress.apply_pruning(model, plan), model, plan, EXAMPLE)

    def test_the_smallest_reachable_latency_is_told(self) -> None:
        with pytest.raises(PlanError, match=r"latency_ms = 0.1 cannot be reached on onnxruntime.*"
                                            r"Expected at least 0\.2\d+ ms"):  # fmt: skip
            compress.plan_pruning(Net(), EXAMPLE, latency_ms=0.1)
        with pytest.raises(PlanError, match=r"keep_latency = 0.1 cannot be reached on onnxruntime.*"
                                            r"Expected at least 0\.\d+\. "):  # fmt: skip
            compress.plan_pruning(Net(), EXAMPLE, keep_latency=0.1)


def test_a_runtime_that_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_table, "unavailable", lambda runtime: "there is no GPU")
    latency_table.table_for.cache_clear()
    with pytest.raises(EngineError, match="nothing can be measured on tensorrt: there is no GPU"):
        compress.plan_pruning(Net(), EXAMPLE, latency_ms=1.0, runtime="tensorrt")


def test_measurements_on_fewer_cores_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    files = set()
    for usable in (1, 2, 2):
        device = {"cpu": "one and the same", "threads_usable": usable}
        monkeypatch.setattr(
            latency_table.environment, "describe_machine", lambda d=device: {"device": d}
        )
        latency_table.table_for.cache_clear()
        files.add(latency_table.table_for("onnxruntime")._file)
    latency_table.table_for.cache_clear()
    assert len(files) == 2


def test_a_machine_that_slows_down_changes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes 5 % longer than the one before; the networks stay 3 to 1."""
    speed = itertools.count()
    monkeypatch.setattr(Stopwatch, "_session", lambda self, model, stack: float(model(EXAMPLE)))
    monkeypatch.setattr(
        Stopwatch, "_time", lambda self, session, seconds: session * 1.05 ** next(speed)
    )
    first, second = (nn.Flatten(0), nn.Flatten(0))
    first.forward = lambda x: torch.tensor(3.0)  # type: ignore[method-assign]
    second.forward = lambda x: torch.tensor(1.0)  # type: ignore[method-assign]
    stopwatch = Stopwatch(first, EXAMPLE, "onnxruntime")
    for _ in range(3):
        assert stopwatch.ms(second) == pytest.approx(stopwatch.original_ms / 3, rel=0.06)


def test_a_promise_holds_within_ten_percent() -> None:
    assert LatencyCheck(10.0, 10.9, "onnxruntime").missed is None
    assert "11 % slower" in str(LatencyCheck(10.0, 11.1, "onnxruntime").missed)
    assert LatencyCheck(10.0, 9.1, "onnxruntime").missed is None
    assert "20 % faster than asked for" in str(LatencyCheck(10.0, 8.0, "onnxruntime").missed)
    assert LatencyCheck(10.0, 8.0, "onnxruntime", is_cut=False).missed is None


@pytest.mark.slow
def test_onnxruntime_is_measured_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    latency_table.table_for.cache_clear()
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 10),
    ).eval()  # fmt: skip
    example = torch.zeros(1, 3, 48, 48)
    with Stopwatch(model, example, "onnxruntime") as stopwatch:
        whole = stopwatch.original_ms
        assert stopwatch.ms(model) == pytest.approx(whole, rel=0.2)
    plan = compress.plan_pruning(model, example, latency_ms=0.5 * whole)
    assert plan.about["latency"]["kept"]
    pruned = compress.apply_pruning(model, plan)
    assert check_latency(pruned, model, plan, example).missed is None
    assert 0.3 * whole < plan.about["latency"]["planned_ms"] <= 0.5 * whole
    assert list((tmp_path / "compress" / "latency").glob("onnxruntime-*.json"))
    plan = compress.plan_pruning(model, example, keep_latency=0.7, runtime="pytorch")
    assert plan.about["latency"]["kept"]
    assert list((tmp_path / "compress" / "latency").glob("pytorch-*.json"))
