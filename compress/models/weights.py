"""Weight files: read without running code, written as safetensors, fitted to a network."""

from __future__ import annotations

import argparse
import codecs
import functools
import logging
import pathlib
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress import artifact
from compress.errors import ModelError, absence, boundary, listed, nearest

logger = logging.getLogger(__name__)

ENDINGS = {".safetensors", ".pt", ".pth", ".th", ".tar"}
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile
# Where trainers keep weights: those averaged during training first, as timm and BasicSR take them.
STATE_KEYS = (
    *("state_dict_ema", "model_ema", "params_ema", "ema_state_dict", "ema_model", "ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "params", "net", "network"),
    *("generator", "weights", "module"),
)
_ASKS_FOR_CODE = re.compile(r"GLOBAL|Can only|Trying to").search  # in PyTorch's refusals
UNREADABLE = "is not a readable weight file"
_MADE_BY = "Give a file that torch.save or safetensors wrote"
COUNTERS = {"n_averaged", "num_updates", "step", "initted", "decay"}  # of averages, no weights


def is_weight_file(weights: str | Path) -> bool:
    """Return whether ``weights`` is a file, or is written like one, rather than a name."""
    path = Path(weights)
    return path.is_file() or len(path.parts) > 1 or path.suffix in ENDINGS


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a weight file, without the prefixes of wrappers.

    Args:
        path: .safetensors, or .pt, .pth, .th, .tar holding a state_dict or {"state_dict": ...}.

    Raises:
        ModelError: no such file, not readable, or it needs code to be unpickled.
    """
    if not path.is_file():
        raise ModelError(absence(path), where=str(path), expected="a weight file")
    with boundary(ModelError, UNREADABLE, where=str(path), fix=_MADE_BY):
        if path.suffix == ".safetensors":
            state = read_safetensors(path)
        else:
            artifact.check_zip(path)
            state = _state_in(_read_pickle(path), path)
    for prefix in WRAPPER_PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return {key.replace("_orig_mod.", ""): value for key, value in state.items()}


def aligned(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return ``state`` under the names of ``model``, where they differ by a prefix.

    Trainers keep the network as an attribute of theirs: all its weights are called ``model.NAME``,
    ``module.NAME``, ``net.backbone.NAME``. A prefix under which most of the network's names are
    found is taken off, and what is not under it, as weights of a loss, is named in the log.
    """
    own = [key for key in model.state_dict() if not _is_counter(key)]
    ends = [f".{key}" for key in own[:3] + own[-1:]]
    tried = ["", *(key[: 1 - len(end)] for end in ends for key in state if key.endswith(end))]
    found = {prefix: sum(prefix + key in state for key in own) for prefix in tried}
    best = max(found, key=lambda prefix: found[prefix])
    if found[best] <= len(own) / 2:
        return dict(state)  # ``fit`` says what is missing
    left_out = [key for key in state if not key.startswith(best) and key not in COUNTERS]
    if left_out:
        logger.warning(
            "weights under %r are loaded; the file also holds %s", best, listed(left_out)
        )
    return {key.removeprefix(best): value for key, value in state.items() if key.startswith(best)}


@functools.cache
def _tell_once(line: str) -> None:
    logger.warning(line)  # a network is loaded to be checked, and again by stages


def _state_in(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the state_dict that a checkpoint holds, by the keys that trainers use."""
    if not isinstance(content, Mapping):
        raise ModelError(
            f"holds a {type(content).__name__}", where=str(path), expected="a state_dict"
        )
    content = {str(key): each for key, each in content.items() if isinstance(key, str | int)}
    inside = {key: value for key, value in content.items() if _holds_tensors(value, set())}
    named = [key for key in STATE_KEYS if key in inside]
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if named or (len(inside) == 1 and not tensors):
        chosen = named[0] if named else next(iter(inside))
        if len(named) > 1:
            _tell_once(f"{path} holds {' and '.join(named)}: {chosen} is loaded")
        return _state_in(inside[chosen], path)
    if tensors:
        return tensors
    raise ModelError(
        f"holds the keys {listed(content) or 'none'}, none of which is a state_dict",
        where=str(path),
        expected=f"tensors by name, or those under one of {', '.join(STATE_KEYS)}",
    )


def _holds_tensors(value: Any, seen: set[int], depth: int = 3) -> bool:
    """Return whether there is a tensor some levels down; a dict that is met twice is read once."""
    if not isinstance(value, Mapping) or id(value) in seen:
        return False
    seen.add(id(value))
    return any(
        isinstance(each, Tensor) or (depth > 0 and _holds_tensors(each, seen, depth - 1))
        for each in value.values()
    )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file.

    Raises:
        ModelError: it is missing or damaged.
    """
    from safetensors.torch import load_file

    with boundary(ModelError, UNREADABLE, where=str(path), fix=_MADE_BY):
        path.open("rb").close()  # safetensors calls a file that may not be read absent
        return load_file(path)


def write_safetensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write ``state`` to ``path`` in one step."""
    from safetensors.torch import save

    unique = {key: value.clone() for key, value in state.items()}  # shared tensors are refused
    artifact.write_bytes(path, save(unique))


def fit(model: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Load ``state`` into ``model``.

    Raises:
        ModelError: a key is missing, unexpected or of another shape; the first few are named.
    """
    own = model.state_dict()
    problems = [
        *(f"{key} is missing" for key in own if key not in state and not _is_counter(key)),
        *(f"{key} is not in the network" for key in state if key not in own),
        *(
            f"{key} has shape {tuple(state[key].shape)}, the network {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(
            f"these weights do not fit the network: {'; '.join(problems[:3])}{more}",
            where=where,
            fix=_nearest(state, own),
        )
    whole = OrderedDict(state)
    # the versions of its modules, which files of tensors leave out and some networks ask for
    whole._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(whole, strict=False)


def of_other_classes(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of ``own`` that differ from those of ``state`` in their outputs alone.

    They are the heads of a network that was built for other classes, whatever its layers are.
    """
    pairs = {name: (value, state[name]) for name, value in own.items() if name in state}
    return {
        name: mine
        for name, (mine, theirs) in pairs.items()
        if mine.ndim and mine.shape[1:] == theirs.shape[1:] and mine.shape != theirs.shape
    }


def _nearest(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return which names a file has, and which of them is most like the network's first."""
    missing = next((key for key in own if key not in state and not _is_counter(key)), None)
    if missing is None or not state:
        return ""
    shape = own[missing].shape
    alike = [key for key in state if key not in own and state[key].shape == shape]
    close = nearest(missing, alike, 1) or alike[:1] or nearest(missing, state, 1)
    text = f"The file has {listed(key for key in state if key not in own) or 'no other keys'}"
    return f"{text}; nearest to {missing} is {close[0]}" if close else text


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, before it refuses anyway
            with torch.serialization.safe_globals(_plain_types()):
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        told = [line.strip() for line in str(error).splitlines() if line.strip()]
        code = next(filter(_ASKS_FOR_CODE, told), None)
        after = [i + 1 for i, line in enumerate(told) if line.endswith("Unpickler error:")]
        asked = code or (told[after[0]] if after and after[0] < len(told) else "damaged")
        runs_code = ", unpickling it would run code" if code else ""
        raise ModelError(
            f"refused: it is not plain tensors{runs_code} ({asked})",
            where=str(path),
            fix="Save its state_dict() again, best as .safetensors",
        ) from None


def _plain_types() -> list[Any]:
    """Return what checkpoints keep beside weights: NumPy's numbers, parsed arguments, paths.

    None of these runs code of the file when it is built.
    """
    made_by: list[Any] = [np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]]
    return [
        *((made, f"numpy.{place}.{made.__name__}")
          for place in ("core.multiarray", "_core.multiarray") for made in made_by),
        *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
        *(np.dtype, np.ndarray, codecs.encode, argparse.Namespace, pathlib.PosixPath),
    ]  # fmt: skip


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")  # absent from old checkpoints, and not needed
