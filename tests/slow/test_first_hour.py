"""A scripted newcomer: a wheel in an empty environment, an empty folder, photos, one network.

The environment borrows this one's packages, so that nothing is downloaded; the package itself is
the wheel's alone.
"""

import json
import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

PHOTOS = (Path(os.environ.get("COMPRESS_DATA", "../shared/data")) / "photos").resolve()
NETWORK = Path("examples/net.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photos at {PHOTOS}"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-q", "-w", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("the build backend cannot be downloaded")
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An environment that holds the wheel, and sees the packages of this one."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False)
    site = next(root.glob("lib/python*/site-packages"))
    site.joinpath("borrowed.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("site-packages"))
    )
    import zipfile

    zipfile.ZipFile(wheel).extractall(site)
    return root / "bin" / "python"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An empty folder with the user's network and a way to the photos."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "net.py").write_text(NETWORK.read_text())
    (folder / "photos").symlink_to(PHOTOS)
    return folder


def call(python, home, *arguments, code=0):
    done = subprocess.run(
        [str(python), "-m", "compress", *map(str, arguments)],
        cwd=home,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_is_what_runs(python, home):
    out = subprocess.run(
        [str(python), "-c", "import compress; print(compress.__file__)"],
        cwd=home, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert out.startswith(str(Path(python).parent.parent))
    assert "quickstart" in call(python, home, "list", "recipes")


def test_from_an_empty_folder_to_the_same_answers_on_a_device(python, home):
    """init, check, run, predict, unpack the bundle, predict there: the answers are the same."""
    said = call(python, home, "init", "--image-size", "32", "--yes")
    assert "network net.py:Net" in said
    assert "can be run" in said
    assert call(python, home, "check", "compress.yaml") == "compress.yaml: can be run\n"
    quick = ["stages.0.train.epochs=6", "stages.2.distill.epochs=3", "gates={}"]
    options = [part for each in quick for part in ("--set", each)]
    out = call(python, home, "run", "compress.yaml", "--out", "run", *options)
    assert "int8-onnxruntime" in out
    assert call(python, home, "verify", "run").rstrip().endswith("0 problems")
    call(python, home, "bundle", "run", "--out", "device.tar.gz")
    with tarfile.open(home / "device.tar.gz") as packed:
        packed.extractall(home / "device", filter="data")
    script = next((home / "device").rglob("run.py"))
    done = subprocess.run(
        [str(python), "run.py"], cwd=script.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DIFFERS" not in done.stdout
    photos = [str(path) for path in sorted((home / "photos" / "validation").rglob("*.jpg"))[::15]]
    out = call(python, home, "predict", "run", *photos, "--out", "drawn", "--json", "here.json")
    assert "ants" in out
    assert len(list((home / "drawn").glob("*.png"))) == len(photos)
    done = subprocess.run(
        [str(python), str(script.with_name("predict.py")), *photos, "--json", "there.json",
         "--runtime", "onnxruntime"],
        cwd=home, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    here, there = (json.loads((home / f"{name}.json").read_text()) for name in ("here", "there"))
    assert len(here["images"]) == len(photos) > 5
    for mine, theirs in zip(here["images"], there["images"], strict=True):
        for one, two in zip(mine["answer"], theirs["answer"], strict=True):
            assert one["class"] == two["class"]
            assert one["probability"] == pytest.approx(two["probability"], abs=1e-4)
