"""The search for layers that must stay in float, against every subset that could be right."""

import random

import pytest

from compress.quantize.isolate import MOST_ALONE, most_asked, needed_in_float

LAYERS = [f"layer{k}" for k in range(24)]


@pytest.mark.parametrize("count", range(1, MOST_ALONE + 1))
@pytest.mark.parametrize("seed", range(20))
def test_exactly_the_faulty_layers_are_found_with_few_questions(count, seed):
    faulty = set(random.Random(seed).sample(LAYERS, count))
    asked = []

    def is_right(floating):
        asked.append(floating)
        return faulty.issubset(floating)

    assert set(needed_in_float(LAYERS, is_right)) == faulty
    assert len(asked) <= 1 + count * (len(LAYERS).bit_length() + 1) <= most_asked(LAYERS)


def test_of_many_faulty_layers_all_from_one_on_are_left():
    faulty = set(LAYERS[3:15:2])
    found = needed_in_float(LAYERS, lambda floating: faulty.issubset(floating))
    assert found == ["layer3", "layer5", "layer7", *LAYERS[9:]]


def test_layers_that_are_wrong_only_together_leave_one_in_float():
    def is_right(floating):
        return not {"layer4", "layer9"}.isdisjoint(floating)

    assert needed_in_float(LAYERS, is_right) == ["layer9"]


def test_nothing_is_found_where_float_is_wrong_too():
    assert needed_in_float(LAYERS, lambda _: False) is None
