"""Attribution maps against closed formulas, and what explaining must leave as it was."""

from __future__ import annotations

import base64
import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import nn

from compress.errors import DataError, MissingPackageError, ModelError, UnknownNameError, UsageError
from compress.evaluate import attribution as module
from compress.evaluate.attribution import (
    METHODS,
    Samples,
    compare_maps,
    explain,
    overlay,
    similarities,
)

pytest.importorskip("captum", reason="no captum: pip install 'compress-cnn[explain]'")

CLASSES = np.array([0, 2, 1])


class Pooled(nn.Module):
    """Convolution, in-place ReLU, mean over places, linear layer: Grad-CAM in closed form."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(6, 4)

    def forward(self, images):
        return self.linear(self.drop(self.relu(self.conv(images)).mean((2, 3))))


class Wrapped(Pooled):
    """The same function; it writes into its input and returns its logits in a dictionary."""

    def forward(self, images):
        images *= 2
        return {"loss": None, "logits": super().forward(images / 2)}


class Flat(nn.Module):
    """A linear function of the pixels: every other method's closed case."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3 * 14 * 14, 4)

    def forward(self, images):
        return self.linear(images.flatten(1))


@pytest.fixture
def images():
    return torch.randn(3, 3, 14, 14, generator=torch.Generator().manual_seed(1))


def samples(images: torch.Tensor, labels=(0, 1, 2)) -> Samples:
    pictures = (images.permute(0, 2, 3, 1).numpy() * 40 + 128).clip(0, 255).astype(np.uint8)
    return Samples(images, pictures, np.array(labels), [5, 6, 7])


def by_square(values: np.ndarray) -> np.ndarray:
    """The sum of each of the 7 x 7 squares of 2 x 2 pixels, at each of its pixels."""
    sums = values.reshape(len(values), 7, 2, 7, 2).sum((2, 4))
    return sums.repeat(2, 1).repeat(2, 2)


def contributions(model: Flat, images: torch.Tensor) -> np.ndarray:
    """Weight times pixel, summed over colours, (N, H, W): exact for a linear function."""
    weights = model.linear.weight[torch.from_numpy(CLASSES)].reshape(-1, 3, 14, 14)
    return (weights * images).sum(1).detach().numpy()


def test_grad_cam_equals_the_class_activation_map(images):
    model = Pooled().eval()
    found = explain(model, images, CLASSES, method="grad-cam")
    features = torch.relu(model.conv(images))
    weights = model.linear.weight[torch.from_numpy(CLASSES)] / 14**2
    cam = torch.relu(torch.einsum("nk,nkhw->nhw", weights, features))
    np.testing.assert_allclose(found, cam.detach().numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_network_returns_its_logits_in_changes_no_map(images, method):
    before = images.clone()
    found, expected = (
        explain(network.eval(), images, CLASSES, method=method, perturbations=40)
        for network in (Wrapped(), Pooled())
    )
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(images, before)


def test_grad_cam_of_a_named_layer(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(144, 4))
    found = explain(model, images, CLASSES, method="grad-cam", layer="0")
    assert found.shape == (3, 14, 14)
    assert found.min() >= 0


def test_integrated_gradients_of_a_linear_function_are_its_terms(images):
    model = Flat()
    found = explain(model, images, CLASSES, method="integrated-gradients")
    np.testing.assert_allclose(found, contributions(model, images), rtol=1e-3, atol=1e-5)


def test_integrated_gradients_sum_to_the_change_of_the_logit(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(576, 4))
    found = explain(model, images, CLASSES, method="integrated-gradients")
    change = (model(images) - model(torch.zeros_like(images))).detach().numpy()
    wanted = np.take_along_axis(change, CLASSES[:, None], 1)[:, 0]
    np.testing.assert_allclose(found.sum((1, 2)), wanted, rtol=1e-3, atol=1e-4)


def test_kernel_shap_of_a_linear_function_are_its_terms(images):
    model = Flat()
    found = explain(model, images, CLASSES, method="kernel-shap")
    wanted = by_square(contributions(model, images))
    np.testing.assert_allclose(found, wanted, atol=0.02)


def test_lime_of_a_linear_function_follows_its_terms(images):
    model = Flat()
    found = explain(model, images, CLASSES, method="lime")
    wanted = by_square(contributions(model, images))
    assert similarities(found, wanted).min() > 0.95


@pytest.mark.parametrize("method", ["lime", "kernel-shap"])
def test_a_session_is_explained_like_the_network_it_was_made_from(images, method):
    class Session:
        """A session of one fixed batch size."""

        inputs = (type("Spec", (), {"shape": (4, 3, 14, 14)}),)

        def run(self, array):
            assert array.shape[0] == 4
            with torch.no_grad():
                return [model(torch.from_numpy(array)).numpy()]

    model = Flat()
    both = [explain(run, images, CLASSES, method=method) for run in (model, Session())]
    np.testing.assert_allclose(*both, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_network_and_the_random_state_are_left_as_they_were(images, method):
    model = Pooled().train()
    model.relu.eval()
    model.conv.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = explain(model, images, CLASSES, method=method)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert flags == [False, True, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert hooks == [0] * 5
    assert not images.requires_grad
    np.testing.assert_array_equal(first, explain(model, images, CLASSES, method=method))


def test_a_failing_network_is_left_as_it_was(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 5)).train()
    with pytest.raises(RuntimeError):
        explain(model, images, CLASSES)
    assert model[0].training
    assert model[0].weight.requires_grad
    assert not model[0]._forward_hooks


def test_similarity_is_spearmans_rank_correlation():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 5, 8, 8)).astype(np.float32)
    other[:2] = np.exp(one[:2])  # another scale, the same order
    other[2] = -one[2]
    one[3].round(0, out=one[3])  # ties
    wanted = [spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(similarities(one, other), wanted, atol=1e-12)
    assert similarities(one, other)[:3] == pytest.approx([1, 1, -1])


def test_flat_maps_are_alike_and_unlike_all_others():
    flat, slope = np.ones((1, 2, 2)), np.arange(4.0).reshape(1, 2, 2)
    assert similarities(flat, 2 * flat) == [1.0]
    assert similarities(flat, slope) == [0.0]


def test_a_network_looks_where_its_copy_looks(images):
    model = Pooled()
    maps, similarity = compare_maps(model, model, samples(images), variant="copy")
    assert similarity.mean == pytest.approx(1.0)
    assert similarity.images == 3
    assert [part.similarity for part in maps] == pytest.approx([1.0] * 3)
    assert maps[0].before_map == maps[0].after_map


def test_flipped_images_come_first(images):
    model = Pooled().eval()
    with torch.no_grad():
        answers = model(images).argmax(1).numpy()
        second = model(images)[1].topk(2).indices[1].item()

    def flipping(batch):
        """Answers like the model, but for the second image's place in the batch."""
        logits = model(batch)
        if torch.equal(batch, images):
            logits[1, second] = 100.0
        return logits

    chosen = samples(images, labels=answers)
    maps, _ = compare_maps(model, flipping, chosen, variant="x", method="lime", shown=2)
    assert [part.index for part in maps] == [6, 5]
    assert (maps[0].before, maps[0].after) == (answers[1], second)


def test_overlay_is_orange_where_the_map_speaks_for_the_class_and_blue_against_it():
    picture = np.full((4, 4, 3), 128, np.uint8)
    weights = np.zeros((4, 4), np.float32)
    weights[0, 0], weights[3, 3] = 1.0, -1.0
    uri = overlay(picture, weights, side=4)
    raw = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    pixels = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).astype(int)
    assert pixels[0, 0, 0] > pixels[0, 0, 2] + 100
    assert pixels[3, 3, 2] > pixels[3, 3, 0] + 100
    assert len(set(pixels[1, 1])) == 1


def test_grey_pictures_have_maps_too(images):
    grey = Samples(images, np.zeros((3, 14, 14, 1), np.uint8), np.array([0, 1, 2]), [0, 1, 2])
    maps, _ = compare_maps(Pooled(), Pooled(), grey, variant="x", shown=1)
    assert len(maps) == 1


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"method": "grad_cam"}, UnknownNameError, "Did you mean 'grad-cam'"),
        ({"layer": "convv"}, UnknownNameError, "no such layer 'convv'. Did you mean 'conv'"),
        ({"layer": "linear"}, ModelError, "linear: has no output"),
    ],
)
def test_settings_that_cannot_be_right_are_explained(images, settings, error, words):
    with pytest.raises(error, match=words):
        explain(Pooled(), images, CLASSES, **settings)


def test_gradients_of_a_function_are_refused(images):
    with pytest.raises(UsageError, match=r"needs the gradients of a torch network.*lime"):
        explain(lambda batch: batch, images, CLASSES, method="integrated-gradients")


def test_a_network_without_places_is_refused(images):
    with pytest.raises(ModelError, match="no layer with an output"):
        explain(Flat(), images, CLASSES)


def test_samples_that_do_not_fit_are_refused(images):
    with pytest.raises(DataError, match="do not fit together"):
        Samples(images, np.zeros((2, 14, 14, 3), np.uint8), CLASSES, [0, 1, 2])


def test_without_captum_the_extra_is_named(images, monkeypatch):
    monkeypatch.setattr("compress.packages.is_installed", lambda name: name != "captum")
    with pytest.raises(MissingPackageError, match=r"compress-cnn\[explain\]"):
        explain(Pooled(), images, CLASSES)


def test_importing_it_does_not_import_captum():
    assert module.__name__ in sys.modules
    code = "import sys, compress.evaluate.attribution; sys.exit('captum' in sys.modules)"
    import subprocess

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_grad_cam_of_a_residual_network_looks_at_its_last_sum():
    from compress.models.cifar import resnet8

    model, seen = resnet8(in_channels=3, width=8, num_classes=4).eval(), torch.randn(3, 3, 32, 32)
    found = explain(model, seen, CLASSES, method="grad-cam")
    last = explain(model, seen, CLASSES, method="grad-cam", layer="layer3")
    before_the_sum = explain(model, seen, CLASSES, method="grad-cam", layer="layer3.0.bn2")
    np.testing.assert_array_equal(found, last)
    assert np.abs(found - before_the_sum).max() > 1e-3
