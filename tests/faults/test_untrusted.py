"""Files that reach for others, that stand for more than they hold, or that name what they should
not: refused in a sentence, nothing else read, nothing written elsewhere."""

import contextlib
import io
import json
import os
import resource
import struct
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from attempts import attempt
from onnx import TensorProto, helper, numpy_helper

import compress
from compress.artifact import inside, write_json
from compress.data import load_data, parse_reference
from compress.errors import CompressError, EngineError, ModelError, RecipeError, RunError
from compress.graph import files
from compress.models.weights import read_weights
from compress.pipeline.bundle import write_bundle
from compress.pipeline.context import StageResult
from compress.recipe.loading import load_recipe

SECRET = b"0123456789abcdef"


def link(path, secret):
    os.link(secret, path)


def pipe(path, secret):
    os.mkfifo(path)


def device(path, secret):
    try:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root makes devices")


def folder(path, secret):
    path.mkdir()


def symlink(path, secret):
    path.symlink_to(secret)


def loop(path, secret):
    path.symlink_to(path)


def plain(path, secret):
    path.write_bytes(SECRET)


MADE = {f.__name__: f for f in (link, pipe, device, folder, symlink, loop)}
ENTRIES = {
    "absolute": {"location": "/etc/hostname"},
    "above": {"location": "../secret"},
    "above later": {"location": "x/../../secret"},
    "windows": {"location": "..\\secret"},
    "nul": {"location": "w\0.bin"},
    "nothing": {"location": ""},
    "long": {"location": "w" * 5000},
    "offset 2**63": {"location": "w.bin", "offset": str(2**63)},
    "length 2**63": {"location": "w.bin", "length": str(2**63)},
    "terabyte": {"location": "w.bin", "length": str(2**40)},
    "offset and length": {"location": "w.bin", "offset": str(2**63 - 1), "length": str(2**63)},
    "offset below 0": {"location": "w.bin", "offset": "-16", "length": "16"},
    "length below 0": {"location": "w.bin", "length": "-1"},
    "offset in words": {"location": "w.bin", "offset": "sixteen"},
    "5,000 digits": {"location": "w.bin", "offset": "9" * 5000},
    "no location": {"offset": "0"},
}


def outside(name, entry, shape=(4,)):
    """Return a tensor that lies in another file."""
    tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entry.items():
        added = tensor.external_data.add()
        added.key, added.value = key, value
    return tensor


def value(name, kind=TensorProto.FLOAT, shape=(4,)):
    return helper.make_tensor_value_info(name, kind, shape)


def as_weight(tensor):
    return graph([helper.make_node("Add", ["x", "w"], ["y"])], [tensor])


def as_constant(tensor):
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor)]
    return graph([*nodes, helper.make_node("Add", ["x", "w"], ["y"])], [])


def in_function(tensor):
    body = [
        helper.make_node("Constant", [], ["w"], value=tensor),
        helper.make_node("Add", ["a", "w"], ["b"]),
    ]
    opset = [helper.make_opsetid("", 17)]
    function = helper.make_function("own", "f", ["a"], ["b"], body, opset)
    model = graph([helper.make_node("f", ["x"], ["y"], domain="own")], [])
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    return model


def in_branch(tensor):
    other = numpy_helper.from_array(np.zeros(4, np.float32), "v")
    branches = [
        helper.make_graph(
            [helper.make_node("Identity", [each.name], [f"o{each.name}"])],
            each.name,
            [],
            [value(f"o{each.name}")],
            [each],
        )
        for each in (tensor, other)
    ]
    node = helper.make_node("If", ["c"], ["z"], then_branch=branches[0], else_branch=branches[1])
    condition = numpy_helper.from_array(np.array(False), "c")
    return graph([node, helper.make_node("Add", ["x", "z"], ["y"])], [condition])


def in_loop(tensor):
    body = helper.make_graph(
        [
            helper.make_node("Add", ["s", "w"], ["t"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [value("i", TensorProto.INT64, ()), value("go", TensorProto.BOOL, ()), value("s")],
        [value("on", TensorProto.BOOL, ()), value("t")],
        [tensor],
    )
    count = numpy_helper.from_array(np.array(2), "n")
    return graph([helper.make_node("Loop", ["n", "", "x"], ["y"], body=body)], [count])


def graph(nodes, weights):
    made = helper.make_graph(nodes, "g", [value("x")], [value("y")], weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


PLACES = (as_weight, as_constant, in_function, in_branch, in_loop)


def refused(path):
    """Check that every reader of ONNX files refuses ``path`` within its memory."""
    tracemalloc.start()
    with pytest.raises(EngineError):
        files.load(path)
    with pytest.raises(CompressError):
        compress.lint_onnx(path, target="onnxruntime")
    for runtime in ("onnxruntime", "openvino", "tensorrt-rtx"):
        with pytest.raises(CompressError):
            compress.build_engine(path, path.with_name("e.xml"), runtime=runtime)
    for runtime in ("onnxruntime", "openvino"):
        with pytest.raises(CompressError):
            compress.open_session(path, runtime)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


@pytest.fixture
def place(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_bytes(SECRET)
    return tmp_path / "model"


@pytest.mark.parametrize("put", PLACES)
@pytest.mark.parametrize("made", MADE)
def test_weights_in_what_is_no_file_of_the_folder(put, made, place, tried):
    tried("ONNX weights in a hard link, link, pipe, device, folder; 5 places of a graph")
    MADE[made](place / "w.bin", place.parent / "secret")
    (place / "x.onnx").write_bytes(
        put(outside("w", {"location": "w.bin", "length": "16"})).SerializeToString()
    )
    refused(place / "x.onnx")


@pytest.mark.parametrize("put", PLACES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_weights_said_to_lie_where_they_cannot(put, entry, place, tried):
    tried("ONNX weights at impossible or foreign places (.., NUL, 2**63); 5 places of a graph")
    plain(place / "w.bin", None)
    (place / "x.onnx").write_bytes(put(outside("w", ENTRIES[entry])).SerializeToString())
    refused(place / "x.onnx")


@pytest.mark.parametrize("put", PLACES)
def test_weights_beside_the_file_are_read_in_every_place(put, place):
    """What is refused above is refused for its reason: the same graph with a plain file works."""
    plain(place / "w.bin", None)
    tensor = outside("w", {"location": "w.bin", "length": "16"})
    (place / "x.onnx").write_bytes(put(tensor).SerializeToString())
    files.load(place / "x.onnx")
    with compress.open_session(place / "x.onnx", "onnxruntime") as session:
        assert np.isfinite(session.run(np.zeros(4, np.float32))[0]).all()


GOOD = {
    "model": {"name": "compress.models.cifar:resnet8"},
    "data": {"name": "digits"},
    "stages": [{"prune": {"keep_macs": 0.5}}],
}


def billion(depth, width):
    """Return a few lines that stand for width ** depth values."""
    lines = ["l0: &l0 [1]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * width)}]" for n in range(1, depth)]
    return "\n".join(lines)


BOMBS = {
    "lists": billion(30, 9),
    "maps": "\n".join(
        ["m0: &m0 {a: 1}"] + [f"m{n}: &m{n} {{a: *m{n - 1}, b: *m{n - 1}}}" for n in range(1, 60)]
    ),
    "merges": "\n".join(
        ["m0: &m0 {a: 1}"] + [f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}" for n in range(1, 40)]
    ),
    "itself": "a: &a [*a]",
    "each other": "a: &a {b: &b [*a]}",
    "deep": "[" * 100_000,
    "deep maps": "{a: " * 50_000,
    "object": "!!python/object/apply:os.system ['touch {}']",
    "name": "task: !!python/name:os.system ''",
    "module": "task: !!python/module:subprocess ''",
    "new": "task: !!python/object/new:subprocess.Popen [['touch', '{}']]",
    "own tag": "task: !exec 'touch {}'",
    "date": "seed: 2026-99-99",
    "set": "task: !!set {a, b}",
    "key": "? [a, b]\n: c",
    "long number": f"seed: {'9' * 10000}",
    "two documents": "a: 1\n---\nb: 2",
}


@pytest.mark.parametrize("name", BOMBS)
def test_recipes_that_stand_for_more_than_they_say(name, tmp_path, tried):
    tried("recipes with alias bombs, tags that make objects, depth without end")
    path, trace = tmp_path / "x.yaml", tmp_path / "was here"
    path.write_text(yaml.safe_dump(GOOD) + BOMBS[name].replace("{}", str(trace)))
    if name in {"deep", "deep maps"}:
        path.write_text(BOMBS[name])
    begun = resource.getrusage(resource.RUSAGE_SELF)
    tracemalloc.start()
    with pytest.raises(RecipeError):
        load_recipe(path)
    assert tracemalloc.get_traced_memory()[1] < 256 << 20
    tracemalloc.stop()
    spent = resource.getrusage(resource.RUSAGE_SELF)
    assert spent.ru_utime - begun.ru_utime < 10
    assert not trace.exists()


def test_aliases_of_a_plain_kind_are_taken(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "model: {name: 'compress.models.cifar:resnet8'}\ndata: {name: digits}\n"
        "stages:\n- train: &t {epochs: 1}\n- prune: {keep_macs: 0.5}\n- finetune: *t\n"
    )
    assert load_recipe(path).stages[2].settings.epochs == 1


@pytest.mark.parametrize("name", ["../../etc/cron.d/x", "/tmp/x", "a/b", "..", ".", "a\0b", "a\\b"])
def test_a_recipe_does_not_choose_a_folder_elsewhere(name, tmp_path, tried):
    tried("recipes whose name is a path: runs/NAME would lie elsewhere")
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(GOOD | {"name": name}))
    with pytest.raises(RecipeError, match="name of a run is that of one folder"):
        load_recipe(path)


def shard(path, members):
    with tarfile.open(path, "w") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    "name", ["../../climbed", "/tmp/climbed", "a/../../climbed", "..", "C:\\x"]
)
def test_members_of_archives_are_never_written(name, tmp_path, tried):
    """Shards are read where they lie: a name is only a key, a link is passed over."""
    tried("tar members that climb, links and devices in tar files; zip members that climb")
    from PIL import Image

    (tmp_path / "data").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "data" / "x.png")
    png = (tmp_path / "data" / "x.png").read_bytes()
    (tmp_path / "data" / "x.png").unlink()
    members = []
    for number in range(40):
        for ending, content in (("png", png), ("cls", str(number % 2).encode())):
            members.append((tarfile.TarInfo(f"{name}{number}.{ending}"), content))
    hostile = tarfile.TarInfo(f"{name}.lnk")
    hostile.type, hostile.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members.append((hostile, b""))
    shard(tmp_path / "data" / "a.tar", members)
    before = sorted(tmp_path.rglob("*"))
    with contextlib.suppress(CompressError):  # ".." is hidden, and then there are no images
        data = load_data(parse_reference(f"webdataset:{tmp_path / 'data'}", image_size=8))
        data.splits["train"].take(range(8))
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/climbed0.png").exists()


@pytest.mark.parametrize("name", ["../../climbed", "/tmp/climbed", "x_train"])
def test_zip_members_are_never_written(name, tmp_path, tried):
    tried("tar members that climb, links and devices in tar files; zip members that climb")
    pixels, labels = np.zeros((24, 8, 8, 1), np.uint8), np.arange(24) % 2
    path = tmp_path / "x.npz"
    np.savez(
        path, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels, **{f"{name}_": labels}
    )
    before = sorted(tmp_path.rglob("*"))
    with contextlib.suppress(CompressError):
        load_data(parse_reference(f"npz:{path}"))
    assert sorted(tmp_path.rglob("*")) == before


def header(content, size=None, data=b"\0" * 64):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(start, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


LIES = {
    "no header": b"",
    "half a length": b"\1\0",
    "longer than the file": header({"a": tensor(0, 16)}, size=2**20),
    "an exabyte": header({"a": tensor(0, 16)}, size=2**60),
    "2**64 - 1": header({"a": tensor(0, 16)}, size=2**64 - 1),
    "no JSON": header(b"{" * 64),
    "deep": header(b"[" * 100_000),
    "beyond the end": header({"a": tensor(0, 2**40, (2**38,))}),
    "shape of a terabyte": header({"a": tensor(0, 16, (2**38,))}),
    "shape that overflows": header({"a": tensor(0, 0, (2**32, 2**32))}),
    "negative": header({"a": tensor(-16, 0)}),
    "backwards": header({"a": tensor(16, 0)}),
    "overlapping": header({"a": tensor(0, 16), "b": tensor(8, 24)}, data=b"\0" * 24),
    "a hole": header({"a": tensor(0, 16), "b": tensor(32, 48)}, data=b"\0" * 48),
    "bytes left over": header({"a": tensor(0, 16)}),
    "wrong type": header({"a": tensor(0, 16, dtype="F128")}),
    "a text for a shape": header({"a": {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}}),
    "no tensors": header({"__metadata__": {"a": "b"}}, data=b""),
    "metadata of numbers": header({"__metadata__": {"a": 1}, "a": tensor(0, 16)}, data=b"\0" * 16),
    "twice": header(b'{"a":%b,"a":%b}' % ((json.dumps(tensor(0, 16)).encode(),) * 2)),
}


@pytest.mark.parametrize("name", LIES)
def test_safetensors_whose_header_lies(name, tmp_path, tried):
    tried("safetensors whose header lies about lengths, shapes, places, types")
    path = tmp_path / "x.safetensors"
    path.write_bytes(LIES[name])
    tracemalloc.start()
    try:
        found = read_weights(path)
        assert name in {"twice", "no tensors"}, name
        assert sum(each.numel() for each in found.values()) <= 16
    except ModelError:
        pass
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


VARIANT = {"name": "original", "path": "00-original/model.onnx", "stage": "00-original"}
FOREIGN = ["/etc/passwd", "../secret", "00-original/../../secret", "link/secret"]


@pytest.mark.parametrize("path", FOREIGN)
def test_a_run_folder_that_names_files_elsewhere(path, tmp_path, tried):
    """Nothing outside is hashed, packed or opened, whatever the records say."""
    tried("run folders whose records name files elsewhere: nothing outside is opened or packed")
    run = tmp_path / "run"
    (tmp_path / "secret").write_bytes(SECRET)
    (run / "00-original").mkdir(parents=True)
    (run / "link").symlink_to(tmp_path)
    with pytest.raises(RunError, match="outside the run folder"):
        inside(run, path)
    record = {"variants": [VARIANT | {"path": path}], "facts": {}}
    write_json(run / "00-original" / "metrics.json", record)
    write_json(run / "run.json", {"recipe": GOOD | {"name": "x", "seed": 0}, "artifacts": []})
    ended = attempt("bundle", run, "--out", tmp_path / "x.tar.gz", log=tmp_path / "log")
    assert ended.code == 2 and "outside the run folder" in ended.told, ended.told
    assert not (tmp_path / "x.tar.gz").exists()


def test_a_bundle_does_not_hold_members_that_climb(tmp_path, tried):
    tried("run folders whose records name files elsewhere: nothing outside is opened or packed")
    run = tmp_path / "run"
    (run / "00-original").mkdir(parents=True)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    compress.export_onnx(model, torch.zeros(1, 1, 8, 8), run / VARIANT["path"])
    record = {"variants": [VARIANT | {"name": "../../x"}], "facts": {}}
    write_json(run / "00-original" / "metrics.json", record)
    write_json(run / "run.json", {"recipe": GOOD | {"name": "x", "seed": 0}, "artifacts": []})
    with pytest.raises(RunError, match="is no name of a network"):
        write_bundle(run, tmp_path / "x.tar.gz")


@pytest.mark.parametrize("record", [{}, {"variants": 1, "facts": {}}, {"variants": [{}]}, [], None])
def test_a_record_of_a_stage_that_is_none(record):
    with pytest.raises(RunError, match="is no record of a stage"):
        StageResult.from_json(record)


HOSTILE = {
    "escape": "cat\x1b[2J\x1b]8;;http://evil\x07",
    "markup": "[red]dog[/red]:cat:",
    "turned": "owl\u202egnp.exe",
    "line": "ant\n0 problems",
    "script": "<script>alert(1)</script>",
    "markdown": "[x](javascript:alert(1)) | **b**",
}


@pytest.mark.slow
def test_hostile_class_names_through_a_whole_run(tmp_path, tried):
    """Terminal, log, HTML and Markdown show the names of classes and obey none of them."""
    tried("class names with escapes, markup, turned writing, scripts through a whole run", 6)
    draw = np.random.default_rng(0)
    names = np.array(list(HOSTILE.values()))
    labels = np.arange(240) % len(names)
    pixels = draw.integers(0, 256, (300, 8, 8, 1)).astype(np.uint8)
    np.savez(
        tmp_path / "x.npz",
        x_train=pixels[:240],
        y_train=labels,
        classes=names,
        x_test=pixels[240:],
        y_test=labels[:60],
    )
    run = tmp_path / "run"
    ended = attempt(
        *("prune", "compress.models.cifar:resnet8", "--data", f"npz:{tmp_path / 'x.npz'}"),
        *("--set", "model.options.in_channels=1", "--set", "model.options.width=4"),
        *("--set", "measure.rounds=3"),
        *("--set", "measure.round_ms=1", "--criterion", "l1", "--out", run),
        log=tmp_path / "log",
    )
    assert ended.code == 0, ended.told
    page, text = ((run / f"report.{kind}").read_text() for kind in ("html", "md"))
    for shown in (ended.told, text, page):
        assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    assert "<script>alert(1)" not in page and "<script>alert(1)" not in text
    assert "](javascript:" not in text
    assert "\n0 problems" not in ended.told
