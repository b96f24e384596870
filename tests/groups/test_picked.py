"""Channels that a buffer picks by number are cut, whatever object the program makes of it."""

import pytest
import torch
from torch import nn
from torch.autograd import Variable

from compress.groups.proof import apply_pruning, prove
from compress.prune.plan import plan_pruning


class Picking(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.wrap = wrap
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.register_buffer("index", torch.arange(8).flip(0))

    def forward(self, x):
        picked = torch.index_select(self.a(x), 1, self.wrap(self.index))
        return self.c(self.b(picked)).mean((2, 3))


@pytest.mark.parametrize("wrap", [lambda index: index, Variable], ids=["buffer", "variable"])
def test_a_buffer_that_numbers_channels_follows_the_cut(wrap):
    network, example = Picking(wrap).eval().double(), torch.randn(2, 3, 8, 8).double()
    plan = plan_pruning(network, example, criterion="l1", keep_macs=0.5)
    assert set(plan.frozen) == {"c"}
    assert len(apply_pruning(network, plan).index) < 8
    assert prove(network, plan, example) < 1e-8
