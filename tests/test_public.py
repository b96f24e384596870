"""The public names: sorted, complete, and cheap to import."""

import subprocess
import sys

import compress

HEAVY = ("onnxruntime", "openvino", "nncf", "tensorrt", "tensorrt_rtx", "torchvision", "torch")


def test_public_names_are_sorted_and_all_there():
    assert compress.__all__ == sorted(compress.__all__)
    assert sorted(compress._HOMES) == compress.__all__
    for name in compress.__all__:
        assert getattr(compress, name) is not None


def test_a_wrong_name_is_an_attribute_error():
    assert not hasattr(compress, "no_such_name")


def test_importing_compress_imports_nothing_heavy():
    code = f"import sys, compress; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_pipeline_does_not_import_runtimes_it_does_not_use():
    light = tuple(name for name in HEAVY if name not in {"torch", "onnxruntime"})
    code = f"import sys, compress.pipeline; print([m for m in {light!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
