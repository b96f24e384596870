"""What reads files of strangers, with valid files to begin from and ways to change them."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import yaml
from mutations import change_bytes, change_json, change_message, change_text, change_zip
from onnx import numpy_helper
from torch import nn

import compress
from compress.data._images import decoded
from compress.data._pictures import Fit
from compress.data.cifar10 import Cifar10
from compress.data.mnist import Mnist
from compress.data.npz import Npz
from compress.measure import count_onnx
from compress.models.weights import aligned, fit, read_weights
from compress.pipeline.verify import verify_files
from compress.recipe.loading import load_recipe
from compress.report import read_run, write

DATA = Path(os.environ.get("COMPRESS_DATA", Path(__file__).parents[3] / "shared" / "data"))
TARGETS = ("onnxruntime", "openvino", "tensorrt")
Seeds = list[Any]


@dataclass(frozen=True)
class Reader:
    """One boundary: valid files, how they are changed, and the function that reads them."""

    name: str
    about: str  # what is changed and read, for the table
    seeds: Callable[[Path], Seeds]
    mutate: Callable[[random.Random, Seeds], Any]
    read: Callable[[Path, Any], object]


class Net(nn.Module):
    """A residual network of 2,000 weights."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.right = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = self.stem(x)
        x = torch.relu(x + self.norm(self.right(self.left(x))))
        return self.head(x.mean((2, 3)))


def network() -> Net:
    """Return the network with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def batches(count: int = 8, size: int = 16) -> list[np.ndarray]:
    """Return normalized images."""
    return [np.random.default_rng(0).standard_normal((count, 3, size, size)).astype(np.float32)]


def write_file(folder: Path, name: str, content: bytes) -> Path:
    """Write a file and return its path."""
    path = folder / name
    path.write_bytes(content)
    return path


# ONNX


def float_graphs(folder: Path) -> list[onnx.ModelProto]:
    """Return small fp32 graphs: exported by us, by others, and with every construct by hand."""
    path = folder / "net.onnx"
    compress.export_onnx(network(), torch.zeros(1, 3, 16, 16), path)
    found = [onnx.load(path), branches(), local_function()]
    for name in ("mnist", "mtcnn_pnet"):
        if (DATA / "onnx" / f"{name}.onnx").is_file():
            found.append(onnx.load(DATA / "onnx" / f"{name}.onnx"))
    return found


def branches() -> onnx.ModelProto:
    """Return a graph with an If, a Loop and a Constant of each kind."""
    return onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 8, 8] x, bool c) => (float[N, 4, 8, 8] y)
        <float[4, 3, 1, 1] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, int64 trips = {2},
         bool go = {1}>
        {
            a = Conv(x, w)
            k = Constant <value_float = 2.0> ()
            b = If (c) <
                then_branch = t () => (float[N, 4, 8, 8] u) { u = Mul(a, k) },
                else_branch = e () => (float[N, 4, 8, 8] v) { v = Relu(a) }>
            y = Loop (trips, go, b) <
                body = l (int64 i, bool again, float[N, 4, 8, 8] s)
                    => (bool on, float[N, 4, 8, 8] r) { on = Identity(again)  r = Add(s, a) }>
        }""")


def local_function() -> onnx.ModelProto:
    """Return a graph that calls functions of its own."""
    return onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[N, 3, 8, 8] x) => (float[N, 2] y)
        <float[2, 3, 1, 1] w = {1, 2, 3, 4, 5, 6}>
        {
            a = Conv(x, w)
            b = own.f (a)
            y = own.h (b)
        }
        <domain: "own", opset_import: ["" : 17]>
        f (a) => (b) { b = Relu(a) }
        <domain: "own", opset_import: ["" : 17, "own" : 1]>
        h (a) => (c) { b = GlobalAveragePool(a)  c = Flatten(b) }""")


def int8_graphs(folder: Path) -> list[bytes]:
    """Return the fp32 graphs and what is made of the first for each target."""
    graphs = float_graphs(folder)
    for target in TARGETS:
        out = folder / f"{target}.onnx"
        compress.quantize_onnx(folder / "net.onnx", batches(), out, target, method="plain")
        graphs.append(onnx.load(out))
    return [graph.SerializeToString() for graph in graphs]


def change_onnx(rng: random.Random, seeds: Seeds) -> bytes:
    """Change bytes (a third of the files) or fields of the message."""
    content = rng.choice(seeds)
    if rng.random() < 0.33:
        return change_bytes(rng, content, rng.choice(seeds))
    model = onnx.load_from_string(content)
    change_message(rng, model)
    return model.SerializeToString()


def lint(folder: Path, content: bytes) -> None:
    """Lint, mend and count a file."""
    path = write_file(folder, "case.onnx", content)
    target = TARGETS[len(content) % 3]
    findings = compress.lint_onnx(path, target)
    if findings and len(content) % 2:
        from compress.qdq.lint import fix_onnx

        fix_onnx(path, folder / "fixed.onnx", target)
    with contextlib.suppress(compress.CompressError):  # its sizes may be free
        count_onnx(path)


def quantize(folder: Path, content: bytes) -> None:
    """Quantize a file for one target."""
    path = write_file(folder, "case.onnx", content)
    graph = onnx.load_from_string(content).graph if _parses(content) else None
    feeds: Any = batches()
    if graph is not None and graph.input:
        feeds = [_feed(graph)]
    target = TARGETS[len(content) % 3]
    method = ("plain", "auto")[len(content) % 8 == 0]
    compress.quantize_onnx(path, feeds, folder / "int8.onnx", target, method=method)


def _parses(content: bytes) -> bool:
    try:
        onnx.load_from_string(content)
    except Exception:  # noqa: BLE001
        return False
    return True


def _feed(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Return images as the inputs ask for them, where they ask for something possible."""
    rng = np.random.default_rng(0)
    constants = {t.name for t in graph.initializer}
    feed = {}
    for value in graph.input:
        if value.name in constants:
            continue
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
        shape = [8, *(d if 0 < d < 64 else 16 for d in dims[1:])] if dims else []
        if value.type.tensor_type.elem_type == onnx.TensorProto.BOOL:
            feed[value.name] = np.ones(shape, bool)
        else:
            feed[value.name] = rng.standard_normal(shape).astype(np.float32)
    return feed


# Plans


def quant_plans(folder: Path) -> Seeds:
    """Return the plans of all corrections, with the graph they are for."""
    path = folder / "plan-net.onnx"
    compress.export_onnx(network(), torch.zeros(1, 3, 16, 16), path)
    plans = []
    methods = {"onnxruntime": ("plain", "auto", "equalization"), "openvino": ("rounding",)}
    for target in TARGETS:
        for method in methods.get(target, ("plain", "bias-correction")):
            plan = compress.quantize_onnx(path, batches(), folder / "q.onnx", target, method=method)
            plans.append(json.loads(json.dumps(plan.to_json())))
    return plans


def change_tree(rng: random.Random, seeds: Seeds) -> bytes:
    """Change a JSON tree, or its text now and then."""
    tree = rng.choice(seeds)
    if rng.random() < 0.1:
        return change_bytes(rng, json.dumps(tree).encode())
    return json.dumps(change_json(rng, tree)).encode()


def quant_plan(folder: Path, content: bytes) -> None:
    """Read a plan and write the graph it describes; its scales must be finite and positive."""
    from compress.qdq.writer import write_qdq

    path = write_file(folder, "quant.json", content)
    plan = compress.QuantPlan.load(path)
    plan.to_json()
    plan.save(folder / "again.json")
    written = write_qdq(onnx.load(folder / "plan-net.onnx"), plan)
    for tensor in written.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.name.endswith("_scale") and not (
            np.isfinite(values).all() and (values > 0).all()
        ):
            raise AssertionError(f"scale {tensor.name} is {values}")


def prune_plans(folder: Path) -> Seeds:
    """Return plans of several criteria and budgets."""
    example = torch.zeros(1, 3, 16, 16)
    return [
        compress.plan_pruning(network(), example, criterion=c, keep_macs=k).to_json()
        for c, k in (("l1", 0.5), ("l2", 0.7), ("random", 0.3))
    ]


def prune_plan(folder: Path, content: bytes) -> None:
    """Read a plan and apply it: the pruned network equals its masked reference, or is refused."""
    path = write_file(folder, "prune.json", content)
    plan = compress.PrunePlan.load(path)
    plan.save(folder / "again.json")
    model = network()
    small = compress.apply_pruning(model, plan)
    reference = compress.mask_pruning(model, plan)
    images = torch.from_numpy(batches(2)[0])
    with torch.no_grad():
        difference = float((small(images) - reference(images)).abs().max())
    if not difference < 1e-3:
        raise AssertionError(f"pruned and masked network differ by {difference}")


# Checkpoints


def checkpoints(folder: Path) -> Seeds:
    """Return the same weights in every form they come in."""
    from safetensors.torch import save

    state = network().state_dict()
    found = [(".safetensors", save({key: value.clone() for key, value in state.items()}))]
    contents = (state, {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3})
    for content in contents:
        for new in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=new)
            found.append((".pt", file.getvalue()))
    return found


def change_checkpoint(rng: random.Random, seeds: Seeds) -> tuple[str, bytes]:
    """Change bytes of the file, or of a member of the archive with its checksum set right."""
    suffix, content = rng.choice(seeds)
    if suffix == ".safetensors" and rng.random() < 0.6:
        size = int.from_bytes(content[:8], "little")
        header = json.dumps(change_json(rng, json.loads(content[8 : 8 + size]))).encode()
        return suffix, len(header).to_bytes(8, "little") + header + content[8 + size :]
    if content[:2] == b"PK" and rng.random() < 0.6:
        return suffix, change_zip(rng, content, change_bytes)
    return suffix, change_bytes(rng, content, rng.choice(seeds)[1])


def checkpoint(folder: Path, content: tuple[str, bytes]) -> None:
    """Read weights and load them."""
    path = write_file(folder, f"case{content[0]}", content[1])
    model = network()
    fit(model, aligned(read_weights(path), model), where=str(path))


# Data


def archives(folder: Path) -> Seeds:
    """Return archives of labelled images as arrays."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 8, 8, 3)).astype(np.uint8)
    labels = (np.arange(24) % 4).astype(np.int64)
    base = {"x_train": pixels, "y_train": labels, "x_test": pixels[:8], "y_test": labels[:8]}
    names = np.array(["ant", "bee", "cat", "dog"])
    group = np.array(list("aabbaabb"))
    return [
        base,
        base | {"classes": names, "group_test": group},
        base | {"x_validation": pixels[:8], "y_validation": labels[:8], "classes": names},
        {k: v[..., 0] if k[0] == "x" else v for k, v in base.items()},
    ]


DTYPES = ("u1", "i8", "i2", "f4", "f8", "?", "U3", "S2", "c8", "M8[s]", "V5")


def change_archive(rng: random.Random, seeds: Seeds) -> bytes:
    """Change arrays (values, shapes, types), a member of the archive, or bytes of the file."""
    arrays = dict(rng.choice(seeds))
    if rng.random() < 0.5:
        name = rng.choice(list(arrays))
        arrays[name] = _change_array(rng, arrays[name])
        if rng.random() < 0.1:
            del arrays[name]
    file = io.BytesIO()
    np.savez(file, **arrays)
    content = file.getvalue()
    kind = rng.randrange(4)
    if kind == 0:
        return change_bytes(rng, content)
    if kind == 1:
        return change_zip(rng, content, _change_npy)
    return content


def _change_array(rng: random.Random, array: np.ndarray) -> np.ndarray:
    kind = rng.randrange(6)
    if kind == 0:
        with np.errstate(all="ignore"):
            try:
                return array.astype(rng.choice(DTYPES))
            except (TypeError, ValueError):
                return array.view("u1")
    if kind == 1:
        return array[: rng.choice((0, 1, 3))]
    if kind == 2:
        return array.reshape(-1)
    if kind == 3:
        return array[..., None]
    if kind == 4 and array.size:
        array = array.copy()
        value = rng.choice((-1, 99, 2**31, 2**62, 255, 0, "x"))
        try:
            array.flat[rng.randrange(array.size)] = value
        except (ValueError, OverflowError):
            array.flat[0] = array.flat[-1]
        return array
    return np.array(0)


def _change_npy(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.5:
        old = content[10:128]
        return (
            content[:10]
            + change_text(rng, old.decode("latin1")).encode("latin1", "replace")
            + (content[128:])
        )
    return change_bytes(rng, content)


def archive(folder: Path, content: bytes) -> None:
    """Read an archive, split it, and read every image with its label."""
    path = write_file(folder, "case.npz", content)
    _use(Npz(str(path)), folder)


def _use(plugin: Any, folder: Path) -> None:
    source = plugin.load()
    for images in (source.train, source.test, source.validation):
        if images is None:
            continue
        pixels = images.take(range(len(images)))
        labels = np.asarray(images.labels)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or len(pixels) != len(labels):
            raise AssertionError(f"{len(labels)} labels and pixels {pixels.dtype} {pixels.shape}")
        if labels.min() < 0 or (len(source.classes) > 1 and labels.max() >= len(source.classes)):
            raise AssertionError(f"labels {labels.min()}..{labels.max()}, {source.classes}")


def idx_files(folder: Path) -> Seeds:
    """Return the four files of a small MNIST."""
    rng = np.random.default_rng(0)
    found = {}
    for prefix, count in (("train", 20), ("t10k", 10)):
        pixels = rng.integers(0, 256, (count, 8, 8)).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for array, name in ((pixels, "images-idx3"), (labels, "labels-idx1")):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            found[f"{prefix}-{name}-ubyte"] = head + array.tobytes()
    return [found]


def change_idx(rng: random.Random, seeds: Seeds) -> dict[str, bytes]:
    """Change one of the files, mostly near its header; some are gzipped."""
    files = dict(seeds[0])
    name = rng.choice(list(files))
    content = files[name]
    if rng.random() < 0.5:
        head = bytearray(content[:24])
        head[rng.randrange(min(20, len(head)))] = rng.choice((0, 1, 2, 9, 127, 128, 255))
        content = bytes(head) + content[24:]
    elif rng.random() < 0.3:
        content = content[:8] + bytes(rng.randrange(256) for _ in content[8:])
    else:
        content = change_bytes(rng, content)
    files[name] = content
    if rng.random() < 0.3:
        packed = gzip.compress(files.pop(name))
        files[f"{name}.gz"] = change_bytes(rng, packed) if rng.random() < 0.5 else packed
    return files


def idx(folder: Path, files: dict[str, bytes]) -> None:
    """Read a folder of IDX files."""
    _use(Mnist(str(_unpack(folder / "mnist", files))), folder)


def _unpack(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        write_file(folder, name, content)
    return folder


def cifar_files(folder: Path) -> Seeds:
    """Return the batches of a small CIFAR-10, as its authors store them."""
    rng = np.random.default_rng(0)
    files = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = rng.integers(0, 256, (10, 3072)).astype(np.uint8)
        part = {"data": pixels, "labels": list(range(10)), "batch_label": name, "filenames": []}
        files[name] = pickle.dumps(part, protocol=2)
    files["batches.meta"] = pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}, protocol=2)
    return [files]


def change_cifar(rng: random.Random, seeds: Seeds) -> dict[str, bytes]:
    """Change bytes of one of the pickles."""
    files = dict(seeds[0])
    name = rng.choice(list(files))
    files[name] = change_bytes(rng, files[name])
    return files


def cifar(folder: Path, files: dict[str, bytes]) -> None:
    """Read a folder of CIFAR-10 batches."""
    root = folder / "cifar"
    root.mkdir(exist_ok=True)
    _unpack(root / "cifar-10-batches-py", files)
    _use(Cifar10(str(root)), folder)


def pictures(folder: Path) -> Seeds:
    """Return small pictures in every format and mode."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3)).astype(np.uint8)
    found = []
    for suffix in ("png", "jpeg", "gif", "tiff", "webp", "bmp", "ppm"):
        for mode in ("RGB", "L", "P", "RGBA", "CMYK", "I;16", "F", "1"):
            file = io.BytesIO()
            image = Image.fromarray(pixels).convert(mode)
            if mode == "F":  # white is 1
                image = image.point(lambda value: value * (1 / 255) + 0.0)
            try:
                image.save(file, suffix)
            except (OSError, ValueError):
                continue
            found.append(file.getvalue())
    return found


def change_picture(rng: random.Random, seeds: Seeds) -> bytes:
    """Change bytes."""
    return change_bytes(rng, rng.choice(seeds), rng.choice(seeds))


def picture(folder: Path, content: bytes) -> None:
    """Decode a picture."""
    path = write_file(folder, "case.png", content)
    pixels = decoded(path, Fit((8, 8), "squash"), 1 + 2 * (len(content) % 2), where=str(path))
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (8, 8):
        raise AssertionError(f"{pixels.dtype} {pixels.shape}")


# Recipes, run folders, reports


def recipes(folder: Path) -> Seeds:
    """Return the recipes that come with the package."""
    from compress.recipe.loading import packaged_recipes

    return [path.read_text("utf-8") for path in packaged_recipes().values()]


def change_recipe(rng: random.Random, seeds: Seeds) -> bytes:
    """Change the text, or the tree."""
    text = rng.choice(seeds)
    if rng.random() < 0.4:
        return change_text(rng, text).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        return change_bytes(rng, text.encode())
    return yaml.safe_dump(change_json(rng, yaml.safe_load(text)), allow_unicode=True).encode()


def recipe(folder: Path, content: bytes) -> None:
    """Read a recipe, and write it resolved as a run does."""
    from compress.recipe.loading import dump

    loaded = load_recipe(write_file(folder, "case.yaml", content))
    again = load_recipe(write_file(folder, "resolved.yaml", dump(loaded).encode()))
    if again != loaded:
        raise AssertionError("the resolved recipe is another one")


def run_folders(folder: Path) -> Seeds:
    """Return run.json and report.json of a run with every part of a report."""
    import sys

    sys.path.append(str(Path(__file__).parents[1] / "report"))
    import made_up

    report = made_up.report().to_json()
    record = {
        "schema": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "recipe": yaml.safe_load(recipes(folder)[0]),
        "artifacts": [
            {"path": "00-original/model.onnx", "sha256": "0" * 64, "stage": "00-original"},
            {"path": "run.json", "sha256": "1" * 64, "stage": "01-prune", "parent": "0" * 64},
        ],
    }
    return [(record, report), (record, None)]


def change_run(rng: random.Random, seeds: Seeds) -> tuple[bytes, bytes | None]:
    """Change run.json, report.json or both."""
    record, report = rng.choice(seeds)
    which = rng.randrange(3) if report is not None else 0
    first = change_tree(rng, [record]) if which != 1 else json.dumps(record).encode()
    if report is None:
        return first, None
    return first, change_tree(rng, [report]) if which else json.dumps(report).encode()


def run_folder(folder: Path, content: tuple[bytes, bytes | None]) -> None:
    """Read a run folder, write its report again, check its files."""
    root = folder / "run"
    root.mkdir(exist_ok=True)
    (root / "report.json").unlink(missing_ok=True)
    write_file(root, "run.json", content[0])
    if content[1] is not None:
        write_file(root, "report.json", content[1])
    errors = []
    for work in (lambda: write(read_run(root), folder / "report"), lambda: verify_files(root)):
        try:
            work()
        except compress.CompressError as error:
            errors.append(error)
    if errors:
        raise errors[0]


READERS = (
    Reader("onnx-lint", "ONNX files, linted and mended", int8_graphs, change_onnx, lint),
    Reader(
        "onnx-quantize",
        "ONNX files, quantized",
        lambda folder: [graph.SerializeToString() for graph in float_graphs(folder)],
        change_onnx,
        quantize,
    ),
    Reader("quant-plan", "QuantPlan JSON, written", quant_plans, change_tree, quant_plan),
    Reader("prune-plan", "PrunePlan JSON, applied", prune_plans, change_tree, prune_plan),
    Reader(
        "checkpoint", "checkpoints (.pt, .safetensors)", checkpoints, change_checkpoint, checkpoint
    ),
    Reader("npz", "NumPy archives of images", archives, change_archive, archive),
    Reader("idx", "IDX files", idx_files, change_idx, idx),
    Reader("cifar", "CIFAR-10 batches", cifar_files, change_cifar, cifar),
    Reader("picture", "pictures", pictures, change_picture, picture),
    Reader("recipe", "recipes, YAML", recipes, change_recipe, recipe),
    Reader("run-folder", "run.json and report.json", run_folders, change_run, run_folder),
)
