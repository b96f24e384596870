"""Which dimension is the batch, by the sizes that exporters write."""

import pytest

from compress.graph.shapes import batch_axis, input_axes, leading

SILENT = ("free_0", "free_1")  # what a session calls sizes that a file gives no name


@pytest.mark.parametrize(
    ("shape", "first", "axis"),
    [
        ((2, "batch", 128), ("batch", 576), 1),  # PyTorch's state of an LSTM
        (("layers", "batch", "width"), ("batch", "time"), 1),  # an output whose sizes were lost
        ((2, "free_1", 128), SILENT, 1),
        ((2, None, 128), (None, None), 1),
        ((2, 1, 128), (1, 576), 1),  # fixed
        ((1, 1, 128), ("time", 576), 0),  # the batch is one, of which rows are times
        ((1, 1, 128), (1, 576), 0),
        ((2, 1, 1, 8), (1, 576), 0),  # nobody knows
        ((1, "height", 2), ("batch", 3, "height", "width"), 0),  # a grid of positions
        (("other", 3, 8, 8), ("batch", 3, 8, 8), 0),
        ((), ("batch", 3), 0),
        (None, ("batch", 3), 0),
    ],
)
def test_the_dimension_that_is_the_batch(shape, first, axis):
    assert batch_axis(shape, first) == axis


@pytest.mark.parametrize("turn", [1, -1])
@pytest.mark.parametrize("shapes", [((2, "n", 8), ("n", 5), ()), ((2, 1, 8), (1, 5), ())])
def test_it_is_found_whichever_input_comes_first(shapes, turn):
    names = dict(zip(("state", "input", "rate"), shapes, strict=True))
    given = dict([*names.items()][::turn])
    assert leading(given) == "input"
    assert input_axes(given) == {"state": 1}


def test_no_inputs_have_no_batch():
    assert leading({}) == ""
    assert input_axes({}) == {}
    assert input_axes({"rate": ()}) == {}
