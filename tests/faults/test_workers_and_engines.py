"""A decoding process that dies, an engine build that fails or hangs: a sentence, and no hang."""

import dataclasses
import os
import shutil
import signal
import time
from functools import partial

import pytest
import torch
from attempts import CONTEXT, SECONDS, attempt, called, recorded
from test_disk import without_memory

from compress.data import load_data, parse_reference
from compress.errors import DataError, TrainingError
from compress.recipe.settings import TrainSettings
from compress.train.batches import train_batches


@dataclasses.dataclass(frozen=True)
class Images:
    """Images decoded by a process, in which something happens at the third batch."""

    images: object
    what: str
    workers: int = 1
    taken: list = dataclasses.field(default_factory=list)  # each process has its own

    def __len__(self):
        return len(self.images)

    @property
    def labels(self):
        return self.images.labels

    def take(self, indices):
        in_worker = torch.utils.data.get_worker_info() is not None
        self.taken.append(len(indices))
        if in_worker and len(self.taken) == 3:
            if self.what == "error":
                raise DataError("is not a readable image", where="x.jpg", fix="Replace it")
            os.kill(os.getpid(), getattr(signal, self.what))
        return self.images.take(indices)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["SIGKILL", "SIGSEGV", "SIGTERM"])
def test_a_decoding_process_that_dies(what, tried):
    tried("a process that decodes images dies (SIGKILL, SIGSEGV, SIGTERM) or raises")
    data = load_data(parse_reference("digits"))
    data = dataclasses.replace(data, splits={"train": Images(data.splits["train"], what)})
    with pytest.raises(TrainingError, match="a process that decodes images has ended"):
        for _ in train_batches(data, TrainSettings(batch_size=64), 0, 0):
            pass


@pytest.mark.slow
def test_what_goes_wrong_in_a_decoding_process_is_told_as_it_is(tried):
    tried("a process that decodes images dies (SIGKILL, SIGSEGV, SIGTERM) or raises")
    data = load_data(parse_reference("digits"))
    data = dataclasses.replace(data, splits={"train": Images(data.splits["train"], "error")})
    with pytest.raises(DataError) as caught:
        list(train_batches(data, TrainSettings(batch_size=64), 0, 0))
    assert str(caught.value) == "x.jpg: is not a readable image. Replace it."


def failing_build():
    from compress.errors import EngineError
    from compress.runtimes.openvino import Openvino

    def build(self, source, out, request):
        raise EngineError("could not build an engine: no kernel for it", where=str(source))

    Openvino.build = build
    without_memory()


def hanging_build(begun):
    from compress.runtimes.openvino import Openvino

    def build(self, source, out, request):
        begun.touch()
        time.sleep(600)

    Openvino.build = build
    without_memory()


def without_measuring(whole, here):
    """Copy a run whose engines are not yet built."""
    shutil.copytree(whole, here)
    shutil.rmtree(here / "03-measure")
    for path in here.rglob("*.openvino-b1.*"):
        path.unlink()


@pytest.mark.slow
def test_an_engine_that_cannot_be_built(small, whole, tmp_path, tried):
    """What is done stays, and the same command goes on once the cause is gone."""
    tried("an engine build that fails: a sentence with the stage, then the run goes on", 1)
    run = tmp_path / "run"
    without_measuring(whole, run)
    ended = attempt("run", small, "--out", run, log=tmp_path / "log", fault=failing_build)
    assert ended.code == 2 and "no kernel for it" in ended.sentence, ended.told
    again = attempt("run", small, "--out", run, log=tmp_path / "log", fault=without_memory)
    assert again.code == 0, again.told
    assert recorded(run) == recorded(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_engine_build_that_hangs_is_ended_by_a_signal(
    number, code, small, whole, tmp_path, tried
):
    tried("an engine build that hangs: SIGINT and SIGTERM end it within 5 s, nothing is lost", 1)
    run, log, begun = tmp_path / "run", tmp_path / "log", tmp_path / "begun"
    without_measuring(whole, run)
    command = ["run", str(small), "--out", str(run)]
    process = CONTEXT.Process(target=called, args=(command, log, partial(hanging_build, begun)))
    process.start()
    deadline = time.monotonic() + SECONDS
    while not begun.exists():
        assert time.monotonic() < deadline and process.is_alive(), log.read_text()
        time.sleep(0.05)
    asked = time.monotonic()
    os.kill(process.pid, number)
    process.join(30)
    assert time.monotonic() - asked < 5 and process.exitcode == code, log.read_text()
    assert (run / "02-quantize" / "metrics.json").exists() and not (run / "run.lock").exists()
