"""What each command does: options to a recipe or to one call, and its answer ready to print."""

from compress.cli.artifacts import (
    bench,
    build,
    bundle,
    compare,
    export,
    lint,
    predict,
    report,
    split,
    verify,
)
from compress.cli.init import init
from compress.cli.inspect import SHOWN, doctor, list_plugins, names_of, schema, show
from compress.cli.sensitivity import sensitivity
from compress.cli.stages import (
    check,
    distill,
    dry_run,
    prune,
    quantize,
    run,
    sparsify,
    summary,
    train,
)

__all__ = [
    "SHOWN",
    "bench",
    "build",
    "bundle",
    "check",
    "compare",
    "distill",
    "doctor",
    "dry_run",
    "export",
    "init",
    "lint",
    "list_plugins",
    "names_of",
    "predict",
    "prune",
    "quantize",
    "report",
    "run",
    "schema",
    "sensitivity",
    "show",
    "sparsify",
    "split",
    "summary",
    "train",
    "verify",
]
