from __future__ import annotations

import pytest
import torch

from compress.recipe.settings import TrainSettings
from compress.train.optimizers import rate_factor

STEPS = 50


def torch_rates(make) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimizer)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_cosine_equals_torchs():
    settings = TrainSettings(epochs=10, schedule="cosine")
    ours = [rate_factor(10 * i / STEPS, settings) for i in range(STEPS)]
    theirs = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS))
    assert ours == pytest.approx(theirs)


def test_one_cycle_equals_torchs():
    settings = TrainSettings(epochs=10, schedule="one-cycle")
    make = torch.optim.lr_scheduler.OneCycleLR
    theirs = torch_rates(lambda o: make(o, 1.0, total_steps=STEPS + 1, cycle_momentum=False))
    # torch's first phase ends at step 0.3 * total - 1, the second at total - 1
    rise, whole = 0.3 * (STEPS + 1) - 1, STEPS
    for step, wanted in enumerate(theirs):
        done = 0.3 * step / rise if step <= rise else 0.3 + 0.7 * (step - rise) / (whole - rise)
        assert rate_factor(10 * done, settings) == pytest.approx(wanted, abs=1e-9)


def test_steps_cut_the_rate_at_their_epochs():
    settings = TrainSettings(epochs=9, schedule="step", step_epochs=(3, 6), step_factor=0.5)
    assert [rate_factor(e, settings) for e in (0, 2.99, 3, 5, 6, 8)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_warm_up_rises_to_the_peak_and_the_schedule_takes_the_rest():
    settings = TrainSettings(epochs=10, schedule="cosine", warmup_epochs=2)
    assert [rate_factor(e, settings) for e in (0.5, 1, 2, 6, 10)] == pytest.approx(
        [0.25, 0.5, 1, 0.5, 0]
    )


def test_constant_stays_where_it_is():
    assert {rate_factor(e / 3, TrainSettings(epochs=3, schedule="constant")) for e in range(9)} == {
        1.0
    }
