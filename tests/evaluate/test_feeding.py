"""Pictures reach every graph as its own file says: size, layout, colours, range, further inputs."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from compress.data import load_data
from compress.data._images import decoded
from compress.data._pictures import Fit
from compress.errors import DataError, EngineError, UsageError
from compress.evaluate import run_session
from compress.evaluate.feeding import Fed, arrays_for, artifact_facts, completed, shapes_answered
from compress.graph import files
from compress.graph.metadata import layout_of, metadata, stamp, usual_range
from compress.recipe.settings import DataSettings
from compress.runtimes import TensorSpec, build_engine, open_session


@pytest.fixture
def pictures(tmp_path):
    """A folder of eight pictures of different sizes, red in their left half."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(0, 100, (20 + number, 30, 3), dtype=np.uint8)
        pixels[:, :15, 0] = 200
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def graph(path, shape, *, further=(), opset=13, facts=None):
    """Write a graph that doubles pictures, plus what further inputs add, and returns them flat."""
    nodes = [helper.make_node("Mul", ["x", "two"], ["doubled"])]
    last = "doubled"
    for name, _ in further:
        nodes.append(helper.make_node("Add", [last, name], [f"with_{name}"]))
        last = f"with_{name}"
    nodes.append(helper.make_node("Flatten", [last], ["y"]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in further]
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            inputs,
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.float32(2), "two")],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    stamp(made, facts or {})
    onnx.save(made, path)
    return path


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (("n", 3, 240, 320), "NCHW"),
        ((1, 257, 257, 3), "NHWC"),
        (("n", "h", "w", 1), "NHWC"),
        (("n", "c", "h", "w"), None),
        ((1, 10), None),
    ],
)
def test_the_layout_is_where_the_channels_are(shape, layout):
    assert layout_of(shape) == layout


def test_a_file_says_its_size_layout_and_normalization(tmp_path):
    path = graph(tmp_path / "x.onnx", ["n", 12, 16, 3], facts={"mean": [0.1] * 3, "std": [0.2] * 3})
    assert artifact_facts(path) == {
        "layout": "NHWC",
        "image_size": (12, 16),
        "channels": 3,
        "mean": [0.1] * 3,
        "std": [0.2] * 3,
    }


def test_sizes_of_minus_one_are_free(tmp_path):
    path = graph(tmp_path / "x.onnx", [-1, 3, -1, -1])
    assert artifact_facts(path) == {"layout": "NCHW", "channels": 3}
    with open_session(path) as session:
        assert session.run(np.zeros((2, 3, 4, 5), np.float32))[0].shape == (2, 60)


def test_what_is_left_open_is_taken_from_the_file(tmp_path, pictures):
    path = graph(tmp_path / "x.onnx", ["n", 12, 16, 3], facts={"mean": [0.1] * 3, "std": [0.2] * 3})
    settings = completed(DataSettings(name="images", root=str(pictures)), [path])
    assert settings.image_size == (12, 16)
    dataset = load_data(settings)
    assert dataset.image_size == (12, 16)
    assert dataset.mean == (0.1,) * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": (0.5,), "std": (0.2,)}, "mean is 0.5 by the data's settings, and 0.1,0.1,0.1 by"),
        ({"image_size": 32}, "image_size is 32,32 .* and 12,16 by the file"),
        ({"layout": "NCHW"}, "layout is NCHW .* and NHWC by the file"),
        ({"input_range": (0, 255)}, "mean is"),
    ],
)
def test_what_contradicts_the_file_is_refused(tmp_path, given, message):
    path = graph(tmp_path / "x.onnx", ["n", 12, 16, 3], facts={"mean": [0.1] * 3, "std": [0.2] * 3})
    with pytest.raises(UsageError, match=message):
        completed(DataSettings(name="images", root="x", **given), [path])


def test_files_that_take_other_images_are_not_judged_together(tmp_path):
    paths = [graph(tmp_path / f"{n}.onnx", ["n", n, n, 3]) for n in (12, 16)]
    with pytest.raises(UsageError, match=r"12,12 by .*12.onnx, and 16,16 by .* The same images"):
        completed(DataSettings(name="images", root="x"), paths)


def test_what_says_the_same_in_other_units_is_taken(tmp_path):
    path = graph(tmp_path / "x.onnx", ["n", 3, 8, 8], facts={"mean": [0.5] * 3, "std": [0.5] * 3})
    settings = DataSettings(
        name="images", root="x", input_range=(0, 255), mean=(127.5,), std=(127.5,)
    )
    assert completed(settings, [path]).input_range == (0, 255)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"mean": (0.0,), "std": (1.0,)}, lambda p: p / 255),
        ({"input_range": (0, 255)}, lambda p: p),
        ({"input_range": (-1, 1)}, lambda p: p / 127.5 - 1),
        ({"input_range": (0, 255), "mean": (127.5,), "std": (128,)}, lambda p: (p - 127.5) / 128),
        ({"input_range": (0, 255), "color": "BGR"}, lambda p: p[..., ::-1]),
        (
            {"input_range": (0, 255), "color": "BGR", "mean": (1, 2, 3), "std": (1, 1, 1)},
            lambda p: p[..., ::-1] - np.array([1, 2, 3]),
        ),
    ],
)
def test_pictures_become_what_the_network_was_trained_on(
    tmp_path, pictures, layout, given, expected
):
    shape = ["n", 3, 10, 14] if layout == "NCHW" else ["n", 10, 14, 3]
    path = graph(tmp_path / "x.onnx", shape)
    settings = completed(DataSettings(name="images", root=str(pictures), **given), [path])
    dataset = load_data(settings)
    images = dataset.splits["test"].take([0, 1])
    wanted = expected(images.permute(0, 2, 3, 1).numpy().astype(np.float64))
    if layout == "NCHW":
        wanted = wanted.transpose(0, 3, 1, 2)
    with open_session(path) as session:
        (found,) = arrays_for(session.inputs, images, dataset)
        np.testing.assert_allclose(found, wanted, atol=2e-4)
        (doubled,) = Fed(session, dataset).run(images.numpy())
    np.testing.assert_allclose(doubled, 2 * found.reshape(2, -1), rtol=1e-6)


def test_further_inputs_get_what_they_are_given(tmp_path, pictures):
    np.save(tmp_path / "state.npy", np.full((1, 1, 1, 1), 5, np.float32))
    further = [("threshold", []), ("state", ["n", 1, 1, 1]), ("offset", [1])]
    path = graph(tmp_path / "x.onnx", ["n", 3, 8, 8], further=further)
    given = {"threshold": 0.5, "state": str(tmp_path / "state.npy"), "offset": [2.0]}
    settings = DataSettings(name="images", root=str(pictures), image_size=8, inputs=given)
    dataset = load_data(completed(settings, [path]))
    images = dataset.splits["test"].take([0, 1])
    with open_session(path) as session:
        found = arrays_for(session.inputs, images, dataset)
        assert [array.shape for array in found] == [(2, 3, 8, 8), (), (2, 1, 1, 1), (1,)]
        (answer,) = session.run(*found)
    np.testing.assert_allclose(answer, 2 * found[0].reshape(2, -1) + 7.5, rtol=1e-5)


def test_a_further_input_without_a_value_is_named(pictures):
    specs = (TensorSpec("x", ("n", 3, 8, 8), "float32"), TensorSpec("h", (2, 1, 4), "float32"))
    dataset = load_data(DataSettings(name="images", root=str(pictures), image_size=8))
    images = dataset.splits["test"].take([0])
    with pytest.raises(EngineError, match=r"also takes 'h' of shape \(2, 1, 4\).*--input h="):
        arrays_for(specs, images, dataset)
    with pytest.raises(EngineError, match="no input takes pictures"):
        arrays_for(specs[1:], images, dataset)


@pytest.mark.parametrize(
    ("shape", "asked"), [(("n", 3, 48, "w"), "48,WIDTH"), (("n", "h", 48, 3), "HEIGHT,48")]
)
def test_pictures_of_another_side_than_the_file_fixes_are_refused_with_the_option(
    pictures, shape, asked
):
    dataset = load_data(DataSettings(name="images", root=str(pictures), image_size=16))
    stored = dataset.splits["test"].take([0])
    with pytest.raises(EngineError, match=f"they are 16 x 16.*--image-size {asked} "):
        arrays_for([TensorSpec("x", shape, "float32")], stored, dataset)


def test_an_engine_knows_what_its_graph_said(tmp_path):
    pytest.importorskip("openvino")
    path = graph(tmp_path / "x.onnx", ["n", 3, 8, 8], facts={"mean": [0.5] * 3, "std": [0.5] * 3})
    engine = build_engine(path, tmp_path / "x.xml", runtime="openvino", batch=1)
    facts = artifact_facts(engine)
    assert facts["mean"] == [0.5] * 3
    assert tuple(facts["image_size"]) == (8, 8)


def test_a_copy_keeps_what_the_file_says_and_fixes_its_sizes(tmp_path):
    path = graph(tmp_path / "x.onnx", ["n", "h", "w", 3], facts={"labels": ["a"]})
    out = tmp_path / "copy" / "y.onnx"
    files.copy(path, out, facts={"mean": [0.5]}, sizes=(3, 24, 32))
    model = onnx.load(out)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value or dim.dim_param for dim in dims] == ["n", 24, 32, 3]
    assert metadata(model) == {"labels": ["a"], "mean": [0.5]}
    with pytest.raises(EngineError, match="input 'x' has the shape"):
        files.copy(out, tmp_path / "z.onnx", facts={}, sizes=(3, 8, 8))
    assert not (tmp_path / "z.onnx").exists()


def test_a_copy_takes_the_weights_beside_it_along(tmp_path):
    (tmp_path / "a").mkdir()
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    made = helper.make_model(
        helper.make_graph(
            [helper.make_node("Conv", ["x", "w"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 6, 6])],
            [weight],
        ),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    )
    onnx.save(made, tmp_path / "a" / "x.onnx", save_as_external_data=True, location="x.data",
              size_threshold=0)  # fmt: skip
    files.copy(tmp_path / "a" / "x.onnx", tmp_path / "b" / "y.onnx", facts={})
    with open_session(tmp_path / "b" / "y.onnx") as session:
        assert session.run(np.ones((1, 3, 8, 8), np.float32))[0].max() == 27


ULTRALYTICS = {"names": "{0: 'cat', 1: 'dog'}", "stride": "32", "imgsz": "[96, 64]"}
SEEN = {"mean": [0.0] * 3, "std": [1.0] * 3, "resize": "letterbox", "crop": 1.0, "color": "RGB"}


@pytest.mark.parametrize(
    ("props", "facts"),
    [
        (
            {"task": "detect"},
            {"labels": ["cat", "dog"], "task": "detection", "usual_size": [96, 64], **SEEN},
        ),
        ({"task": "classify", "imgsz": "["}, {"labels": ["cat", "dog"], "task": "classification"}),
        ({"task": "pose", "names": "{0: 'x', 5: 'y'}"}, {"usual_size": [96, 64]}),
        ({"names": "print(1)", "imgsz": "[0, -3]"}, {}),
    ],
)
def test_what_ultralytics_exporter_notes_is_known(tmp_path, props, facts):
    path = graph(tmp_path / "yolo.onnx", ["b", 3, "h", "w"])
    model = onnx.load(path)
    helper.set_model_props(model, ULTRALYTICS | props)
    onnx.save(model, path)
    known = {"layout": "NCHW", "channels": 3}
    assert artifact_facts(path) == known | facts
    settings = DataSettings(name="images", root=".")
    size = facts.get("usual_size")
    assert completed(settings, [path]).image_size == (size and tuple(size))
    own = settings.model_copy(update={"image_size": (32, 32)})
    assert completed(own, [path]).image_size == (32, 32), "the input takes any size"


def test_a_fixed_size_counts_more_than_the_one_that_is_noted(tmp_path):
    path = graph(tmp_path / "yolo.onnx", ["b", 3, 32, 32])
    model = onnx.load(path)
    helper.set_model_props(model, ULTRALYTICS)
    onnx.save(model, path)
    assert artifact_facts(path)["image_size"] == (32, 32)
    assert "usual_size" not in artifact_facts(path)


def test_the_usual_range_follows_from_mean_and_std(tmp_path):
    model = onnx.load(graph(tmp_path / "x.onnx", ["n", 3, 8, 8]))
    assert usual_range(model) is None
    stamp(model, {"mean": [0.0] * 3, "std": [1 / 255] * 3})
    assert usual_range(model) == pytest.approx((-2.55, 257.55))
    assert json.loads(model.metadata_props[0].value) == [0.0] * 3


def test_pictures_without_labels_are_split_by_name(pictures):
    dataset = load_data(DataSettings(name="images", root=str(pictures), image_size=16))
    assert (dataset.target, dataset.classes) == ("none", ())
    sizes = {name: len(split) for name, split in dataset.splits.items()}
    assert sizes == {"train": 6, "validation": 0, "calibration": 6, "test": 2}
    for position, name in enumerate(("3.png", "7.png")):
        alone = decoded(pictures / name, Fit((16, 16)), 3, where=name)
        assert torch.equal(dataset.splits["test"].take([position])[0], alone)
    every = torch.cat([dataset.splits[s].take(range(n)) for s, n in (("train", 6), ("test", 2))])
    assert len({pixels.numpy().tobytes() for pixels in every}) == 8


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("order", ["NCHW", "NHWC"])
def test_one_array_is_calibrated_with_as_it_is(tmp_path, suffix, order):
    values = np.random.default_rng(0).normal(size=(8, 3, 5, 7)).astype(np.float32)
    stored = values if order == "NCHW" else values.transpose(0, 2, 3, 1)
    path = tmp_path / f"x{suffix}"
    np.save(path, stored) if suffix == ".npy" else np.savez(path, anything=stored)
    dataset = load_data(DataSettings(name="npz", root=str(path), mean=(0.5,), std=(0.5,)))
    found = torch.cat([dataset.normalize(dataset.splits[s].take(range(n))) for s, n in
                       (("train", 6), ("test", 2))])  # fmt: skip
    order_of = [0, 1, 2, 4, 5, 6, 3, 7]
    np.testing.assert_allclose(found.numpy(), values[order_of], atol=1e-5)


def test_a_further_input_that_comes_first_does_not_say_the_batch(tmp_path, pictures):
    """A state of two layers before the picture: two is not how many pictures there are."""
    nodes = [
        helper.make_node("ReduceSum", ["state"], ["s"], keepdims=0),
        helper.make_node("Add", ["x", "s"], ["moved"]),
        helper.make_node("Flatten", ["moved"], ["y"]),
    ]
    values = (("state", [2, 1, 4]), ("x", ["n", 3, 8, 8]))
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in values],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        ),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    )
    onnx.save(made, tmp_path / "x.onnx")
    settings = DataSettings(name="images", root=str(pictures), image_size=8, inputs={"state": 0.5})
    assert shapes_answered(tmp_path / "x.onnx", load_data(settings)) == [(1, 192)]


def decoder(path):
    """Write a graph of three feature maps, the second of which is pooled, and a state."""
    shapes = {"low": ["n", 4, 8, 8], "high": ["n", 6, 4, 4], "state": ["n", 5]}
    nodes = [helper.make_node("Flatten", [name], [f"{name}_flat"]) for name in shapes]
    nodes.append(helper.make_node("Concat", [f"{name}_flat" for name in shapes], ["y"], axis=1))
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        ),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    )
    onnx.save(made, path)
    return path


def test_an_archive_feeds_each_input_by_its_name_whatever_their_order(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"state": (5,), "high": (6, 4, 4), "low": (4, 8, 8)}
    rows = {n: rng.normal(0, 9, (8, *s)).astype(np.float32) for n, s in shapes.items()}
    np.savez(tmp_path / "features.npz", **rows)
    dataset = load_data(DataSettings(name="npz", root=str(tmp_path / "features.npz")))
    assert "low (4, 8, 8)" in dataset.summary()
    with open_session(decoder(tmp_path / "m.onnx")) as session:
        images = dataset.splits["test"].take([0, 1])
        (got,) = Fed(session, dataset).run(images.numpy())
    test = [3, 7]  # every fourth
    flat = [rows[name][test].reshape(2, -1) for name in ("low", "high", "state")]
    np.testing.assert_array_equal(got, np.concatenate(flat, 1))


@pytest.mark.parametrize("batch", ["n", 1])
def test_an_archive_feeds_a_state_whose_batch_is_its_second_dimension(batch, tmp_path):
    shapes = {"state": [2, batch, 3], "input": [batch, 5]}  # the state comes first
    nodes = [
        helper.make_node("Transpose", ["state"], ["turned"], perm=[1, 0, 2]),
        helper.make_node("Flatten", ["turned"], ["flat"]),
        helper.make_node("Concat", ["input", "flat"], ["y"], axis=1),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 11])
    made = helper.make_model(
        helper.make_graph(nodes, "g", inputs, [output]),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    )
    onnx.save(made, tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    rows = {
        n: rng.normal(size=(8, *s)).astype(np.float32)
        for n, s in (("input", (5,)), ("state", (2, 3)))
    }
    np.savez(tmp_path / "sounds.npz", **rows)
    dataset = load_data(DataSettings(name="npz", root=str(tmp_path / "sounds.npz")))
    test = [3, 7]  # every fourth
    with open_session(tmp_path / "m.onnx") as session:
        got = run_session(Fed(session, dataset), dataset.splits["test"].take([0, 1]).numpy())["y"]
    want = np.concatenate([rows["input"][test], rows["state"][test].reshape(2, 6)], 1)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("shape", [(5,), (3, 64), (2, 4, 8, 8)])
def test_an_archive_feeds_the_only_input_where_that_takes_no_pictures(shape, tmp_path):
    rows = np.random.default_rng(0).normal(0, 9, (8, *shape)).astype(np.float32)
    made = helper.make_model(
        helper.make_graph(
            [helper.make_node("Flatten", ["signal"], ["y"])],
            "g",
            [helper.make_tensor_value_info("signal", TensorProto.FLOAT, ("n", *shape))],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        ),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    )
    onnx.save(made, tmp_path / "m.onnx")
    np.savez(tmp_path / "signals.npz", signal=rows)
    dataset = load_data(DataSettings(name="npz", root=str(tmp_path / "signals.npz")))
    with open_session(tmp_path / "m.onnx") as session:
        (got,) = Fed(session, dataset).run(dataset.splits["test"].take([0, 1]).numpy())
    np.testing.assert_array_equal(got, rows[[3, 7]].reshape(2, -1))


@pytest.mark.parametrize("names", [("low", "high"), ("low", "high", "state", "else")])
def test_an_archive_with_other_names_than_the_inputs_is_refused(names, tmp_path):
    shapes = {"low": (4, 8, 8), "high": (6, 4, 4), "state": (5,), "else": (3,)}
    rows = {name: np.ones((8, *shapes[name]), np.float32) for name in names}
    np.savez(tmp_path / "features.npz", **rows)
    dataset = load_data(DataSettings(name="npz", root=str(tmp_path / "features.npz")))
    told = pytest.raises(EngineError, match="arrays for the inputs of the network: low, high")
    with open_session(decoder(tmp_path / "m.onnx")) as session, told:
        Fed(session, dataset).run(dataset.splits["test"].take([0]).numpy())


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ({"a": np.ones((8, 3)), "b": np.ones((7, 3))}, "N the same for all"),
        ({"a": np.ones((8, 3)), "b": np.ones((8, 3), np.int64)}, "a float array"),
        ({"a": np.ones((8, 3)), "b": np.full((8, 3), np.nan)}, "not finite"),
        ({"a": np.ones((1, 3)), "b": np.ones((1, 3))}, "at least 2"),
    ],
)
def test_an_archive_that_feeds_no_network_is_refused(rows, told, tmp_path):
    np.savez(tmp_path / "features.npz", **rows)
    with pytest.raises(DataError, match=told):
        load_data(DataSettings(name="npz", root=str(tmp_path / "features.npz")))
