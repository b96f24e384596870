"""Random networks of the parts that CNNs are made of, and everything that must hold for each.

A network is a list of blocks, [kind, number, number, number]: plain data, so that one which fails
shrinks by leaving blocks out, and comes back from its list in another process.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import compress
from compress.errors import PlanError
from compress.groups import trace
from compress.groups.plan import make_prune_plan
from compress.groups.proof import prove

Blocks = list[list[Any]]
REFERENCE = f"{Path(__file__).resolve()}:build"
WIDTHS = (6, 8, 12, 16, 20)
SIDES = (16, 17, 21)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.Identity, nn.GELU)
TARGETS = ("onnxruntime", "openvino", "tensorrt")
LEAST_SQNR_DB = 3.0  # of centred outputs: below it more is noise than signal in a random network
LARGEST_DIFFERENCE = 1e-3  # of an ONNX graph from torch, of the largest output


def conv(inputs: int, outputs: int, number: int, **options: Any) -> nn.Sequential:
    """Return a convolution, a normalization and an activation, which ones by ``number``."""
    kernel = options.pop("kernel_size", (1, 3, 5, (1, 3))[number % 4])
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    options.setdefault("padding", tuple(side // 2 for side in sides))
    norms: tuple[Callable[[], nn.Module], ...] = (
        lambda: nn.BatchNorm2d(outputs),
        lambda: nn.BatchNorm2d(outputs),
        lambda: nn.GroupNorm(2, outputs),
        nn.Identity,
    )
    layer = nn.Conv2d(inputs, outputs, sides, bias=bool(number % 2), **options)
    return nn.Sequential(
        layer, norms[number // 3 % 4](), ACTIVATIONS[number // 5 % len(ACTIVATIONS)]()
    )


class Plain(nn.Module):
    """A convolution with an odd stride or dilation; smaller images keep their size."""

    def __init__(self, inputs: int, width: int, a: int, b: int) -> None:
        super().__init__()
        stride = ((1, 1), (2, 1), (2, 2), (1, 3))[a % 4]
        self.body = conv(inputs, width, b, stride=stride, dilation=1 + (b % 7 == 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Residual(nn.Module):
    def __init__(self, inputs: int, width: int, a: int, b: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(inputs, width, a), conv(width, inputs, b))
        self.scale = 0.5 if a % 3 == 0 else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.scale * self.body(x))


class Concat(nn.Module):
    def __init__(self, inputs: int, width: int, a: int, b: int) -> None:
        super().__init__()
        self.one, self.two, self.dense = conv(inputs, width, a), conv(inputs, width, b), a % 2 == 0

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), *([x] if self.dense else []), self.two(x)], dim=1)


class Split(nn.Module):
    def __init__(self, inputs: int, width: int, a: int, b: int) -> None:
        super().__init__()
        self.body, self.way = conv(inputs // 2, inputs // 2, b), a % 3

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 0:
            one, two = x.chunk(2, dim=1)
        else:
            half = x.shape[1] // 2
            one, two = (x[:, :half], x[:, half:]) if self.way == 1 else x.split(half, dim=1)
        return torch.cat([two, self.body(one)], dim=1)


class Grouped(nn.Module):
    def __init__(self, inputs: int, width: int, a: int, b: int) -> None:
        super().__init__()
        self.body = conv(inputs, inputs * (1 + a % 2), b, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Inverted(nn.Module):
    """Expand, depthwise, squeeze-excite, project."""

    def __init__(self, inputs: int, width: int, a: int, b: int) -> None:
        super().__init__()
        self.expand = conv(inputs, width, a, kernel_size=1)
        self.depthwise = conv(width, width, b, groups=width, stride=1 + a % 2)
        self.squeeze = SqueezeExcite(width, width, a, b)
        self.project = nn.Sequential(nn.Conv2d(width, inputs, 1), nn.BatchNorm2d(inputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + y if y.shape == x.shape else y


class SqueezeExcite(nn.Module):
    def __init__(self, inputs: int, width: int, a: int, b: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(inputs, 4, 1), nn.Conv2d(4, inputs, 1)
        self.gate = F.hardsigmoid if b % 2 else torch.sigmoid

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.up(F.relu(self.down(pooled))))


class Shuffle(nn.Module):
    def __init__(self, inputs: int, width: int, a: int, b: int) -> None:
        super().__init__()
        self.body = conv(inputs, inputs, b, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        y = x.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        return self.body(y.reshape(batch, channels, height, width))


class Shared(nn.Module):
    def __init__(self, inputs: int, width: int, a: int, b: int) -> None:
        super().__init__()
        self.body, self.again = conv(inputs, inputs, a), 1 + b % 2

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.again):
            x = self.body(x)
        return x + self.body(x)


class Transposed(nn.Module):
    def __init__(self, inputs: int, width: int, a: int, b: int) -> None:
        super().__init__()
        groups = 2 if a % 3 == 0 else 1
        self.up = nn.ConvTranspose2d(inputs, width, 2 + a % 2, stride=2, groups=groups)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.up(x)))


class Viewed(nn.Module):
    """Channels folded in two and averaged, or pixels folded into channels and back."""

    def __init__(self, inputs: int, width: int, a: int, b: int) -> None:
        super().__init__()
        self.body, self.way = conv(inputs, 2 * width, b), a % 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.way:
            return F.avg_pool2d(y, 2, ceil_mode=True) if min(y.shape[2:]) > 4 else y
        batch, channels, height, width = y.shape
        return y.reshape(batch, 2, channels // 2, height, width).mean(1)


class Branch(nn.Module):
    """Two ways of different depth, pooled alike, joined by a product."""

    def __init__(self, inputs: int, width: int, a: int, b: int) -> None:
        super().__init__()
        self.one = conv(inputs, width, a, kernel_size=3)
        self.two = nn.Sequential(conv(inputs, width, b, kernel_size=1), nn.Sigmoid())
        self.pool = nn.MaxPool2d(3, 2, 1) if a % 2 else nn.AvgPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.one(x) * self.two(x))


KINDS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        *(Plain, Residual, Concat, Split, Grouped, Inverted, SqueezeExcite),
        *(Shuffle, Shared, Transposed, Viewed, Branch),
    )
}


class RandomNet(nn.Module):
    """A stem, blocks, and one or several heads of several kinds."""

    def __init__(self, blocks: Blocks, heads: int, side: int) -> None:
        super().__init__()
        self.stem = conv(3, 8, 1, kernel_size=3)
        self.blocks = nn.ModuleList()
        x = self.stem(torch.zeros(2, 3, side, side))
        for kind, width, a, b in blocks:
            if min(x.shape[2:]) < 3 and kind in {"Plain", "Inverted", "Branch"}:
                a = 0
            if max(x.shape[2:]) > 2 * side and kind == "Transposed":
                kind = "Residual"
            block = KINDS[kind](x.shape[1], width, a, b).eval()
            x = block(x)
            self.blocks.append(block)
        channels = x.shape[1]
        self.flat = heads % 2 == 1
        self.linear = nn.Linear(channels * (4 if self.flat else 1), 7)
        self.maps = nn.Conv2d(channels, 3, 1) if heads >= 2 else None

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        pooled = F.adaptive_avg_pool2d(x, 2 if self.flat else 1).flatten(1)
        scores = self.linear(pooled)
        return scores if self.maps is None else (scores, self.maps(x))


def build(blocks: str, heads: int = 0, side: int = 16) -> RandomNet:
    """Return the network of a list of blocks (JSON); its weights depend on the list alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RandomNet(json.loads(blocks), heads, side)
        zoo.randomize(model)
        liven(model, images({"side": side}))
    return model.eval()


def liven(model: nn.Module, x: Tensor) -> None:
    """Let signals live through all layers, as in a trained network: weights as large as He's.

    The statistics of BatchNorm are those of ``x``. Else a deep network answers its biases alone,
    and images differ by less than any rounding.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.mul_(6**0.5)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all calls
        model.train()(x)
    for norm in norms:
        norm.momentum = 0.1


def drawn(seed: int) -> dict[str, Any]:
    """Return the options of network number ``seed``."""
    draw = random.Random(seed)
    blocks = [
        [draw.choice(list(KINDS)), draw.choice(WIDTHS), draw.randrange(60), draw.randrange(60)]
        for _ in range(draw.randrange(2, 7))
    ]
    return {
        "blocks": json.dumps(blocks),
        "heads": draw.randrange(4),
        "side": draw.choice(SIDES),
    }


def images(options: dict[str, Any], count: int = 16) -> Tensor:
    """Return images for a network: smooth as photos are, of several colours and contrasts."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    contrast = 0.3 + 1.5 * torch.rand(count, 1, 1, 1, generator=generator)
    colour = torch.randn(count, 3, 1, 1, generator=generator)
    return F.interpolate(coarse, (options["side"],) * 2, mode="bicubic") * contrast + colour


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return every output of a network."""
    with torch.no_grad():
        return tree_leaves(model(x))


def check(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what was measured of one network; raises where something does not hold."""
    model, x = build(**options), images(options)
    network = trace(model, x[:1])
    draw = np.random.default_rng(0)
    keep = {
        g.name: draw.permutation(g.size)[: draw.integers(1, g.size + 1)] for g in network.groups
    }
    difference = prove(model, make_prune_plan(network, keep), x[:2])
    assert difference < 1e-4, f"a random plan differs from its masked reference: {difference}"
    try:
        plan = compress.plan_pruning(model, x[:1], criterion="l1", keep_macs=0.7)
    except PlanError:  # most of the work is in a layer whose channels are an output
        plan = compress.plan_pruning(model, x[:1], criterion="l1", keep_macs=0.9)
    small = compress.apply_pruning(model, plan)
    saved = compress.save_model(small, folder, plan=plan, reference=REFERENCE, options=options)
    assert saved
    expected = outputs(small, x)
    np.savez(folder / "expected.npz", *(each.numpy() for each in expected))
    path = compress.export_onnx(small, x[:1], folder / "model.onnx")
    with compress.open_session(path) as session:
        for got, want in zip(session.run(x.numpy()), expected, strict=True):
            far = float((torch.from_numpy(got) - want).abs().max() / want.abs().max())
            assert far < LARGEST_DIFFERENCE, f"ONNX differs from torch by {far}"
    found = {"difference": difference, "sqnr_db": {}}
    for target in TARGETS:
        found["sqnr_db"][target] = check_int8(path, folder, target, x, expected)
    check_step(small, x)
    return found


def check_int8(path: Path, folder: Path, target: str, x: Tensor, expected: list[Tensor]) -> float:
    """Return the SQNR of the worst centred output of an int8 graph without findings, dB."""
    out = folder / f"model.{target}.onnx"
    compress.quantize_onnx(path, [x.numpy()], out, target=target)
    findings = compress.lint_onnx(out, target=target)
    assert not findings, f"{target}: {findings[:2]}"
    with compress.open_session(out, optimization="none") as session:
        worst = min(map(centred_sqnr_db, expected, session.run(x.numpy())))
    assert worst > LEAST_SQNR_DB, f"{target}: centred outputs at {worst:.1f} dB"
    return worst


def centred_sqnr_db(want: Tensor, got: np.ndarray) -> float:
    """Return signal over noise once the mean over images is taken out of the signal."""
    signal = (want - want.mean(0)).double()
    noise = (torch.from_numpy(got) - want).double()
    return float(10 * torch.log10(signal.pow(2).sum() / noise.pow(2).sum().clamp(min=1e-30)))


def check_step(model: nn.Module, x: Tensor) -> None:
    """Check that one step of training has finite gradients everywhere and moves the weights."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = {name: value.clone() for name, value in model.named_parameters()}
    sum(each.pow(2).mean() for each in tree_leaves(model(x))).backward()
    optimizer.step()
    after = dict(model.named_parameters())
    for name, value in after.items():  # a bias before a BatchNorm stays where it is
        assert value.grad is not None and torch.isfinite(value).all(), name
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert len(moved) > len(after) / 2, f"only {moved} moved"


RELOAD = """
import sys, numpy, torch, compress
from pathlib import Path
from torch.utils._pytree import tree_leaves
for place in sys.stdin.read().split():
    folder = Path(place)
    x = torch.from_numpy(numpy.load(folder / "images.npy"))
    with torch.no_grad():
        got = tree_leaves(compress.load_model(folder)(x))
    want = numpy.load(folder / "expected.npz")
    assert all(numpy.array_equal(g, want[n]) for g, n in zip(got, want.files, strict=True)), place
    print(place)
"""


def check_reloaded(folders: list[Path]) -> None:
    """Load saved networks in one fresh process; their outputs are the same bits."""
    ended = subprocess.run(
        [sys.executable, "-c", RELOAD],
        input="\n".join(map(str, folders)),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # for what the tests share
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.split() == [str(folder) for folder in folders]


def checked(seeds: range, folder: Path) -> dict[int, dict[str, Any]]:
    """Check many networks, and that all come back in a fresh process.

    Raises:
        AssertionError: one fails; the message has its seed and the smallest list that fails alike.
    """
    found = {}
    for seed in seeds:
        options, place = drawn(seed), folder / str(seed)
        place.mkdir(parents=True)
        np.save(place / "images.npy", images(options).numpy())
        try:
            found[seed] = check(options, place)
        except Exception as error:
            least = shrunk(options, type(error), folder / "shrunk")
            raise AssertionError(f"network {seed}, {options} (or {least}): {error}") from error
    check_reloaded([folder / str(seed) for seed in seeds])
    return found


def shrunk(options: dict[str, Any], kind: type[Exception], folder: Path) -> dict[str, Any]:
    """Return the network with as few blocks as fail with an error of that kind."""
    folder.mkdir(exist_ok=True)
    blocks = json.loads(options["blocks"])
    for number in reversed(range(len(blocks))):
        fewer = options | {"blocks": json.dumps(blocks[:number] + blocks[number + 1 :])}
        try:
            check(fewer, folder)
        except kind:
            blocks.pop(number)
        except Exception:  # noqa: BLE001 - it fails in another way: this block belongs to the first
            continue
    return options | {"blocks": json.dumps(blocks)}
