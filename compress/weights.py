"""Weight files: read without running code, written as safetensors, fitted to a network."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import artifact
from compress.errors import ModelError

ENDINGS = {".safetensors", ".pt", ".pth", ".th", ".tar"}
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile
STATE_KEYS = ("state_dict", "model", "model_state_dict")


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
        raise ModelError("no such weight file", where=str(path))
    if path.suffix == ".safetensors":
        state = read_safetensors(path)
    else:
        content = _read_pickle(path)
        for key in STATE_KEYS:
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
        if not isinstance(content, Mapping):
            raise ModelError(
                f"holds a {type(content).__name__}", where=str(path), expected="a state_dict"
            )
        state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    for prefix in WRAPPER_PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file.

    Raises:
        ModelError: it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"is not a readable weight file ({error})", where=str(path)) from None


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
            f"these weights do not fit the network: {'; '.join(problems[:3])}{more}", where=where
        )
    model.load_state_dict(state, strict=False)


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, before it refuses anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error))
        raise ModelError(
            f"refused: it is not plain tensors, unpickling it would run code ({asked.strip()})",
            where=str(path),
            fix="Save its state_dict() again, best as .safetensors",
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(f"is not a readable weight file ({error})", where=str(path)) from None


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")  # absent from old checkpoints, and not needed
