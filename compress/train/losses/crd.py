"""Contrastive representation distillation (Tian et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn import functional as F

from compress.train.losses import Layers, Needs, OfClasses, Taps, full_precision, vectors


@dataclass(eq=False, repr=False)
class Crd(nn.Module):
    """Tell the teacher's feature of the same image from those of other classes' (contrastive).

    Both networks' features are mapped to vectors of length 1; memories hold the latest of every
    training image, and negatives are drawn from them.

    Args:
        size: Length of the mapped vectors.
        negatives: Images of other classes that each image is contrasted with.
        temperature: Similarities are divided by it.
        momentum: Share of the old vector when the memory of an image is renewed.
        layers: "auto" (what the classifiers are fed with), names of layers that both networks
            have, or {student: teacher}; exactly one pair.

    Source: Tian et al., Contrastive Representation Distillation, ICLR 2020,
    https://arxiv.org/abs/1910.10699, equations 10, 17 and 18; similarities are normalized by a
    constant estimated from the first batch, as in Wu et al., Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination, CVPR 2018, https://arxiv.org/abs/1805.01978.
    """

    size: int = 128
    negatives: int = 4096
    temperature: float = 0.07
    momentum: float = 0.5
    layers: Layers = "auto"

    student_memory: Tensor = field(init=False)  # (N, size)
    teacher_memory: Tensor = field(init=False)
    constants: Tensor = field(init=False)  # (2,), one for each direction; 0 = not known yet
    order: Tensor = field(init=False)  # (N,) images sorted by class
    bounds: Tensor = field(init=False)  # (2, K) where each class starts and ends in it

    weight: ClassVar[float] = 0.8
    of_classes: ClassVar[OfClasses] = "image"
    needs: ClassVar[Needs] = "embedding"
    relational: ClassVar[bool] = True
    meets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__init__()
        if self.size < 1 or self.negatives < 1 or not self.temperature > 0:
            raise ValueError("size, negatives and temperature must be above 0")

    def prepare(self, student: Taps, teacher: Taps, labels: Tensor) -> None:
        """Create both maps and the memories for images of the classes ``labels``, (N,)."""
        mine, theirs = self._vectors(student), self._vectors(teacher)
        self.student_map = nn.Linear(mine.shape[1], self.size).to(mine.device)
        self.teacher_map = nn.Linear(theirs.shape[1], self.size).to(mine.device)
        generator = torch.Generator().manual_seed(0)
        for name in ("student_memory", "teacher_memory"):
            start = torch.randn((len(labels), self.size), generator=generator)
            self.register_buffer(name, F.normalize(start).to(mine.device))
        self.register_buffer("constants", torch.zeros(2, device=mine.device))
        order = labels.argsort(stable=True)
        counts = labels.bincount()
        ends = counts.cumsum(0)
        self._new: tuple[Tensor, Tensor, Tensor] | None = None  # vectors not yet in the memories
        self.register_state_dict_pre_hook(_write_memories)  # type: ignore[no-untyped-call]
        self.register_buffer("order", order.to(mine.device))
        self.register_buffer("bounds", torch.stack([ends - counts, ends]).to(mine.device))

    def forward(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return the noise-contrastive losses in both directions, a scalar."""
        if student.index is None:
            raise ValueError("crd must know which training images a batch holds")
        self.remember()
        with full_precision(student.logits):
            mine = F.normalize(self.student_map(self._vectors(student)))
            theirs = F.normalize(self.teacher_map(self._vectors(teacher)))
            drawn = torch.cat([student.index[:, None], self._other_classes(target)], 1)
            loss = self._contrast(mine, self.teacher_memory, drawn, 0)
            loss = loss + self._contrast(theirs, self.student_memory, drawn, 1)
        # Gradients still need the memories as they are: the new vectors wait for the next batch.
        self._new = (_of_all(student.index), _of_all(mine.detach()), _of_all(theirs.detach()))
        return loss

    @torch.no_grad()
    def remember(self) -> None:
        """Move the memories of the last batch's images towards their new vectors."""
        if self._new is None:
            return
        index, mine, theirs = self._new
        for memory, new in ((self.student_memory, mine), (self.teacher_memory, theirs)):
            moved = self.momentum * memory[index] + (1 - self.momentum) * new
            memory[index] = F.normalize(moved)
        self._new = None

    def _vectors(self, taps: Taps) -> Tensor:
        if len(taps.features) != 1:
            raise ValueError(f"crd compares one pair of layers, not {len(taps.features)}")
        return vectors(taps.features[0])

    def _other_classes(self, target: Tensor) -> Tensor:
        """Return training images of other classes than each target's, (B, negatives) int64."""
        start, end = self.bounds[:, target][:, :, None]  # of the own class in the sorted order
        others = len(self.order) - (end - start)
        chance = torch.rand((len(target), self.negatives), device=target.device)
        place = (chance * others).long()
        return self.order[place + (place >= start) * (end - start)]

    def _contrast(self, x: Tensor, memory: Tensor, drawn: Tensor, direction: int) -> Tensor:
        """Return the loss of telling column 0 of ``drawn`` from the others, a scalar."""
        if len(memory) <= drawn.shape[1] * self.size:  # all products are fewer numbers than rows
            products = (x @ memory.T).gather(1, drawn)
        else:
            products = (memory[drawn] @ x[:, :, None]).squeeze(2)
        weights = (products / self.temperature).exp()
        if not bool(self.constants[direction] > 0):
            self.constants[direction] = weights.detach().mean() * len(memory)
        h = weights / self.constants[direction].clone()
        noise = self.negatives / len(memory)
        positive = (h[:, 0] / (h[:, 0] + noise)).log()
        negative = (noise / (h[:, 1:] + noise)).log().sum(1)
        return -(positive + negative).mean()


def _write_memories(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if isinstance(module, Crd):
        module.remember()


def _of_all(part: Tensor) -> Tensor:
    """Return the rows of every process, one after the other."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return part
    sizes: list[int | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(sizes, len(part))
    rows = [part.new_empty((size or 0, *part.shape[1:])) for size in sizes]
    distributed.all_gather(rows, part.contiguous())
    return torch.cat(rows)
