"""Method auto: which corrections it tries, and which it keeps."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from int8_graphs import GRAPHS, Sketch, images
from test_methods import bench_of

from compress.graph.model import GraphIndex
from compress.qdq import prepare
from compress.qdq.plan import ActivationRange, InputGrid, QuantPlan
from compress.quantize import calibrate, search
from compress.quantize.api import plan_by
from compress.quantize.calibration import activation_of
from compress.quantize.images import CalibrationImages
from compress.quantize.layerwise import channel_means, find_shift, some_positions
from compress.quantize.notes import bearing_images, by_reason, decided, of_judging
from compress.quantize.search import Trial, auto, depthwise_layers_apart, first_layers, spare_layers
from compress.quantize.sessions import Closeness, closeness
from compress.quantize.workbench import Workbench


class Bench:
    """Corrections that bring what a table says: SQNR of two outputs, by the steps taken."""

    def __init__(self, images=64, **each_db):
        self.prepared, self.target = onnx.ModelProto(), "onnxruntime"
        self.observer, self.overflows, self.tried = None, False, {"x": np.zeros((16, 1))}
        self.is_free = True
        self.statistics = SimpleNamespace(images=images)
        self.each = each_db
        self.fed: list[tuple[str, int]] = []

    def ranges(self, observer="mse"):
        ranges = {"t": ActivationRange(0.0, 1.0, 1.0, observer)}
        return QuantPlan("onnxruntime", observer, ranges)

    def step(self, name, plan, feed):
        self.fed.append((name, len(feed["x"])))
        again = plan.biases  # of the same images, only more of them
        method = plan.method if again else f"{plan.method} {name}"
        return plan.changed(method=method, biases={"layer": (0.0,)})

    def scaled(self, plan):
        return plan.changed()

    def corrected(self, plan, feed):
        return self.step("bias", plan, feed)

    def exact(self, plan):
        return plan

    def equalized(self, plan, alpha):
        return plan.changed(method=f"{plan.method} equal{alpha:g}")

    def rounded(self, plan, feed):
        return self.step("round", plan, feed)

    def all_images(self):
        return {"x": np.zeros((128, 1))}

    def judge(self, plan):
        steps = f"{plan.method}{' float' * bool(plan.float_nodes)}"
        each = self.each.get(steps.replace(" ", "_").replace(".", ""), (10.0, 10.0))
        return Closeness(each, tuple(np.full(4, db) for db in each))


def test_all_outputs_decide():
    scaled = {"mse_equal05": (22.0, 30.5), "mse_equal05_round": (21.5, 34.0)}
    assert auto(Bench(mse=(20.0, 30.0), **scaled)).method == "mse equal0.5 round"


def test_equalization_is_chosen_before_biases_are_corrected():
    better = {"mse_equal025": (22.0, 22.0), "mse_equal025_bias": (23.0, 23.0)}
    bench = Bench(mse=(20.0, 20.0), **better)
    assert auto(bench).method == "mse equal0.25 bias"
    assert bench.fed == [("round", 16), ("bias", 16), ("bias", 128)]


@pytest.mark.parametrize(("rounded", "method"), [(23.0, "mse exact round"), (18.5, "mse")])
def test_pixels_are_held_unless_nothing_makes_that_good(rounded, method):
    class OfPixels(Bench):
        def exact(self, plan):
            return plan.changed(method=f"{plan.method} exact")

    table = {"mse": (20.0, 20.0), "mse_exact": (18.0, 18.0), "mse_round": (22.0, 22.0)}
    bench = OfPixels(**table, mse_exact_round=(rounded, rounded))
    plan = auto(bench)
    assert plan.method == method
    assert ("exact pixels" in decided(plan.notes)[0]) == ("exact" in method)


def test_biases_are_not_corrected_alone_where_rounding_does_it():
    bench = Bench(mse=(20.0, 20.0), mse_round=(22.0, 22.0), mse_bias=(23.0, 23.0))
    assert auto(bench).method == "mse round"
    assert bench.fed == [("round", 16), ("bias", 128)]


def test_one_image_does_not_decide():
    """An output of which one image of eight has nearly all the power and noise, as scores do."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(8, 50)) * np.array([100.0, *[1.0] * 7])[:, None]
    noise = rng.normal(size=(8, 50)) * np.array([1.0, *[0.1] * 7])[:, None]
    less = noise * np.array([2.0, *[0.5] * 7])[:, None]
    one, other = (closeness([scores], [scores + each], 8) for each in (noise, less))
    assert other.each_db[0] < one.each_db[0] - 5
    assert other.gain_over(one) == pytest.approx(6.02 * 6 / 8, abs=0.01)
    assert not other.falls_below(one, 0.05)


def test_images_that_are_as_good_as_exact_do_not_decide():
    """A score that is 0 or 1 in float and in int8 alike, on some images."""
    scores = np.array([1.0, 1.0, 0.9, 0.8, 0.7])[:, None]
    noises = ([0, 0, 0.2, 0.2, 0.2], [1e-4, 1e-4, 0.1, 0.1, 0.1])
    one, other = (closeness([scores], [scores + np.array(n)[:, None]], 5) for n in noises)
    assert other.gain_over(one) == pytest.approx(6.02 * 3 / 5, abs=0.01)


def test_an_output_falls_where_most_images_say_so():
    values = np.random.default_rng(0).normal(size=(16, 50))
    one, other = (closeness([values], [values + each], 16) for each in (0.01, 0.011))
    assert other.falls_below(one, 0.05) and not one.falls_below(other, 0.05)
    assert one.typical_db == pytest.approx(one.each_db, abs=1e-9)


def test_closeness_of_answers_that_are_exact_not_finite_or_of_no_image():
    values = np.random.default_rng(0).normal(size=(3, 4))
    broken = np.where(np.arange(3)[:, None] == 1, np.nan, values)
    found = closeness([values, values, values[None], values * 0], [values, broken] * 2, 3)
    assert found.typical_db[0] == 60 and found.typical_db[1] == pytest.approx(20)
    assert [len(each) for each in found.by_image_db] == [3, 3, 1, 1]
    assert math.isnan(found.typical_db[3]) and math.isfinite(found.mean_db)


def test_what_lets_one_output_fall_below_plain_ranges_is_not_kept():
    bench = Bench(mse=(20.0, 30.0), mse_bias=(26.0, 29.0))
    plan = auto(bench)
    assert plan.method == "mse"
    assert any(note.endswith("not kept: an output falls below plain ranges") for note in plan.notes)


def test_the_best_is_made_again_with_all_images_unless_an_output_falls():
    bench = Bench(mse=(20.0, 20.0), mse_bias=(22.0, 22.0))
    plan = auto(bench)
    assert plan.notes[-1].startswith("biases corrected again with all 128 images: weakest output")
    assert bench.fed == [("round", 16), ("bias", 16), ("bias", 128)]


def test_what_is_not_fitted_to_images_is_done_once_for_each_attempt():
    class Counting(Bench):
        scalings = 0

        def scaled(self, plan):
            self.scalings += 1
            return plan.changed(method=f"{plan.method} scaled")

    better = {"mse_scaled": (21.0, 21.0), "mse_scaled_bias": (22.0, 22.0)}
    bench = Counting(mse=(20.0, 20.0), **better)
    assert auto(bench).method == "mse scaled bias"
    assert bench.fed == [("round", 16), ("bias", 16), ("bias", 128)]
    assert bench.scalings == 1
    bench = Counting(mse=(20.0, 20.0), mse_round=(22.0, 22.0))
    assert auto(bench).method == "mse round"
    assert bench.scalings == 0  # rounding chooses scales of its own


@pytest.mark.parametrize(
    ("kept", "tried"), [("05", ["0.5"]), ("025", ["0.5", "0.25"]), ("0", ["0.5", "0.25", "0"])]
)
def test_the_first_equalization_that_helps_is_taken(kept, tried):
    plan = auto(Bench(mse=(20.0, 20.0), **{f"mse_equal{kept}": (22.0, 22.0)}))
    told = [note.split()[1].rstrip(":") for note in plan.notes if note.startswith("equalization")]
    assert told == tried


def test_ranges_that_clip_less_and_lose_are_not_widened_further():
    told = " ".join(auto(Bench(128, mse=(20.0, 20.0), percentile=(18.0, 18.0))).notes)
    assert "percentile" in told and "minmax" not in told


@pytest.mark.parametrize(
    ("lost", "images", "kept"),
    [
        ([0.5, -0.4, 0.6, 0.1], 64, True),
        ([0.5, 0.4, 0.6, 0.5], 64, False),
        ([-4.0, 9.0, -3.0, 12.0], 64, False),
        ([0.5, -0.4, 0.6, 0.1], 128, False),
        ([-0.5, 0.4, -0.6, -0.1], 128, True),
    ],
)
def test_wider_ranges_of_few_images_may_lose_a_little_that_chance_explains(lost, images, kept):
    class Noisy(Bench):
        def judge(self, plan):
            db = 20.0 - np.array(lost) * (plan.method != "mse")
            return Closeness((20.0,), (db,))

    plan = auto(Noisy(images))
    assert (plan.activations["t"].observer == "mse") is not kept
    wider = "minmax" if images < 128 else "percentile"
    (note,) = [note for note in plan.notes if note.startswith(f"{wider} ranges")]
    assert note.endswith("dB, kept" if kept else "not kept")


def test_an_output_without_a_signal_decides_nothing():
    plan = Bench().ranges()
    one, other = (
        Trial(plan, Closeness((math.nan, db), (np.full(1, math.nan), np.full(4, db))))
        for db in (20.0, 21.0)
    )
    assert other.exceeds(one) and not other.falls_below(one)


@pytest.mark.parametrize(
    ("powers", "count"), [((1, 1, 1, 1), 4.0), ((1, 0, 0, 0), 1.0), ((0,), 0.0)]
)
def test_images_that_bear_an_output(powers, count):
    values = np.sqrt(np.array(powers, float))[:, None, None] * np.ones((1, 2, 3))
    assert bearing_images(values) == pytest.approx(count)


def test_a_detector_on_images_without_its_objects_is_told():
    rng = np.random.default_rng(0)
    boxes = rng.normal(size=(8, 20))
    scores = np.full((8, 20), 1e-4)
    scores[3, 7] = 0.5
    told = of_judging(["boxes", "scores"], [boxes, scores], [20.0, 5.0], 8)
    assert "rests on few of the 8 images" in told[-1] and "(scores on 1.0)" in told[-1]
    assert "boxes" not in told[-1]
    regions = np.eye(80)[:, :20]  # of a detector with two stages: of 80 regions, in 8 images
    told = of_judging(["boxes", "regions"], [boxes, regions], [20.0, 5.0], 8)
    assert "judged on 8 images" in told[-1]


@pytest.mark.parametrize("kind", ["Relu", "Sigmoid"])
def test_a_shift_found_on_some_positions_gives_the_mean_over_all(kind):
    from int8_graphs import Sketch

    from compress.graph.model import GraphIndex
    from compress.graph.preprocess import prepare

    s = Sketch((3, 8, 8))
    x = s.op(kind, [s.conv("input", "c", 3, 4)], "end")
    s.head(x, 4)
    graph = GraphIndex(prepare(s.model()))
    activation = activation_of(graph, next(n for n in graph.nodes if n.name == "c"))
    rng = np.random.default_rng(0)
    output = rng.normal(0.5, 2.0, (8, 4, 96, 96)).astype(np.float32)
    output[:, :, :48] += 1.0  # halves that differ
    halves = [some_positions(output[i : i + 4] + np.float32(0.2), 8) for i in (0, 4)]
    wanted = channel_means(activation.value(np.concatenate(halves)))
    shift = find_shift(some_positions(output, 8), activation, wanted)
    moved = output + shift.reshape(1, -1, 1, 1).astype(np.float32)
    whole = channel_means(activation.value(output + np.float32(0.2)))
    np.testing.assert_allclose(channel_means(activation.value(moved)), whole, atol=2e-3)


def test_nodes_that_stay_in_float_for_one_reason_are_one_line():
    why = "stays in float: squeeze-excite is faster in half precision"
    notes = (
        "minmax ranges: 30.0 dB",
        *(f"se.{number} {why}" for number in range(16)),
        "up stays in float: ONNX Runtime has no int8 ConvTranspose",
        "a (LSTM) stays in float: no target has it in int8",
        "b (LSTM) stays in float: no target has it in int8",
        "judged on 8 images",
        "up stays in float: ONNX Runtime has no int8 ConvTranspose",
    )
    assert by_reason(notes) == [
        "minmax ranges: 30.0 dB",
        "se.0, se.1 and 14 more stay in float: squeeze-excite is faster in half precision",
        "up stays in float: ONNX Runtime has no int8 ConvTranspose",
        "a (LSTM) and b (LSTM) stay in float: no target has it in int8",
        "judged on 8 images",
    ]


def spoiled():
    """Seven layers; the third is depthwise, and one of its input channels takes the whole range."""
    s = Sketch((3, 8, 8))

    def silu(name, tensor):
        gate = s.op("Sigmoid", [tensor], f"{name}_gate")
        return s.op("Mul", [tensor, gate], f"{name}_silu")

    x = silu("a", s.conv("input", "a", 3, 8, 3))
    x = silu("b", s.conv(x, "b", 8, 8, 1))
    x = silu("c", s.conv(x, "c", 8, 8, 3, group=8))
    for name in "def":
        x = silu(name, s.conv(x, name, 8, 8, 1))
    s.head(x, 8)
    model = s.model()
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor).copy()
        if tensor.name in ("b_w", "b_b", "b_bias"):
            value[0] *= 300
        elif tensor.name == "c_w":
            value[0] /= 300
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    return model


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_the_layer_that_spoils_the_network_is_left_in_float(target):
    bench = bench_of(spoiled(), target)
    plain = bench.ranges()
    spared = spare_layers(bench, plain)
    assert "c" in spared.float_nodes and len(spared.float_nodes) <= 2
    assert "dB closer without it" in spared.float_nodes["c"]
    gain = bench.judge(spared).weakest_db - bench.judge(plain).weakest_db
    assert gain > 5
    plan = auto(bench)
    assert "c" in plan.float_nodes
    assert any(note.startswith("c") and "in float:" in note for note in plan.notes)
    assert bench.judge(plan).weakest_db > bench.judge(spared).weakest_db - 0.1


def uneven(activation: str, scale: float):
    """Six layers; a channel of what the third, a depthwise one, reads is ``scale`` times larger."""
    s = Sketch((3, 8, 8))
    x = s.op(activation, [s.conv("input", "a", 3, 8, 3)], "a_act")
    x = s.op(activation, [s.conv(x, "b", 8, 8, 1)], "b_act")
    x = s.op(activation, [s.conv(x, "c", 8, 8, 3, group=8)], "c_act")
    for name in "de":
        x = s.op(activation, [s.conv(x, name, 8, 8, 1)], f"{name}_act")
    s.head(x, 8)
    model = s.model()
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor).copy()
        if tensor.name in ("b_w", "b_b"):
            value[0] *= scale
        elif tensor.name == "c_w":
            value[0] /= scale
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    return model


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_depthwise_layers_between_float_ops_are_left_in_float(target, monkeypatch):
    monkeypatch.setattr(search, "spare_layers", lambda bench, plan: plan)  # not by search
    bench = bench_of(uneven("HardSwish", 16.0), target)
    plan = auto(bench)
    assert set(plan.float_nodes) >= {"c"}
    monkeypatch.setattr(search, "depthwise_layers_apart", lambda bench, plan: [])
    without = auto(bench)
    assert "c" not in without.float_nodes
    assert bench.judge(plan).mean_db > bench.judge(without).mean_db + 1.0


def test_depthwise_layers_of_int8_chains_are_not_apart():
    for activation, apart in (("HardSwish", ["c"]), ("Relu", [])):
        bench = bench_of(uneven(activation, 1.0))
        assert depthwise_layers_apart(bench, bench.ranges()) == apart
        floating = bench.ranges().keep_float(["c"], "tried")
        assert depthwise_layers_apart(bench, floating) == []


def test_depthwise_layers_stay_int8_where_float_helps_little():
    bench = bench_of(uneven("HardSwish", 1.0))
    assert "c" not in auto(bench).float_nodes


def test_sizes_that_the_file_leaves_free_are_those_of_the_images():
    model = spoiled()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "any"
    prepared = prepare(model)
    feed = images(spoiled(), 32)
    calibration = CalibrationImages(GraphIndex(prepared), [feed])
    statistics = calibrate(prepared, calibration, targets=["openvino"])
    bench = Workbench(prepared, calibration, statistics, "openvino", None, {})
    spared = spare_layers(bench, bench.ranges())
    assert spared.float_nodes["c"].endswith("% of the MACs")


def only_first(bench, plan):
    return [] if "first" in plan.float_nodes else ["first"]


@pytest.mark.parametrize(
    ("price_db", "float_db", "kept"),
    [
        (0.2, 20.5, True),
        (0.2, 20.1, False),
        (0.2, 19.0, False),
        (0.6, 20.5, False),
    ],
)
def test_the_first_layer_is_in_float_for_its_price(price_db, float_db, kept, monkeypatch):
    monkeypatch.setattr(search, "first_layers", only_first)
    monkeypatch.setattr(search, "_price_db", lambda bench, names: price_db)
    plan = auto(Bench(mse=(20.0, 20.0), mse_float=(float_db, float_db)))
    assert ("first" in plan.float_nodes) is kept
    (told,) = (note for note in plan.notes if note.startswith("first in float: "))
    assert told.endswith(", kept") is kept


def test_the_first_two_layers_are_in_float_where_one_alone_does_not_help(monkeypatch):
    monkeypatch.setattr(
        search, "first_layers", lambda bench, plan: ["b"] if "a" in plan.float_nodes else ["a"]
    )

    class Deep(Bench):
        def judge(self, plan):
            db = {0: 20.0, 1: 19.0, 2: 23.0}[len(plan.float_nodes)]
            return Closeness((db,), (np.full(4, db),))

    assert set(auto(Deep()).float_nodes) == {"a", "b"}


def test_a_grid_of_the_first_layer_goes_with_its_integers(monkeypatch):
    monkeypatch.setattr(search, "first_layers", only_first)
    grids = tuple(InputGrid(name, (1.0,), (0.0,), 0) for name in ("first", "other"))
    bench = Bench(mse=(20.0, 20.0), mse_float=(30.0, 30.0))
    bench.exact = lambda plan: plan.changed(grids=grids)
    assert auto(bench).grids == grids[1:]


def test_first_layers_read_the_images_and_cost_little(monkeypatch):
    bench = bench_of(GRAPHS["residual"]())
    plan = bench.ranges()
    monkeypatch.setattr(search, "_FIRST_MACS_PCT", 100.0)
    (first,) = first_layers(bench, plan)
    graph = GraphIndex(bench.prepared)
    layer = next(node for node in graph.nodes if graph.weight(node))
    assert first == layer.name
    assert first_layers(bench, plan.keep_float([first], "tried")) == ["c1"]  # not behind its Add
    share = search._shares(bench)[layer.output[0]]
    monkeypatch.setattr(search, "_FIRST_MACS_PCT", share + 0.1)
    assert first_layers(bench, plan) == [first]
    assert first_layers(bench, plan.keep_float([first], "tried")) == []
    monkeypatch.setattr(search, "_FIRST_MACS_PCT", 0.1)
    assert first_layers(bench, plan) == []


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_the_price_of_float_is_that_of_its_products(target):
    bench = bench_of(GRAPHS["residual"](), target=target)
    graph, shares = GraphIndex(bench.prepared), search._shares(bench)
    layers = [node for node in graph.nodes if graph.weight(node)]
    stem, c1 = (search.DB_PER_PCT[target] * shares[layer.output[0]] for layer in layers[:2])
    assert stem > 0 and c1 > 0
    assert search._price_db(bench, [layers[0].name]) == pytest.approx(stem)
    assert search._price_db(bench, [n.name for n in layers[:2]]) == pytest.approx(stem + c1)


def test_a_gain_is_sure_beyond_two_standard_errors():
    one, other = np.array([21.0, 23.0, 22.0, 26.0]), np.array([20.0, 20.0, 21.0, 20.0])
    lost = one - other  # 1, 3, 1, 6
    expected = lost.mean() - 2 * lost.std(ddof=1) / 2
    found = [Closeness((20.0,), (each,)) for each in (one, other)]
    assert found[0].sure_gain_over(found[1]) == pytest.approx(expected)
    undefined = [Closeness((math.nan,), (np.full(1, math.nan),))] * 2
    assert math.isnan(undefined[0].sure_gain_over(undefined[1]))


def test_nothing_is_looked_for_in_a_network_that_is_well(monkeypatch):
    monkeypatch.setattr(search, "_worst_layer", lambda *asked: pytest.fail("was looked for"))
    bench = bench_of(GRAPHS["residual"]())
    assert not plan_by("auto", bench).float_nodes


def test_layers_that_help_nothing_are_not_spared(monkeypatch):
    monkeypatch.setattr(search, "POOR_DB", 1000.0)
    bench = bench_of(GRAPHS["residual"]())
    plan = bench.ranges()
    spared = spare_layers(bench, plan)
    gains = [bench.judge(each).weakest_db for each in (plan, spared)]
    assert gains[1] - gains[0] >= 2 * len(spared.float_nodes)


def test_a_layer_that_spoils_all_outputs_is_worse_than_the_last_of_one():
    plain = {"first": 1.4, "second": 4.0, "third": 6.0}
    without = {
        "shared": {"first": 3.9, "second": 13.0, "third": 13.0},
        "last of first": {**plain, "first": math.inf},  # exact; the weakest is then 4.0
    }

    class OfThree:
        def screened(self, plan):
            found = plain
            for name in plan.float_nodes:
                found = {output: max(db, without[name][output]) for output, db in found.items()}
            return Closeness((), tuple(np.array([db]) for db in found.values()))

    plan = QuantPlan("onnxruntime", "mse", {})
    assert search._worst_layer(OfThree(), plan, list(without)) == "shared"


def test_other_layers_are_spared_where_the_worst_is_too_large(monkeypatch):
    bench = bench_of(spoiled())
    plan = bench.ranges()
    names = iter(["d", "c", None])
    monkeypatch.setattr(search, "_worst_layer", lambda *asked: next(names))
    assert list(spare_layers(bench, plan).float_nodes) == ["c"]


def test_runs_cover_all_names_once():
    names = [str(n) for n in range(11)]
    for count in (1, 2, 8, 11, 20):
        runs = search._split(names, count)
        assert [name for run in runs for name in run] == names and all(runs)
