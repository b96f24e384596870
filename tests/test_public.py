"""The public names: sorted, complete, and cheap to import."""

import ast
import subprocess
import sys
from pathlib import Path

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


def test_functions_fit_on_a_screen_and_take_few_arguments():
    """A body of at most 45 lines; more than seven arguments only where they are published."""
    root = Path(compress.__file__).parent
    published = {*compress.__all__, "plan_sparsity", "split_onnx", "train"}
    published.add("_synced_batch_norm")  # has the arguments of torch's
    long, wide = [], []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            where = f"{path.relative_to(root)}:{node.name}"
            code = node.body[ast.get_docstring(node) is not None :] or node.body
            lines = (node.end_lineno or 0) - code[0].lineno + 1
            count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
            is_method = bool(node.args.args) and node.args.args[0].arg in {"self", "cls"}
            if lines > 45:
                long.append(f"{where}: {lines} lines")
            if count - is_method > 7 and path.parent.name != "cli" and node.name not in published:
                wide.append(f"{where}: {count} arguments")
    assert not long
    assert not wide


def test_a_name_is_defined_once():
    """A plug-in is named after its file, and a command after what it calls."""
    root = Path(compress.__file__).parent
    plugins = {"criteria", "losses", "observers", "runtimes", "data", "tasks"}
    homes: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        free = {"main", path.stem.title().replace("_", "") if path.parent.name in plugins else ""}
        for node in ast.parse(path.read_text()).body:
            is_function = isinstance(node, ast.FunctionDef) and path.parent.name != "cli"
            is_public = is_function and not node.name.startswith("_")
            if (isinstance(node, ast.ClassDef) or is_public) and node.name not in free:
                homes.setdefault(node.name, []).append(str(path.relative_to(root)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
