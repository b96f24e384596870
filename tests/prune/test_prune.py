"""Plans keep their budget, respect every option, repeat exactly, and refuse what cannot be."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import CompressError, PlanError
from compress.groups import trace
from compress.prune import (
    GroupLasso,
    WithGroupLasso,
    keep_in_round,
    rebase_batchnorm,
    recalibrate_batchnorm,
)
from compress.prune.criteria import ChannelGroup
from compress.prune.selection import CostModel
from compress.recipe.settings import PruneSettings

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Small(nn.Module):
    """A stem, a residual block, a depthwise layer and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 24, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(24)
        self.outer = nn.Conv2d(24, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, groups=16)
        self.wide = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = x + self.outer(torch.relu(self.bn2(self.inner(x))))
        x = torch.relu(self.wide(torch.relu(self.depthwise(x))))
        return self.head(x.flatten(1))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(5)
    return Small()


def batches(count: int = 3) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(8, 3, 8, 8, generator=draw), torch.randint(0, 5, (8,), generator=draw)


def kept(plan: compress.PrunePlan) -> dict[str, int]:
    return {name: len(units) for name, units in plan.groups.items()}


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("quantity", ["macs", "params"])
@pytest.mark.parametrize("ranking", ["global", "uniform"])
def test_budget_is_reached_from_below(
    model: nn.Module, share: float, quantity: str, ranking: Any
) -> None:
    plan = compress.plan_pruning(model, EXAMPLE, ranking=ranking, **{f"keep_{quantity}": share})
    left = getattr(plan, f"{quantity}_after") / getattr(plan, f"{quantity}_before")
    assert 0.9 * share <= left <= share
    again = trace(compress.apply_pruning(model, plan), EXAMPLE)  # counted on the pruned network
    assert getattr(again, quantity) == getattr(plan, f"{quantity}_after")


def test_cost_model_agrees_with_the_cut_network(model: nn.Module) -> None:
    network = trace(model, EXAMPLE)
    cost = CostModel(network)
    counts = np.array([max(1, group.size // (2 + n)) for n, group in enumerate(network.groups)])
    keep = {g.name: np.arange(c) for g, c in zip(network.groups, counts, strict=True)}
    from compress.groups.plan import make_prune_plan

    pruned = trace(compress.apply_pruning(model, make_prune_plan(network, keep)), EXAMPLE)
    assert cost.total("macs", counts) == pruned.macs
    assert cost.total("params", counts) == pruned.params
    assert cost.total("macs", cost.sizes) == network.macs


@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_marginal_cost_is_the_slope(model: nn.Module, quantity: Any) -> None:
    cost = CostModel(trace(model, EXAMPLE))
    counts = cost.sizes // 2
    for group, slope in enumerate(cost.marginal(quantity, counts)):
        step = np.zeros_like(counts)
        step[group] = 1  # totals are at most quadratic, so the central difference is exact
        up, down = (cost.total(quantity, counts + sign * step) for sign in (1, -1))
        assert slope == pytest.approx((up - down) / 2)


def test_low_scores_go_first(model: nn.Module) -> None:
    weak = [1, 4, 20]
    with torch.no_grad():
        model.get_submodule("inner").weight[weak] *= 0.01  # type: ignore[index, operator]
    criterion = {"l2": {"weights": "filters"}}
    plan = compress.plan_pruning(model, EXAMPLE, criterion=criterion, keep_macs=0.9)
    assert not set(weak) & set(np.asarray(plan.groups["inner"]).tolist())


def test_taylor_cuts_what_no_consumer_reads(model: nn.Module) -> None:
    unread = [0, 7, 23]
    with torch.no_grad():
        model.get_submodule("outer").weight[:, unread] = 0  # type: ignore[index, operator]
    plan = compress.plan_pruning(
        model, EXAMPLE, criterion="taylor", keep_macs=0.9, batches=batches()
    )
    assert not set(unread) & set(np.asarray(plan.groups["inner"]).tolist())


def test_pruned_network_equals_its_masked_reference(model: nn.Module) -> None:
    model.eval()
    plan = compress.plan_pruning(model, EXAMPLE, keep_macs=0.4)
    x = torch.randn(2, 3, 8, 8)
    small, masked = compress.apply_pruning(model, plan), compress.mask_pruning(model, plan)
    torch.testing.assert_close(small(x), masked(x), rtol=1e-4, atol=1e-5)


def test_same_seed_gives_the_same_plan(model: nn.Module) -> None:
    for criterion in ("random", "hessian"):
        first, second, other = (
            compress.plan_pruning(
                model, EXAMPLE, criterion=criterion, keep_macs=0.5, batches=batches(), seed=seed
            ).to_json()
            for seed in (3, 3, 4)
        )
        assert first == second
        assert first != other


def test_round_to_counts_channels(model: nn.Module) -> None:
    plan = compress.plan_pruning(model, EXAMPLE, keep_macs=0.5, round_to=8)
    assert all(
        count % 8 == 0 or count == plan.group_sizes[name] for name, count in kept(plan).items()
    )
    assert plan.macs_after <= 0.5 * plan.macs_before


def test_round_to_auto_keeps_what_kernels_take_at_once() -> None:
    layers = [nn.Conv2d(i, o, 3) for i, o in ((3, 128), (128, 64), (64, 40), (40, 16), (16, 3))]
    net = nn.Sequential(*layers)
    multiples = {128: 16, 64: 8, 40: 4, 16: 4}
    plan = compress.plan_pruning(net, (1, 3, 16, 16), keep_macs=0.5, round_to="auto")
    assert 0.4 * plan.macs_before < plan.macs_after <= 0.5 * plan.macs_before
    sizes = {name: plan.group_sizes[name] for name in kept(plan)}
    for name, count in kept(plan).items():
        below = count < multiples[sizes[name]] and count.bit_count() == 1
        assert count % multiples[sizes[name]] == 0 or below
    least = compress.plan_pruning(net, (1, 3, 16, 16), keep_macs=0.01, round_to="auto")
    assert least.macs_after <= 0.01 * least.macs_before


def test_min_channels_and_max_cut_protect_every_group(model: nn.Module) -> None:
    plan = compress.plan_pruning(model, EXAMPLE, keep_macs=0.3, min_channels=6)
    assert min(kept(plan).values()) >= 6
    plan = compress.plan_pruning(model, EXAMPLE, keep_macs=0.4, max_cut=0.5)
    assert all(2 * count >= plan.group_sizes[name] for name, count in kept(plan).items())


def test_excluded_layer_keeps_its_channels_and_says_so(model: nn.Module) -> None:
    plan = compress.plan_pruning(model, EXAMPLE, keep_macs=0.5, exclude=["inner"])
    assert compress.apply_pruning(model, plan).get_submodule("inner").out_channels == 24
    assert "excluded by the name 'inner'" in plan.frozen["inner"]


def test_one_share_for_all_channels(model: nn.Module) -> None:
    plan = compress.plan_pruning(model, EXAMPLE, keep_channels=0.5)
    assert all(count == plan.group_sizes[name] // 2 for name, count in kept(plan).items())


def test_shares_by_layer_leave_the_others_whole(model: nn.Module) -> None:
    plan = compress.plan_pruning(model, EXAMPLE, keep_channels={"inner": 0.25, "wide": 0.5})
    small = compress.apply_pruning(model, plan)
    widths = [small.get_submodule(n).out_channels for n in ("stem", "inner", "wide")]
    assert widths == [16, 6, 16]


def test_a_criterion_of_the_users_own(model: nn.Module) -> None:
    class LastFirst:
        def __call__(self, group: ChannelGroup) -> Tensor:
            return torch.arange(group.size, 0, -1).float()

    plan = compress.plan_pruning(model, EXAMPLE, criterion=LastFirst(), keep_channels=0.5)
    assert np.asarray(plan.groups["inner"]).tolist() == list(range(12))


def test_planning_leaves_the_model_as_it_was(model: nn.Module) -> None:
    model.train()
    model.get_submodule("bn2").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    for criterion in ("taylor", "fisher", "hessian", "activation"):
        compress.plan_pruning(model, EXAMPLE, criterion=criterion, keep_macs=0.5, batches=batches())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_the_full_budget_cuts_nothing(model: nn.Module) -> None:
    plan = compress.plan_pruning(model, EXAMPLE, keep_macs=1.0)
    assert plan.macs_after == plan.macs_before


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "no budget says how far to prune. Expected exactly one of keep_macs, keep_params,"),
    ({"keep_macs": 0.5, "latency_ms": 3}, "keep_macs and latency_ms contradict each other"),
    ({"keep_macs": 1.5}, "keep_macs is 1.5. Expected the share that is kept, above 0 and at most"),
    ({"keep_params": 0}, "keep_params is 0"),
    ({"keep_macs": "half"}, "keep_macs is 'half'"),
    ({"keep_latency": 1.2}, "keep_latency is 1.2. Expected the share that is kept"),
    ({"latency_ms": -1}, "latency_ms is -1. Expected milliseconds above 0"),
    ({"keep_channels": {}}, "keep_channels names no layer"),
    ({"keep_channels": {"inner": 2}}, "keep_channels['inner'] is 2"),
    ({"keep_channels": {"iner": 0.5}}, "there is no layer 'iner'. Nearest names: inner"),
    ({"keep_channels": {"head": 0.5}}, "head: the channels of this layer stay"),
    (
        {"keep_channels": {"stem": 0.5, "outer": 0.25}},
        "keep_channels: outer: keeps 0.25 of its channels but stem, which is cut together",
    ),
    ({"keep_macs": 0.5, "criterion": "l7"}, "no such criterion 'l7'. Did you mean 'l2'?"),
    ({"keep_macs": 0.5, "criterion": "taylor"}, "criterion 'taylor' needs gradients on images"),
    ({"keep_macs": 0.5, "exclude": ["stm"]}, "exclude: there is no layer 'stm'. Nearest names: st"),
    ({"keep_macs": 0.5, "ranking": "local"}, "ranking is 'local'. Expected one of: global, unif"),
    ({"keep_macs": 0.5, "normalize": "sum"}, "normalize is 'sum'. Expected one of: auto, per_cost"),
    (
        {"keep_macs": 0.5, "round_to": 0},
        'round_to is 0. Expected a whole number, at least 1, or "auto"',
    ),
    ({"keep_macs": 0.5, "max_cut": 0.0}, "max_cut is 0.0"),
    ({"keep_macs": 0.05, "max_cut": 0.5}, "keep_macs = 0.05 cannot be reached: with every group"),
    ({"keep_macs": 0.5, "criterion": "taylor", "batches": []}, "batches holds no images"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input_says_what_is_wrong(
    model: nn.Module, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CompressError) as caught:
        compress.plan_pruning(model, EXAMPLE, **options)
    assert message in str(caught.value)


def test_nothing_to_cut_says_why(model: nn.Module) -> None:
    with pytest.raises(PlanError, match=r"no channel of this network can be cut: .*excluded by"):
        layers = ["stem", "inner", "wide", "outer", "depthwise"]
        compress.plan_pruning(model, EXAMPLE, keep_macs=0.5, exclude=layers)


def test_channels_that_a_shuffle_ties_to_one_another_are_told() -> None:
    """Two in each of three groups: groups stay, so one that went would take the next along."""
    first, last = nn.Conv2d(6, 6, 1, groups=3), nn.Conv2d(6, 6, 1, groups=3)
    depthwise = nn.Conv2d(6, 6, 1, groups=6)
    shuffled = [first, nn.ChannelShuffle(3), depthwise, last, nn.Flatten(), nn.Linear(6 * 64, 5)]
    network = nn.Sequential(nn.Conv2d(3, 6, 1), *shuffled)
    plan = compress.plan_pruning(network, EXAMPLE, keep_channels=0.5)
    assert plan.frozen["1"] == "its channels are tied to one another and could only go all together"
    with pytest.raises(PlanError, match=r"can be cut: 1: its channels are tied to one.*; 0: excl"):
        compress.plan_pruning(network, EXAMPLE, keep_channels=0.5, exclude=["0", "4"])


def test_a_budget_out_of_reach_says_why_layers_stay_whole(model: nn.Module) -> None:
    with pytest.raises(PlanError, match=r"1 layer stays whole \(1: its channels are an output of"):
        compress.plan_pruning(model, EXAMPLE, keep_macs=0.001)


def test_weights_that_are_not_finite_are_named(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_submodule("inner").weight[0] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(PlanError, match="stem: the criterion gives scores that are not finite"):
        compress.plan_pruning(model, EXAMPLE, keep_macs=0.5)


@pytest.mark.parametrize("criterion", ["fisher", "obs"])
def test_answers_that_are_not_finite_are_refused(model: nn.Module, criterion: str) -> None:
    with torch.no_grad():
        model.get_submodule("inner").weight[0] = float("nan")  # type: ignore[index, operator]
    batches = [(EXAMPLE.repeat(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(PlanError, match="returns numbers that are not finite"):
        compress.plan_pruning(model, EXAMPLE, criterion=criterion, keep_macs=0.5, batches=batches)


def test_a_criterion_with_the_wrong_shape_is_named(model: nn.Module) -> None:
    with pytest.raises(PlanError, match=r"gives scores of shape \(\)"):
        compress.plan_pruning(
            model, EXAMPLE, criterion=lambda group: torch.tensor(1.0), keep_macs=0.5
        )


def test_defaults_are_those_of_the_settings() -> None:
    fields = PruneSettings.model_fields
    for name, parameter in inspect.signature(compress.plan_pruning).parameters.items():
        if name in fields and name not in ("criterion", "round_to"):
            assert parameter.default == fields[name].default, name
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3))
    _, plan = compress.prune(net, (1, 3, 8, 8), keep_macs=0.5)
    assert plan.about["limits"]["round_to"] == fields["round_to"].default == "auto"


class TestRecalibration:
    def test_statistics_are_those_of_the_batches(self) -> None:
        norm = nn.BatchNorm1d(4)
        model = nn.Sequential(norm, nn.Linear(4, 2)).eval()
        data = [(torch.randn(16, 4) * 3 + 1, torch.zeros(16)) for _ in range(3)]
        assert recalibrate_batchnorm(model, data) is model
        expected = torch.stack([x.mean(0) for x, _ in data]).mean(0)
        torch.testing.assert_close(norm.running_mean, expected)
        expected = torch.stack([x.var(0) for x, _ in data]).mean(0)
        torch.testing.assert_close(norm.running_var, expected)
        assert not norm.training
        assert norm.momentum == 0.1

    def test_nothing_changes_when_the_network_raises(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(RuntimeError):
            recalibrate_batchnorm(model, [(torch.randn(8, 5), torch.zeros(8))])
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(module.training for module in model.modules())

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([], "batches holds no images"),
            ([(torch.ones(1, 4), None)], "too small to estimate BatchNorm"),
        ],
    )
    def test_bad_batches_are_refused(self, data: Any, message: str) -> None:
        with pytest.raises(CompressError, match=message):
            recalibrate_batchnorm(nn.Sequential(nn.BatchNorm1d(4)), data)

    def test_a_network_without_norms_is_left_alone(self) -> None:
        model = nn.Linear(2, 2)
        assert recalibrate_batchnorm(model, []) is model


class TestRebasing:
    def network(self) -> nn.Module:
        torch.manual_seed(0)
        shared = nn.BatchNorm2d(5)
        model = nn.Sequential(
            nn.Conv2d(2, 5, 3), shared, nn.ReLU(), nn.Conv2d(5, 5, 3, padding=1), shared,
            nn.Conv2d(5, 3, 1), nn.BatchNorm2d(3, eps=1e-3), nn.Conv2d(3, 3, 1),
            nn.BatchNorm2d(3, affine=False),
        )  # fmt: skip
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.normal_(norm.running_mean)
                nn.init.uniform_(norm.running_var, 0.2, 3.0)
                if norm.affine:
                    nn.init.normal_(norm.weight)
                    nn.init.normal_(norm.bias)
        return model.eval()

    def test_the_answers_stay(self) -> None:
        model, images = self.network(), torch.randn(32, 2, 8, 8) * 2 + 1
        before = model(images)
        assert rebase_batchnorm(model, [(images[:20],), (images[20:],)]) is model
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_in_training_mode_it_answers_as_in_eval_mode(self) -> None:
        model, images = self.network()[:3] + self.network()[5:7], torch.randn(64, 2, 8, 8) * 2 + 1
        wanted = model(images)
        assert (copy.deepcopy(model).train()(images) - wanted).abs().max() > 0.5
        rebase_batchnorm(model, [(images,)])
        torch.testing.assert_close(model.train()(images), wanted, rtol=1e-3, atol=1e-3)

    def test_statistics_are_those_of_what_enters(self) -> None:
        model, images = self.network(), torch.randn(32, 2, 8, 8)
        plain = model[8].running_mean.clone()
        rebase_batchnorm(model, [(images,)])
        seen = torch.cat([model[0](images).flatten(2), model[:4](images).flatten(2)], dim=2)
        torch.testing.assert_close(model[1].running_mean, seen.mean((0, 2)), rtol=1e-4, atol=1e-5)
        variance = seen.var((0, 2), correction=0)
        torch.testing.assert_close(model[1].running_var, variance, rtol=1e-4, atol=1e-5)
        assert torch.equal(model[8].running_mean, plain)  # it has no scale that could make up

    def test_a_dead_channel_stays_finite(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
        nn.init.zeros_(model[0].weight)
        images = torch.randn(8, 1, 4, 4)
        before = model(images)
        rebase_batchnorm(model, [(images,)])
        torch.testing.assert_close(model(images), before)
        assert torch.isfinite(model.train()(images)).all()

    def test_no_images_are_refused(self) -> None:
        with pytest.raises(CompressError, match="batches holds no images"):
            rebase_batchnorm(self.network(), [])


class TestSchedules:
    def test_rounds_keep_equal_shares_and_end_on_the_budget(self) -> None:
        shares = [keep_in_round(0.3, number, 4) for number in range(1, 5)]
        steps = [b / a for a, b in zip([1.0, *shares], shares, strict=False)]
        assert shares[-1] == 0.3
        assert steps == pytest.approx([steps[0]] * 4)

    def test_rounds_out_of_range_are_refused(self) -> None:
        with pytest.raises(ValueError, match="round 5 of 4"):
            keep_in_round(0.3, 5, 4)

    def test_lasso_is_the_sum_of_scaled_norms(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 1))
        lasso = GroupLasso(trace(model, torch.zeros(1, 2, 4, 4)))
        first, bias, second = (model[0].weight, model[0].bias, model[2].weight)
        units = [torch.cat([first[u].flatten(), bias[u : u + 1], second[:, u].flatten()]) for u in range(3)]  # fmt: skip  # noqa: E501
        expected = sum(7**0.5 * unit.norm().item() for unit in units)  # 2 + 1 + 4 entries
        assert lasso.penalty(model).item() == pytest.approx(expected, rel=1e-5)

    def test_lasso_training_thins_out_units_as_a_whole(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))

        class Nothing:
            def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
                return model(images).sum() * 0

            def parameters(self) -> Iterator[nn.Parameter]:
                yield from ()

            def close(self) -> None:
                pass

        lasso = GroupLasso(trace(model, torch.zeros(1, 2, 4, 4)))
        objective = WithGroupLasso(Nothing(), lasso, 1.0)
        before = lasso.penalty(model).item()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        images = torch.randn(1, 2, 4, 4)
        for _ in range(40):
            optimizer.zero_grad()
            objective(model, images, torch.zeros(1)).backward()
            optimizer.step()
        assert lasso.penalty(model).item() < 0.5 * before
        assert list(objective.parameters()) == []


def test_batches_that_do_not_fit_the_labels_are_refused(model: nn.Module) -> None:
    data = [(torch.randn(4, 3, 8, 8), torch.full((4,), 7))]
    with pytest.raises(CompressError, match="does not fit labels"):
        compress.plan_pruning(model, EXAMPLE, criterion="taylor", keep_macs=0.5, batches=data)
