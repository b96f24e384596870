"""Every criterion keeps the contract; each one equals its formula on a case done by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress import plugins
from compress.errors import UnknownNameError, UsageError
from compress.groups import Group, Slice
from compress.prune import criteria
from compress.prune.criteria import ChannelGroup, Criterion, Evidence, reduced


def across(tensor: str, dim: int, role: str, size: int, k: int = 1) -> Slice:
    return Slice(tensor, dim, np.arange(size * k).reshape(size, k), role)  # type: ignore[arg-type]


GROUP = Group(
    "first",
    6,
    (
        across("first.weight", 0, "output", 6),
        across("bn.weight", 0, "channel", 6),
        across("bn.bias", 0, "channel", 6),
        across("second.weight", 1, "input", 6),
        across("head.weight", 1, "input", 6, k=4),  # flattened 2 x 2 maps
    ),
)


@dataclass(frozen=True)
class Case:
    tensors: dict[str, Tensor]
    evidence: Evidence

    def view(self, order: Tensor | None = None) -> ChannelGroup:
        """Show the case to a criterion, its units in the given order."""
        order = torch.arange(6) if order is None else order
        slices = tuple(Slice(s.tensor, s.dim, s.index[order.numpy()], s.role) for s in GROUP.slices)
        group = Group("first", 6, slices)
        return ChannelGroup(group, self.tensors, frozenset({"bn.weight"}), self.evidence)


@pytest.fixture
def case() -> Case:
    draw = torch.Generator().manual_seed(3)
    shapes = {
        "first.weight": (6, 3, 3, 3),
        "bn.weight": (6,),
        "bn.bias": (6,),
        "second.weight": (5, 6, 3, 3),
        "head.weight": (4, 24),
    }
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    places = [(s.tensor, s.dim) for s in GROUP.slices]
    lengths = {place: shapes[place[0]][place[1]] for place in places}
    statistics = ("mean_abs", "mean_square", "nonzero")
    evidence = Evidence(
        products={p: torch.randn(4, n, generator=draw) for p, n in lengths.items()},
        curvatures={p: torch.rand(n, generator=draw) for p, n in lengths.items()},
        activations={
            name: {key: torch.rand(n, generator=draw) for key in statistics}
            for name, n in (("second.weight", 6), ("head.weight", 24))
        },
        correlations={
            (s.tensor, "first"): (
                torch.as_tensor(s.index[:, 0]),
                torch.cov(torch.randn(6, 40, generator=draw)),
            )
            for s in GROUP.slices
            if s.role == "input"
        },
    )
    return Case(tensors, evidence)


@pytest.mark.parametrize("name", plugins.names("criteria"))
class TestContract:
    def test_gives_one_finite_score_per_channel(self, name: str, case: Case) -> None:
        scores = plugins.create("criteria", name)(case.view())
        assert scores.shape == (6,)
        assert torch.isfinite(scores).all()
        assert isinstance(plugins.create("criteria", name), Criterion)

    def test_permuting_channels_permutes_scores(self, name: str, case: Case) -> None:
        if name == "random":
            pytest.skip("random scores belong to places, not to weights")
        criterion = plugins.create("criteria", name)
        order = torch.tensor([4, 0, 5, 2, 1, 3])
        torch.testing.assert_close(criterion(case.view(order)), criterion(case.view())[order])

    def test_leaves_weights_and_random_state_alone(self, name: str, case: Case) -> None:
        before = {key: value.clone() for key, value in case.tensors.items()}
        state = torch.get_rng_state()
        plugins.create("criteria", name)(case.view())
        assert all(torch.equal(before[key], value) for key, value in case.tensors.items())
        assert torch.equal(state, torch.get_rng_state())

    def test_gives_the_same_scores_again(self, name: str, case: Case) -> None:
        first, second = (plugins.create("criteria", name)(case.view()) for _ in range(2))
        assert torch.equal(first, second)

    def test_cites_its_source_or_says_what_it_is(self, name: str, case: Case) -> None:
        text = plugins.documentation("criteria", name)
        assert text.splitlines()[0].endswith(".")
        assert "Source:" in text or name == "random"


def weights_of(case: Case, unit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the filter and the two columns of one unit, read in another way than the view."""
    columns = case.tensors["head.weight"].reshape(4, 6, 4)[:, unit]
    return case.tensors["first.weight"][unit], case.tensors["second.weight"][:, unit], columns


def test_l1_is_the_sum_of_magnitudes(case: Case) -> None:
    expected = [weights_of(case, unit)[0].abs().sum().item() for unit in range(6)]
    assert plugins.create("criteria", "l1")(case.view()).tolist() == pytest.approx(expected)


def test_l2_over_filters_and_columns_is_the_mean_of_their_norms(case: Case) -> None:
    expected = [
        sum(w.square().sum().sqrt().item() for w in weights_of(case, u)) / 3 for u in range(6)
    ]
    both = plugins.create("criteria", {"l2": {"weights": "both"}})
    assert both(case.view()).tolist() == pytest.approx(expected)


def test_l2_over_columns_sees_consumers_only(case: Case) -> None:
    expected = [
        sum(w.square().sum().sqrt().item() for w in weights_of(case, u)[1:]) for u in range(6)
    ]
    columns = plugins.create("criteria", {"l2": {"weights": "columns", "reduce": "sum"}})
    assert columns(case.view()).tolist() == pytest.approx(expected)


def test_bn_scale_is_the_magnitude_of_the_scale(case: Case) -> None:
    scores = plugins.create("criteria", "bn_scale")(case.view())
    torch.testing.assert_close(scores, case.tensors["bn.weight"].abs())


def test_bn_scale_without_norm_is_the_norm_of_the_filters(case: Case) -> None:
    view = ChannelGroup(GROUP, case.tensors)
    scores = plugins.create("criteria", "bn_scale")(view)
    torch.testing.assert_close(scores, case.tensors["first.weight"].flatten(1).norm(dim=1))


def test_geometric_median_is_lowest_in_the_middle(case: Case) -> None:
    line = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 10.0])
    tensors = case.tensors | {"first.weight": line.reshape(6, 1, 1, 1)}
    scores = plugins.create("criteria", "geometric_median")(ChannelGroup(GROUP, tensors))
    assert scores.tolist() == pytest.approx([20, 16, 14, 14, 16, 40])


def test_lamp_divides_each_square_by_those_not_smaller(case: Case) -> None:
    norms = torch.tensor([1.0, 2.0, 3.0, 0.5, 1.0, 0.0])
    tensors = case.tensors | {"first.weight": norms.reshape(6, 1, 1, 1)}
    scores = plugins.create("criteria", "lamp")(ChannelGroup(GROUP, tensors))
    expected = [1 / 14, 4 / 13, 1, 0.25 / 15.25, 1 / 15, 0]
    assert scores.tolist() == pytest.approx(expected)


def test_taylor_adds_consumers_before_it_squares(case: Case) -> None:
    products = case.evidence.products
    change = products["second.weight", 1] + products["head.weight", 1].reshape(4, 6, 4).sum(2)
    scores = plugins.create("criteria", "taylor")(case.view())
    torch.testing.assert_close(scores, change.square().mean(0))
    magnitude = plugins.create("criteria", {"taylor": {"power": "magnitude"}})(case.view())
    torch.testing.assert_close(magnitude, change.abs().mean(0))


def test_fisher_scores_like_squared_taylor_what_it_is_shown(case: Case) -> None:
    scores = plugins.create("criteria", "fisher")(case.view())
    torch.testing.assert_close(scores, plugins.create("criteria", "taylor")(case.view()))


def test_obs_scores_by_what_a_fit_of_the_others_cannot_replace(case: Case) -> None:
    """The oracle solves for the weights left from scratch, for every candidate at every step."""
    scores = plugins.create("criteria", "obs")(case.view())
    alone = plugins.create("criteria", "fisher")(case.view()).double()
    parts = []
    for reader in case.view().readers():
        matrix = reader.correlations.double()
        metric = matrix + 1e-2 * matrix.diagonal().mean() * torch.eye(6)
        parts.append((metric, matrix, reader.weights.double(), reader.changes.double()))
    assert len(parts) == 2

    def error(metric: Tensor, weights: Tensor, gone: list[int]) -> Tensor:
        left = [unit for unit in range(6) if unit not in gone]
        taken = torch.linalg.solve(metric[left][:, left], metric[left][:, gone] @ weights[gone])
        change = torch.zeros_like(weights)
        change[left], change[gone] = taken, -weights[gone]
        return (change.T @ metric @ change).trace()

    gone: list[int] = []
    last = 0.0
    for _ in range(6):
        costs = {}
        for unit in set(range(6)) - set(gone):
            total = weight = torch.tensor(0.0)
            for metric, matrix, weights, changes in parts:
                lost = error(metric, weights, [*gone, unit]) - error(metric, weights, gone)
                share = lost / (weights[unit].square().sum() * matrix[unit, unit])
                own = changes[:, unit].square().mean()
                total, weight = total + own * share, weight + own
            costs[unit] = float(alone[unit] * total / weight)
        unit = min(costs, key=costs.__getitem__)
        last = max(last, costs[unit])
        assert scores[unit].item() == pytest.approx(last, rel=1e-5)
        gone.append(unit)
    assert scores.argsort().tolist() == gone


def test_obs_spares_one_of_two_equal_channels(case: Case) -> None:
    for positions, matrix in case.evidence.correlations.values():
        assert len(positions) == 6
        matrix[1], matrix[:, 1] = matrix[0].clone(), matrix[:, 0].clone()
        matrix[1, 1] = matrix[0, 0]
    scores = plugins.create("criteria", "obs")(case.view())
    alone = plugins.create("criteria", "fisher")(case.view())
    first, second = sorted((scores[:2] / alone[:2]).tolist())
    assert first < 0.1 < second


def test_hessian_adds_the_curvature_of_all_its_weights(case: Case) -> None:
    table = case.evidence.curvatures
    head = table["head.weight", 1].reshape(6, 4).sum(1)
    expected = table["first.weight", 0] + table["second.weight", 1] + head
    torch.testing.assert_close(plugins.create("criteria", "hessian")(case.view()), expected)


def test_activation_averages_over_consumers_and_positions(case: Case) -> None:
    seen = case.evidence.activations
    flattened = seen["head.weight"]["mean_abs"].reshape(6, 4).mean(1)
    expected = (seen["second.weight"]["mean_abs"] + flattened) / 2
    scores = plugins.create("criteria", {"activation": {"statistic": "mean_abs"}})(case.view())
    torch.testing.assert_close(scores, expected)


def test_activation_contribution_weighs_values_by_the_weights_that_read_them(case: Case) -> None:
    seen, tensors = case.evidence.activations, case.tensors
    second = seen["second.weight"]["mean_square"] * tensors["second.weight"].square().sum((0, 2, 3))
    head = seen["head.weight"]["mean_square"] * tensors["head.weight"].square().sum(0)
    expected = (second.sqrt() + head.reshape(6, 4).sum(1).sqrt()) / 2
    contribution = plugins.create("criteria", {"activation": {"statistic": "contribution"}})
    torch.testing.assert_close(contribution(case.view()), expected)


def test_random_follows_its_seed_and_the_group_name(case: Case) -> None:
    def scores(seed: int, name: str) -> list[float]:
        group = Group(name, 6, GROUP.slices)
        criterion = plugins.create("criteria", {"random": {"seed": seed}})
        return list(criterion(ChannelGroup(group, case.tensors)).tolist())

    assert scores(0, "a") == scores(0, "a")
    assert scores(0, "a") != scores(1, "a")
    assert scores(0, "a") != scores(0, "b")


@pytest.mark.parametrize(
    ("how", "expected"),
    [("mean", [2.0, 3.0]), ("sum", [4.0, 6.0]), ("max", [3.0, 5.0]), ("min", [1.0, 1.0]),
     ("product", [3.0, 5.0])],
)  # fmt: skip
def test_reductions_over_layers(how: str, expected: list[float]) -> None:
    rows = [torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0])]
    assert reduced(rows, how).tolist() == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("talyor", "no such criterion 'talyor'. Did you mean 'taylor'?"),
        ({"taylor": {"powr": 1}}, "criterion 'taylor' has no option 'powr'. Did you mean 'power'?"),
        ({"taylor": {"power": "cube"}}, "power is 'cube'. Expected square, magnitude"),
        ({"taylor": {"images_per_gradient": 0}}, "images_per_gradient must be at least 1"),
        ({"fisher": {"temperature": 0}}, "temperature must be above 0"),
        ({"fisher": {"images_per_gradient": 0}}, "images_per_gradient must be at least 1"),
        (
            {"activation": {"statistic": "median"}},
            "statistic is 'median'. Expected mean_abs, nonz",
        ),
        ({"l2": {"weights": "rows"}}, "weights is 'rows'. Expected filters, columns, both"),
        ({"l2": {"reduce": "median"}}, "reduce is 'median'. Expected mean, sum, max, min, product"),
    ],
)
def test_bad_references_say_what_is_wrong(reference: object, message: str) -> None:
    with pytest.raises((UnknownNameError, UsageError)) as caught:
        plugins.create("criteria", reference)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_criterion_made_by_hand_knows_its_choices() -> None:
    with pytest.raises(ValueError, match="power must be square or magnitude, not 'cube'"):
        plugins.plugin_class("criteria", "taylor")(power="cube")


def test_depthwise_filters_are_read_along_their_own_dimension() -> None:
    layer = nn.Conv2d(6, 6, 3, groups=6)
    group = Group("depthwise", 6, (across("weight", 0, "output", 6),))
    filters = ChannelGroup(group, dict(layer.named_parameters())).filters()
    assert torch.equal(filters[0], layer.weight.flatten(1))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("shape", [(7, 5, 3, 3), (6, 11), (5, 4, 3), (9,)])
@pytest.mark.parametrize("cached", [1, 64, 1 << 18])
def test_norms_are_those_of_a_plain_reduction(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], power: int, cached: int
) -> None:
    monkeypatch.setattr(criteria, "_CACHED", cached)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for dim in range(min(2, tensor.ndim)):
        others = [other for other in range(tensor.ndim) if other != dim]
        expected = torch.linalg.vector_norm(tensor, power, dim=others) if others else tensor.abs()
        torch.testing.assert_close(criteria.norms_along(tensor, dim, power), expected)
