"""Caches that are damaged are made again, and it is said; figures that cannot be are refused."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compress import progress
from compress.errors import EngineError
from compress.measure import Timing, bench
from compress.prune.latency_table import LatencyTable, LayerShape
from compress.runtimes._session import BuildRequest
from compress.runtimes._trt_build import Build, BuildSettings
from compress.train.distill.teachers import CachedTeacher

LAYER = LayerShape((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (8, 8))
POINT = (LAYER, 4, 4, (4, 4))


@pytest.fixture
def warned(monkeypatch):
    """What progress has warned of."""
    told = []
    monkeypatch.setattr(progress, "warn", told.append)
    return told


def damaged(content: bytes, count: int):
    """Yield ``content`` with bytes changed, cut or added."""
    draw = random.Random(0)
    yield from (b"", b"null", b"[1]", b"\xff\xfe", content[: len(content) // 2], content * 2)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(draw.randrange(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        yield bytes(changed)


def test_a_damaged_latency_table_is_measured_again(tmp_path, warned, tried):
    file = tmp_path / "table.json"
    table = LatencyTable(lambda *_: 2.5, file)
    assert table.ms(*POINT) == 2.5
    table.save()
    whole = file.read_bytes()
    asked = 0
    for content in damaged(whole, 300):
        file.write_bytes(content)
        warned.clear()
        again = LatencyTable(lambda *_: 2.5, file)
        found = again.ms(*POINT)
        assert 0 < found < 3.6e6
        is_kept = again.measured == 0
        assert is_kept or warned or "4,4" not in json.loads(content).get(LAYER.key, {})
        again.save()
        LatencyTable(lambda *_: 0.0, file).ms(*POINT)  # it is whole again: nothing is measured
        asked += 1
    tried("a damaged table of latencies: measured again, and said", asked)


@pytest.mark.parametrize("value", ["NaN", "0", "-1", "1e9", "true", '"3"', "null", "[]", "1e999"])
def test_a_table_with_a_figure_that_cannot_be_is_measured_again(value, tmp_path, warned, tried):
    tried("a figure in the table that cannot be: NaN, 0, negative, a text, 11 days")
    file = tmp_path / "table.json"
    file.write_text(f'{{{json.dumps(LAYER.key)}: {{"4,4": {value}}}}}')
    assert LatencyTable(lambda *_: 2.5, file).ms(*POINT) == 2.5
    assert len(warned) == 1 and "measured again" in warned[0]


@pytest.mark.parametrize("ms", [0.0, -1.0, float("nan"), float("inf"), 1e10])
def test_an_absurd_measurement_is_refused(ms, tmp_path, tried):
    tried("a measurement of NaN, 0, less, or beyond an hour is refused (a layer, a session)")
    file = tmp_path / "table.json"
    table = LatencyTable(lambda *_: ms, file)
    with pytest.raises(EngineError, match="was measured to take"):
        table.ms(*POINT)
    table.save()
    assert not file.exists()


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clock_that_cannot_be_leaves_no_latency(step, tried):
    tried("a measurement of NaN, 0, less, or beyond an hour is refused (a layer, a session)")
    now = [0.0]

    def clock():
        now[0] += step
        return now[0]

    session = SimpleNamespace(run=lambda *_: [])
    with pytest.raises(EngineError, match="by the clock"):
        bench({"x": session}, [np.zeros(1)], timing=Timing(seconds=0.01), clock=clock, meters=())


class Answering:
    """A teacher that counts its answers."""

    survey, classes, asked = None, 5, 0

    def __call__(self, images, index, taps):
        self.asked += len(images)
        return images.flatten(1)[:, :5].clone(), {}

    def close(self):
        pass


def test_damaged_answers_of_a_teacher_are_computed_again(tmp_path, warned, tried):
    """Any change of the file, header or rows, gives the right answers in the end."""
    path, images = tmp_path / "teacher.npy", torch.randn(12, 1, 3, 3)
    index = torch.arange(12)
    teacher = CachedTeacher(Answering(), path, 12)
    expected = teacher(images, index, ())[0]
    assert torch.equal(expected, teacher(images, index, ())[0]) and teacher.teacher.asked == 12
    teacher.close()
    whole, count = path.read_bytes(), 0
    for content in damaged(whole, 300):
        path.write_bytes(content)
        warned.clear()
        again = CachedTeacher(Answering(), path, 12)
        assert torch.equal(again(images, index, ())[0], expected)
        again.close()
        reopened = CachedTeacher(Answering(), path, 12)
        assert torch.equal(reopened(images, index, ())[0], expected)
        assert reopened.teacher.asked == 0
        assert warned or len(content) == len(whole)
        count += 1
    tried("damaged answers of a teacher: computed again, and said", count)


def test_answers_of_a_teacher_that_stop_half_way_are_completed(tmp_path):
    path, images = tmp_path / "teacher.npy", torch.zeros(4, 1, 3, 3)  # zeros are answers as well
    teacher = CachedTeacher(Answering(), path, 4)
    teacher(images[:2], torch.arange(2), ())
    teacher.close()
    again = CachedTeacher(Answering(), path, 4)
    assert torch.equal(again(images, torch.arange(4), ())[0], torch.zeros(4, 5))
    assert again.teacher.asked == 2


class Config:
    """A builder's configuration that takes timing caches which begin with ``TIMING``."""

    def create_timing_cache(self, content):
        return content

    def set_timing_cache(self, cache, _ignore):
        self.cache = cache
        return cache in (b"",) or cache.startswith(b"TIMING")

    def get_timing_cache(self):
        return SimpleNamespace(serialize=lambda: b"TIMING" + self.cache)


def test_a_damaged_timing_cache_is_made_again(tmp_path, warned, tried):
    tried("a damaged timing cache of TensorRT (a stand-in for it): made again, and said", 3)
    path = tmp_path / "x.timing"
    for content in (b"\0", b"MINING", b"null"):
        path.write_bytes(content)
        build = Build(None, BuildSettings(timing_cache=path), path, BuildRequest((1, 1, 1), None))
        with build._timing_cache(Config()) as facts:
            pass
        assert path.read_bytes() == b"TIMING"
        assert facts["timing_cache"]["sha256_before"] is None
        assert "made again" in warned.pop()
    with build._timing_cache(Config()) as facts:
        pass
    assert warned == [] and facts["timing_cache"]["sha256_before"] is not None
