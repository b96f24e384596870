"""As many images as ImageNet has: listed, split and ready to train within time and memory."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

MEASURE = """
import resource, sys, time
begun = time.monotonic()
from compress.data import load_data, parse_reference
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.monotonic()
data = load_data(parse_reference(f"imagefolder:{sys.argv[1]}", image_size=224))
listed = time.monotonic() - begun
from compress.recipe.settings import TrainSettings
from compress.train.batches import train_batches
batch = next(iter(train_batches(data, TrainSettings(epochs=1, batch_size=64), 0, 0)))
first = time.monotonic() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(data.splits["train"]), len(data.classes), listed, first, before / 1024, peak / 1024)
"""


def tree(root, classes, images, tests):
    """Make a tree of hard links to a few pictures: of each class so many images and test images."""
    root.mkdir()
    pictures = []
    for number in range(4):
        path = root.parent / f"{root.name}-{number}.jpg"
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
        pictures.append(path)
    for split, each in (("train", images), ("val", tests)):
        for kind in range(classes):
            folder = root / split / f"n{kind:08d}"
            folder.mkdir(parents=True)
            for number in range(each):
                name = folder / f"n{kind:08d}_{number:08d}.JPEG"
                # a file holds at most so many links: ext4 65,000
                source = pictures[number % 4]
                try:
                    os.link(source, name)
                except OSError:
                    source.rename(source.with_suffix(f".{kind}"))
                    source.write_bytes(source.with_suffix(f".{kind}").read_bytes())
                    os.link(source, name)
    return root


def measured(root):
    """Return images, classes, seconds to list and to the first batch, MiB before and at most."""
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(root)], capture_output=True, text=True, check=True
    )
    images, classes, *figures = ended.stdout.split()
    return int(images), int(classes), *map(float, figures)


def check(root, images, classes, tried, *, seconds, mib, when=""):
    found, kinds, listed, first, before, peak = measured(root)
    assert kinds == classes and found > 0.7 * images
    assert first < seconds, f"{first:.0f} s to the first batch"
    assert peak < mib, f"{peak:.0f} MiB"
    tried(
        f"{classes:,} classes and {images:,} images (hard links): listed, split, first batch{when}",
        1,
        f"listed in {listed:.0f} s, first batch after {first:.0f} s, peak {peak:,.0f} MiB "
        f"({before:,.0f} before)",
    )


@pytest.mark.slow
def test_a_large_tree_is_listed_quickly(tmp_path, tried):
    """A sixty-fourth of ImageNet."""
    check(tree(tmp_path / "x", 100, 200, 2), 20_000, 100, tried, seconds=20, mib=1200)


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("COMPRESS_LARGE_TREE"),
    reason="COMPRESS_LARGE_TREE is not set",
)
def test_imagenet_is_listed_within_two_minutes_and_2_gb(tmp_path, tried):
    when = " (with `COMPRESS_LARGE_TREE=1`)"
    try:
        root = tree(tmp_path / "x", 1000, 1230, 50)
        check(root, 1_280_000, 1000, tried, seconds=120, mib=2048, when=when)
    finally:
        shutil.rmtree(tmp_path / "x")
