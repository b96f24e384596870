"""Teachers: a torch module, an ONNX file or session, or cached logits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from compress import artifact, progress
from compress.errors import TrainingError, boundary
from compress.evaluate import device_of, run_session
from compress.modules.inputs import copied
from compress.modules.outputs import logits_of
from compress.train.distill.features import Survey, Tap, survey, tapped

FEATURES = dict[Tap, Tensor]
HEADER_BYTES = 128  # of a .npy file of two dimensions
PARITY = np.uint32(0x9E3779B9)  # of a row that is whole; of one not yet written it is 0


class Teacher(Protocol):
    """Answers batches; takes images as the student gets them."""

    survey: Survey | None  # None where only the logits can be seen
    classes: int

    def __call__(
        self, images: Tensor, index: Tensor | None, taps: Sequence[Tap]
    ) -> tuple[Tensor, FEATURES]:
        """Return logits (B, K) in the teacher's class order, and the features at ``taps``."""
        ...

    def close(self) -> None:
        """Leave everything as it was found."""


class TorchTeacher:
    """A network, in evaluation mode until ``close`` leaves it as it was found.

    Its input may be of another ``image_size`` than the student's, (1, C, H, W), and it may run on
    another ``device``; compiled by torch.compile it has no features.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        image_size: int | None = None,
        device: str | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        self.model, self.image_size = model, image_size
        self.device = torch.device(device) if device is not None else None
        self._modes = {module: module.training for module in model.modules()}
        self._home = device_of(model)
        self.survey: Survey | None = survey(model, resized(example.to(self._home), image_size))
        self.classes = self.survey.classes
        self._placed: torch.device | None = None
        self._network: Any = torch.compile(model) if compiled else model

    def __call__(
        self, images: Tensor, index: Tensor | None, taps: Sequence[Tap]
    ) -> tuple[Tensor, FEATURES]:
        """Return logits (B, K) and the features at ``taps``, beside the images."""
        device = self.device or images.device
        if self._placed != device:
            self.model.to(device).to(memory_format=torch.channels_last).eval()
            self._placed = device
        with torch.no_grad(), tapped(self.model, taps) as seen:
            logits = logits_of(self._network(resized(copied(images).to(device), self.image_size)))
        here = {tap: value.to(images.device) for tap, value in seen.items()}
        return logits.to(images.device), here

    def close(self) -> None:
        """Put the network back: device, memory format and modes."""
        if self._placed is not None:
            self.model.to(self._home).to(memory_format=torch.contiguous_format)
            self._placed = None
        for module, training in self._modes.items():
            module.training = training

    def fingerprint(self) -> str:
        """Return a hash of every weight."""
        digest = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


class SessionTeacher:
    """An ONNX file or engine in any runtime: logits only.

    Its input may be of another ``image_size`` than the student's, (1, C, H, W); ``close`` closes
    the session if it is ``owned``.
    """

    survey: Survey | None = None

    def __init__(
        self, session: Any, example: Tensor, image_size: int | None, name: str, owned: bool
    ) -> None:
        self.session, self.image_size, self.name, self._owned = session, image_size, name, owned
        self.classes = int(self(example.cpu(), None, ())[0].shape[1])

    def __call__(
        self, images: Tensor, index: Tensor | None, taps: Sequence[Tap]
    ) -> tuple[Tensor, FEATURES]:
        """Return logits (B, K) beside the images; there are no features."""
        array = resized(images.float(), self.image_size).detach().cpu().contiguous().numpy()
        first = next(iter(run_session(self.session, array).values()))
        return torch.from_numpy(np.asarray(first, np.float32)).to(images.device), {}

    def close(self) -> None:
        """Close the session if it was opened for this teacher."""
        if self._owned:
            self.session.close()

    def fingerprint(self) -> str:
        """Return a hash of the file, or of its name where there is none."""
        path = Path(self.name)
        content = path.read_bytes() if path.is_file() else self.name.encode()
        return hashlib.sha256(content).hexdigest()


class CachedTeacher:
    """Remembers the logits of every training image on disk; answers repeated images from there.

    Only right where an image is the same each time. A file belongs to one teacher, data set and
    augmentation; a row that was not written completely is computed again.

    Args:
        teacher: Asked for images that are not known yet.
        path: File of (N, K + 1) float32, shared by the processes of one machine; the last column
            holds the parity of a row's bits.
    """

    survey: Survey | None = None

    def __init__(self, teacher: Teacher, path: Path, images: int) -> None:
        self.teacher, self.classes = teacher, teacher.classes
        self._rows = _open_rows(path, (images, self.classes + 1))

    def __call__(
        self, images: Tensor, index: Tensor | None, taps: Sequence[Tap]
    ) -> tuple[Tensor, FEATURES]:
        """Return logits (B, K) beside the images; there are no features."""
        if index is None:
            return self.teacher(images, None, ())
        places = index.cpu().numpy()
        rows = self._rows[places]
        unknown = _parity(rows) != PARITY
        if unknown.any():
            missing = torch.from_numpy(unknown.nonzero()[0]).to(images.device)
            answers = self.teacher(images[missing], None, ())[0].float().cpu().numpy()
            rows[unknown, :-1], rows[unknown, -1] = answers, 0
            rows[unknown, -1] = (_parity(rows[unknown]) ^ PARITY).view(np.float32)
            self._rows[places[unknown]] = rows[unknown]
        return torch.from_numpy(rows[:, :-1].copy()).to(images.device), {}

    def close(self) -> None:
        """Write what is left, and close the teacher."""
        self._rows.flush()
        self.teacher.close()


def resized(images: Tensor, side: int | None) -> Tensor:
    """Return images at another size where one is asked for, (B, C, side, side)."""
    if side is None or images.shape[2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def class_order(
    student: Sequence[str], teacher: Sequence[str] | None, classes: int
) -> Tensor | None:
    """Return the teacher's output for each class of the student, (K,); None where they agree.

    Names are in the order of the outputs; the teacher's where they are known, ``classes`` in
    number.

    Raises:
        TrainingError: the counts differ and nothing says which is which, or a class is missing.
    """
    if teacher is None:
        if classes != len(student):
            raise TrainingError(
                f"the teacher has {classes} class outputs, the student {len(student)}",
                where="distill",
                fix="Give the teacher's class names in its order, teacher_classes: [...], so that "
                "classes can be mapped by name",
            )
        return None
    if len(teacher) != classes:
        raise TrainingError(
            f"{len(teacher)} names for {classes} outputs of the teacher", where="teacher_classes"
        )
    missing = [name for name in student if name not in teacher]
    if missing:
        raise TrainingError(
            f"the teacher lacks the classes {', '.join(missing[:5])}",
            where="teacher_classes",
            expected=f"all of: {', '.join(student[:20])}",
        )
    if list(student) == list(teacher):
        return None
    return torch.tensor([list(teacher).index(name) for name in student])


def _parity(rows: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Return the exclusive or of the bits of each row, (B,)."""
    bits: NDArray[np.uint32] = np.bitwise_xor.reduce(rows.view(np.uint32), axis=1)
    return bits


def _open_rows(path: Path, shape: tuple[int, int]) -> np.memmap[Any, np.dtype[np.float32]]:
    """Open the file, made anew where it is absent or damaged: it is only a cache."""
    if path.exists():
        reason = f"is no table of {shape[0]} x {shape[1]} figures"
        try:
            with boundary(TrainingError, "cannot be read"):
                if path.stat().st_size == HEADER_BYTES + 4 * shape[0] * shape[1]:
                    rows = np.lib.format.open_memmap(path, mode="r+")
                    fits = rows.shape == shape and rows.dtype == np.float32
                    if fits and rows.flags.c_contiguous:
                        return rows
        except TrainingError as error:
            reason = error.what
        progress.warn(f"{path}: {reason}; the teacher's logits are computed again")
    with artifact.replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.zeros(shape, dtype=np.float32))
    return np.lib.format.open_memmap(path, mode="r+")
