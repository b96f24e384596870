"""Attribution maps of the original and a compressed network, compared.

Grad-CAM and integrated gradients need a torch network; LIME and KernelSHAP need answers only, so
they explain ONNX files and engines of any runtime as well.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from compress.errors import DataError, ModelError, UnknownNameError, UsageError
from compress.evaluate import device_of, predict
from compress.modules import evaluating
from compress.modules.outputs import heads_of
from compress.packages import require
from compress.report.pictures import from_pixels, png
from compress.report.schema import Attribution, Interval, Similarity

Maps = NDArray[np.float32]  # (N, H, W), larger = speaks more for the class
GRADIENTS = ("grad-cam", "integrated-gradients")  # these need a torch network
ANSWERS = ("lime", "kernel-shap")  # these need answers only
METHODS = (*GRADIENTS, *ANSWERS)

SQUARES = 7  # along each side, into which LIME and KernelSHAP cut an image
IMAGES_AT_ONCE = 64  # perturbed images in a batch
STEPS = 32  # of the integral of integrated gradients
SIDE = 112  # pixels of the longer side of a picture in the report
HOT, COLD = (255, 96, 0), (0, 96, 255)  # colours of what speaks for the class, and against it


@dataclass(frozen=True)
class Samples:
    """Images to explain, as the network takes them and as people see them."""

    images: Tensor  # float32 (N, C, H, W), normalized
    pictures: NDArray[np.uint8]  # (N, H, W, C)
    labels: NDArray[np.int64]  # (N,)
    indices: Sequence[int]  # in the test split

    def __post_init__(self) -> None:
        counts = {len(self.images), len(self.pictures), len(self.labels), len(self.indices)}
        if counts != {len(self.images)} or not len(self.images):
            raise DataError(
                "images, pictures, labels and indices do not fit together",
                expected="as many of each, and at least one",
            )


def explain(
    run: Any,
    images: Tensor,
    classes: NDArray[np.int64],
    *,
    method: str = "grad-cam",
    layer: str | None = None,
    perturbations: int = 300,
    seed: int = 0,
) -> Maps:
    """Return for each image how much each place speaks for its class.

    Args:
        run: A torch network for every method; a session of a runtime or a function of a batch for
            LIME and KernelSHAP. Left as it was: modes, gradients, hooks, random state.
        images: float32 (N, C, H, W), normalized.
        classes: The class to explain, for each image, (N,).
        method: "grad-cam", "integrated-gradients", "lime" or "kernel-shap".
        layer: Name of the module whose output Grad-CAM weighs; the last one in the forward pass
            with an output (N, C, H, W) that has more than one place if absent.
        perturbations: Images with some squares greyed out that LIME and KernelSHAP ask about.
        seed: Of those images.

    Returns:
        Maps (N, H, W), in the size of the images. Grad-CAM is >= 0; in the others negative values
        speak against the class. The unit is that of the logit, but for Grad-CAM's.

    Raises:
        UnknownNameError: there is no such method.
        UsageError: a method that needs gradients is asked of something that has none.
        ModelError: the layer is not there, or has no output with places.
        MissingPackageError: captum is not installed.

    Source: Grad-CAM: Selvaraju et al., ICCV 2017, https://arxiv.org/abs/1610.02391, eq. 1 and 2.
    Integrated gradients: Sundararajan et al., ICML 2017, https://arxiv.org/abs/1703.01365, eq. 1,
    from a grey image (zero after normalization). LIME: Ribeiro et al., KDD 2016,
    https://arxiv.org/abs/1602.04938. KernelSHAP: Lundberg and Lee, NeurIPS 2017,
    https://arxiv.org/abs/1705.07874, section 4.1. All by captum.
    """
    if method not in METHODS:
        raise UnknownNameError("attribution method", method, METHODS)
    require("captum", extra="explain", purpose=f"attribution method {method!r}")
    if method in ANSWERS:
        return _by_answers(run, images, classes, method, perturbations, seed)
    if not isinstance(run, nn.Module):
        raise UsageError(
            f"{method} needs the gradients of a torch network, and {type(run).__name__} has none",
            expected=f"one of {', '.join(ANSWERS)} for sessions and functions",
        )
    with _as_found(run) as model:
        device = device_of(model)
        inputs = images.detach().to(device).clone().requires_grad_()
        targets = torch.as_tensor(classes, device=device)
        if method == "grad-cam":
            return _grad_cam(model, inputs, targets, layer)
        return _integrated_gradients(model, inputs, targets)


def _grad_cam(model: nn.Module, inputs: Tensor, targets: Tensor, layer: str | None) -> Maps:
    from captum.attr import LayerAttribution, LayerGradCam

    chosen = _last_layer_with_places(model, inputs) if layer is None else layer
    modules = dict(model.named_modules())
    if chosen not in modules:
        raise UnknownNameError("layer", chosen, modules)
    maps = LayerGradCam(_logits_of(model), modules[chosen]).attribute(
        inputs, targets, relu_attributions=True, attr_dim_summation=True
    )
    if maps.ndim != 4:
        raise ModelError("has no output (N, C, H, W) to weigh", where=chosen)
    full = LayerAttribution.interpolate(maps, tuple(inputs.shape[2:]), "bilinear")
    return _as_maps(full)


def _logits_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function from a batch, which it leaves as it was, to the network's main output."""
    return lambda batch: heads_of(model(batch.clone()))[0]


def _last_layer_with_places(model: nn.Module, inputs: Tensor) -> str:
    """Return the module that ends last among those whose output has many places.

    In a residual network that is the last stage, its sum and activation included: what pooling and
    classifier see, as the authors of Grad-CAM chose it.
    """
    found: list[str] = []

    def note(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1:
            found.append(name)

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if name:
                hook = functools.partial(note, name)
                hooks.enter_context(module.register_forward_hook(hook))
        model(inputs[:1].clone())
    if not found:
        raise ModelError("has no layer with an output (N, C, H, W) of more than one place")
    return found[-1]


def _integrated_gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> Maps:
    from captum.attr import IntegratedGradients

    integral = IntegratedGradients(_logits_of(model))
    batch = max(len(inputs), IMAGES_AT_ONCE)
    found = integral.attribute(
        inputs, torch.zeros_like(inputs), targets, n_steps=STEPS, internal_batch_size=batch
    )
    return _as_maps(found)


def _as_maps(attribution: Tensor) -> Maps:
    maps: Maps = attribution.detach().sum(1).float().cpu().numpy()
    return maps


def _by_answers(
    run: Any, images: Tensor, classes: NDArray[np.int64], method: str, perturbations: int, seed: int
) -> Maps:
    from captum._utils.models.linear_model import SkLearnRidge  # the authors' mild penalty
    from captum.attr import KernelShap, Lime

    height, width = images.shape[2:]
    rows = torch.arange(height) * min(SQUARES, height) // height
    columns = torch.arange(width) * min(SQUARES, width) // width
    squares = rows[:, None] * min(SQUARES, width) + columns  # the one each pixel lies in, (H, W)

    def forward(batch: Tensor) -> Tensor:
        labels = torch.zeros(len(batch), dtype=torch.int64)
        return torch.from_numpy(predict(run, [(batch, labels)]).logits)

    explainer = (
        KernelShap(forward) if method == "kernel-shap" else Lime(forward, SkLearnRidge(alpha=1.0))
    )
    maps = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for image, target in zip(images, classes, strict=True):
            found = explainer.attribute(
                image[None].cpu(),
                baselines=0.0,
                target=int(target),
                feature_mask=squares[None, None],
                n_samples=perturbations,
                perturbations_per_eval=IMAGES_AT_ONCE,
            )
            maps.append(found[0, 0].detach().float().numpy())
    return np.stack(maps).astype(np.float32)


@contextlib.contextmanager
def _as_found(model: nn.Module) -> Iterator[nn.Module]:
    """Yield ``model`` in eval mode with frozen parameters; leave modes and flags as they were."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with evaluating(model):
            yield model.requires_grad_(False)
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def similarities(one: Maps, other: Maps) -> NDArray[np.float64]:
    """Return the Spearman rank correlation of each pair of maps, (N,), from -1 to 1.

    Ranks, because only the order of the places tells where a network looks: the scale of a map
    follows the scale of the logits, which compression changes. Two flat maps are alike (1); a flat
    map has nothing to do with one that is not (0).
    """
    from scipy.stats import spearmanr

    found = []
    for pair in zip(one, other, strict=True):
        flat = [np.ptp(each) == 0 for each in pair]
        found.append(float(all(flat)) if any(flat) else spearmanr(*pair, axis=None).statistic)
    return np.array(found)


def compare_maps(
    original: Any,
    compressed: Any,
    samples: Samples,
    *,
    variant: str,
    method: str = "grad-cam",
    shown: int = 6,
) -> tuple[tuple[Attribution, ...], Similarity]:
    """Return map pairs of a few images, flipped ones first, and the similarity over all samples.

    Both networks are asked about the same class, the original's answer: whether they look at the
    same places for the same reason. See ``explain`` for what each method takes; ``variant`` names
    the compressed network in the report, and at most ``shown`` pairs are returned.
    """
    batches = [(samples.images, torch.from_numpy(samples.labels))]
    before, after = (predict(run, batches).answers for run in (original, compressed))
    maps = [explain(run, samples.images, before, method=method) for run in (original, compressed)]
    alike = similarities(*maps)
    flipped = (before == samples.labels) & (after != samples.labels)
    order = np.argsort(~flipped, kind="stable")[:shown]
    attributions = tuple(
        Attribution(
            index=int(samples.indices[at]),
            method=method,
            label=int(samples.labels[at]),
            before=int(before[at]),
            after=int(after[at]),
            variant=variant,
            similarity=round(float(alike[at]), 6),
            image=png(_resized(from_pixels(samples.pictures[at]), SIDE)),
            before_map=overlay(samples.pictures[at], maps[0][at]),
            after_map=overlay(samples.pictures[at], maps[1][at]),
        )
        for at in order
    )
    return attributions, Similarity(
        method=method,
        variant=variant,
        mean=float(alike.mean()),
        ci95=_interval_of_mean(alike),
        images=len(alike),
    )


def _interval_of_mean(values: NDArray[np.float64]) -> Interval | None:
    """Return Student's 95 % interval of the mean; None for fewer than two values."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    mean = float(values.mean())
    return max(-1.0, mean - half), min(1.0, mean + half)


def overlay(picture: NDArray[np.uint8], weights: NDArray[np.float32], side: int = SIDE) -> str:
    """Return a picture, uint8 (H, W, C), in grey with its map (H, W) in colour, as PNG data URI.

    Orange speaks for the class and blue against it; the strongest place of a map is the most
    coloured, so colours of two pictures do not compare in strength. The longer side has ``side``
    pixels.
    """
    top = float(np.abs(weights).max()) or 1.0
    share = np.abs(weights) / top
    colour = np.where((weights >= 0)[..., None], np.array(HOT), np.array(COLD))
    grey = np.asarray(from_pixels(picture).convert("L"), dtype=np.float64)[..., None]
    opacity = 0.75 * share[..., None]
    mixed = np.round((0.35 * 255 + 0.65 * grey) * (1 - opacity) + colour * opacity)
    return png(_resized(Image.fromarray(mixed.clip(0, 255).astype(np.uint8)), side))


def _resized(image: Image.Image, side: int) -> Image.Image:
    """Return ``image`` with a longer side of ``side`` pixels; small ones grow in blocks."""
    factor = side / max(image.size)
    size = round(image.width * factor), round(image.height * factor)
    way = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return image.resize(size, way)
