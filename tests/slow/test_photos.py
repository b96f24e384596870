"""recipes/photos.yaml on real photos: what a user with a small folder of pictures gets."""

import json
import os
from pathlib import Path

import pytest

import compress
from compress.models import load_model

PHOTOS = Path(os.environ.get("COMPRESS_DATA", "../shared/data")) / "photos"


def test_most_of_the_tutorial_network_is_its_dense_layer():
    model = load_model("compress.models.cifar:tutorial_cnn")
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    assert sizes["classifier.1.weight"] == 128 * 7 * 7 * 512
    assert sizes["classifier.1.weight"] / sum(sizes.values()) > 0.9


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photos at {PHOTOS}")
def test_the_recipe_of_photos_is_carried_out(tmp_path):
    quick = [f"stages.{n}.{verb}.epochs=2" for n, verb in ((0, "train"), (2, "distill"))]
    rounds = ["measure.rounds=3", "measure.round_ms=5"]
    compress.run(
        "recipes/photos.yaml", tmp_path, overrides=[f"data.root={PHOTOS}", *quick, *rounds]
    )
    variants = json.loads((tmp_path / "report.json").read_text())["variants"]
    names = ["original", "pruned", "distilled", "int8-onnxruntime", "int8-openvino"]
    assert [each["name"] for each in variants][:5] == names
    assert variants[1]["params"] <= 0.15 * variants[0]["params"]
    assert variants[0]["size_mib"] / variants[3]["size_mib"] > 15
