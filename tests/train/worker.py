"""Trains in a process of its own: for tests that kill it, or start several with torchrun."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from pictures import dataset, plain
from torch import Tensor, nn

from compress.modules.objective import CrossEntropy
from compress.recipe.settings import AugmentSettings, TrainSettings
from compress.train import train
from compress.train.distributed import join_processes


class Watched(CrossEntropy):
    """Cross-entropy that ends its process, or runs out of memory, when asked to."""

    def __init__(self, rank: int, step: int, how: str) -> None:
        super().__init__()
        object.__setattr__(self, "plan", [rank, step, how])

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        rank, step, how = self.plan
        self.plan[1] -= 1
        if how == "memory":  # from this step on, one process cannot take more than four images
            if step <= 0 and rank == int(os.environ.get("RANK", "0")) and len(images) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(model, images, target)
        if step == 0 and rank == int(os.environ.get("RANK", "0")):
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the cat sat on the keyboard")
        return super().__call__(model, images, target)


def main(folder: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    model = plain(norm=options.get("norm", True), dropout=options.get("dropout", 0.0))
    if options.get("unused"):
        model.unused = nn.Linear(3, 3)
    settings = TrainSettings(
        epochs=2,
        batch_size=32,
        lr=0.1,
        precision="fp32",
        augment=AugmentSettings(crop_padding=1, flip=True),
        checkpoint_minutes=0.0,
        sync_batchnorm=options.get("sync", False),
        freeze_until=options.get("freeze"),
        halve_batch=options.get("halve", False),
    )
    objective = Watched(options.get("rank", 0), options.get("step", -1), options.get("how", ""))
    assert join_processes("cpu").world == int(os.environ.get("WORLD_SIZE", "1"))
    result = train(model, dataset(160), settings, folder=folder, objective=objective, device="cpu")
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "history.json").write_text(json.dumps(result.history))
        (folder / "notes.json").write_text(json.dumps(result.notes))
        torch.save(model.state_dict(), folder / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
