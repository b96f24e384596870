"""Restoration, a generator, embeddings and several labels on real images, as the recipes say."""

import json
import os
from pathlib import Path

import pytest

import compress

DATA = Path(os.environ.get("COMPRESS_DATA", "../shared/data"))
RECIPES = {  # recipe -> its data, and what the original must reach at least
    "photos-super-resolution": ("photos", "psnr", 25.0),
    "fashion-generator": ("FashionMNIST", "psnr", 17.0),
    "fashion-embedding": ("FashionMNIST", "recall_at_k", 70.0),
    "bccd-multilabel": ("bccd", "map", 75.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_is_carried_out(name, tmp_path):
    folder, metric, least = RECIPES[name]
    if not (DATA / folder).is_dir():
        pytest.skip(f"no {folder} at {DATA}: set COMPRESS_DATA")
    compress.run(f"recipes/{name}.yaml", tmp_path, overrides=[f"data.root={DATA / folder}"])
    report = json.loads((tmp_path / "report.json").read_text())
    original, *others = report["variants"]
    value = original["results"][0]["metrics"][metric]["value"]
    assert value > least
    assert others[0]["macs"] < 0.51 * original["macs"]
    assert all(gate["passed"] for gate in report["gates"])
    assert bool(report["gates"]) == (report.get("untrained") is None)
