"""Cut, masked reference and proof; plans as data."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.errors import PlanError, UnknownNameError
from compress.groups import Network, trace
from compress.groups.plan import PrunePlan, make_prune_plan
from compress.groups.proof import apply_pruning, mask_pruning, prove


def random_keep(network: Network, seed: int) -> dict[str, np.ndarray]:
    """Return random units of every group, from one to all of them."""
    rng = np.random.default_rng(seed)
    return {g.name: rng.permutation(g.size)[: rng.integers(1, g.size + 1)] for g in network.groups}


def random_plan(name: str, seed: int = 0) -> PrunePlan:
    network = trace(zoo.build(name), zoo.inputs(name))
    return make_prune_plan(network, random_keep(network, seed), seed=seed)


def answers(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [t.clone() for t in tree_leaves(model(*inputs)) if isinstance(t, Tensor)]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_any_cut_equals_its_masked_reference(name: str) -> None:
    model, inputs = zoo.build(name), zoo.inputs(name)
    network = trace(model, inputs)
    for seed in range(2):
        plan = make_prune_plan(network, random_keep(network, seed))
        assert prove(model, plan, inputs) < 1e-5, f"plan of seed {seed}"


class UnequalChunks(nn.Module):
    """Eight channels in parts of three, three and two, each changed on its own."""

    def __init__(self, chunks: int) -> None:
        super().__init__()
        self.first, self.head, self.chunks = nn.Conv2d(2, 8, 3), nn.Linear(8, 3), chunks
        self.inner = nn.ModuleList(nn.Conv2d(n, n, 1) for n in (3, 3))

    def forward(self, x: Tensor) -> Tensor:
        *whole, last = self.first(x).relu().chunk(self.chunks, dim=1)
        parts = [layer(part) for layer, part in zip(self.inner, whole, strict=True)]
        answer: Tensor = self.head(torch.cat([*parts, last.sin()], 1).mean((2, 3)))
        return answer


def test_parts_of_a_chunk_shrink_alike_where_the_last_is_shorter() -> None:
    torch.manual_seed(0)
    model, x = UnequalChunks(3).eval(), torch.randn(2, 2, 6, 6)
    (group,) = [each for each in trace(model, x).groups if "first" in each.name]
    assert group.size == 2  # the third channel of the first two parts stays
    plan = make_prune_plan(trace(model, x), {group.name: np.array([1])})
    assert prove(model, plan, (x,)) < 1e-5
    assert apply_pruning(model, plan).get_parameter("first.weight").shape[0] == 2 + 2 + 1


class Unpooling(nn.Module):
    """As SegNet: values of the decoder go where the maxima of the encoder were."""

    def __init__(self, conv: type[nn.Conv2d | nn.Conv3d], pool: Any, unpool: Any) -> None:
        super().__init__()
        self.first, self.inner, self.last = conv(2, 6, 1), conv(6, 6, 1), conv(6, 2, 1)
        self.pool, self.unpool = pool(2, return_indices=True), unpool(2)

    def forward(self, x: Tensor) -> Tensor:
        x, places = self.pool(self.first(x))
        answer: Tensor = self.last(self.unpool(self.inner(x).relu(), places))
        return answer


@pytest.mark.parametrize(
    ("layers", "side"),
    [
        ((nn.Conv2d, nn.MaxPool2d, nn.MaxUnpool2d), (8, 8)),
        ((nn.Conv3d, nn.MaxPool3d, nn.MaxUnpool3d), (4, 4, 4)),
        ((nn.Conv1d, nn.MaxPool1d, nn.MaxUnpool1d), (8,)),
    ],
)
def test_places_of_maxima_are_cut_with_what_goes_there(layers: Any, side: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Unpooling(*layers).eval(), torch.randn(2, 2, *side)
    (group,) = trace(model, x).groups  # the encoder's channels and the decoder's, together
    plan = make_prune_plan(trace(model, x), {group.name: np.array([0, 3, 4])})
    assert prove(model, plan, (x,)) < 1e-5
    small = apply_pruning(model, plan)
    assert small.get_parameter("first.weight").shape[0] == 3
    assert small.get_parameter("inner.weight").shape[:2] == (3, 3)


@pytest.mark.parametrize("piece_bytes", [0, 2000], ids=["row by row", "in pieces"])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_large_tensors_are_cut_in_pieces_to_the_same_result(
    name: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = zoo.build(name), random_plan(name)
    at_once = apply_pruning(model, plan).state_dict()
    monkeypatch.setattr("compress.groups.cut._LARGE_BYTES", 0)
    monkeypatch.setattr("compress.groups.cut._PIECE_BYTES", piece_bytes)
    in_pieces = apply_pruning(model, plan).state_dict()
    assert at_once.keys() == in_pieces.keys()
    for key, tensor in at_once.items():
        torch.testing.assert_close(in_pieces[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_cut_changes_the_answers_but_not_their_shapes(name: str) -> None:
    model, inputs = zoo.build(name), zoo.inputs(name)
    small = apply_pruning(model, random_plan(name))
    before, after = answers(model, inputs), answers(small, inputs)
    assert [t.shape for t in before] == [t.shape for t in after]
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_costs_after_the_cut_are_those_of_the_pruned_network(name: str) -> None:
    model, inputs, plan = zoo.build(name), zoo.inputs(name), random_plan(name, seed=1)
    small = apply_pruning(model, plan)
    assert plan.params_before == sum(p.numel() for p in model.parameters())
    assert plan.params_after == sum(p.numel() for p in small.parameters())
    after = trace(small, inputs).macs
    assert after < plan.macs_before
    if name in {"ChannelAttention", "KernelOfOne"}:  # convolutions that slide over fewer channels
        assert after <= plan.macs_after < 1.01 * after
    else:
        assert after == plan.macs_after


@pytest.mark.parametrize("name", zoo.ZOO)
def test_modules_know_their_new_sizes(name: str) -> None:
    small = apply_pruning(zoo.build(name), random_plan(name))
    for module in small.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            first, second = module.in_channels, module.out_channels
            shape = (first, second) if module.transposed else (second, first)
            divided = (shape[0], shape[1] // module.groups)
            assert tuple(module.weight.shape[:2]) == divided
            assert module.bias is None or len(module.bias) == module.out_channels
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            assert module.weight is None or len(module.weight) == module.num_features
        elif isinstance(module, nn.LayerNorm):
            assert module.weight.shape == module.normalized_shape
        elif isinstance(module, nn.GroupNorm):
            assert len(module.weight) == module.num_channels
        elif isinstance(module, nn.PReLU):
            assert module.weight.numel() == module.num_parameters


def _misaligned(plan: PrunePlan, tensor: str) -> PrunePlan:
    """Return ``plan`` with the positions of one tensor shifted by one: all shapes stay right."""
    tensors = {name: dict(dims) for name, dims in plan.tensors.items()}
    size = plan.shapes[tensor][0]
    tensors[tensor][0] = np.sort((tensors[tensor][0] + 1) % size)
    return dataclasses.replace(plan, tensors=tensors)


@pytest.mark.parametrize(
    "tensor",
    ["body.0.bn1.running_mean", "body.0.bn1.weight", "body.0.conv1.bias", "body.0.conv1.weight"],
)
def test_a_wrong_cut_fails_the_proof_though_its_shapes_are_right(tensor: str) -> None:
    model, inputs = zoo.build("Residual"), zoo.inputs("Residual")
    network = trace(model, inputs)
    plan = make_prune_plan(network, {"body.0.conv1": np.arange(0, 12, 2)})
    assert prove(model, plan, inputs) < 1e-5
    wrong = _misaligned(plan, tensor)
    assert answers(apply_pruning(model, wrong), inputs)[0].shape == (2, 5)
    assert prove(model, wrong, inputs) > 1e-3


class FindsNothing(nn.Module):
    """Returns boxes around what is above a threshold, as those that find text: none here."""

    def __init__(self) -> None:
        super().__init__()
        self.body = zoo.conv_bn(3, 8)
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> list[Any]:
        scores = self.last(self.body(x)).sigmoid().detach().numpy()
        return [np.argwhere(each > 2) for each in scores]


def test_what_a_network_that_finds_nothing_looked_in_is_compared() -> None:
    torch.manual_seed(0)
    model, x = FindsNothing().eval(), torch.randn(2, 3, 16, 16)
    network = trace(model, x)
    plan = make_prune_plan(network, {"body.0": np.arange(0, 8, 2)})
    assert prove(model, plan, x) < 1e-5
    assert prove(model, _misaligned(plan, "body.0.weight"), x) > 1e-3


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_twin_is_zero_where_cut_and_unchanged_elsewhere(name: str) -> None:
    model, plan = zoo.build(name), random_plan(name, seed=2)
    before, after = model.state_dict(), mask_pruning(model, plan).state_dict()
    assert before.keys() == after.keys()
    shared = {id(t): n for n, t in reversed(list(model.named_parameters(remove_duplicate=False)))}
    for key, value in before.items():
        first = shared.get(id(dict(model.named_parameters(remove_duplicate=False)).get(key)), key)
        expected = value.clone()
        for dim, kept in plan.tensors.get(first, {}).items() if first not in plan.indices else ():
            gone = np.setdiff1d(np.arange(value.shape[dim]), kept)
            expected.index_fill_(dim, torch.from_numpy(gone), 0)
        assert torch.equal(after[key], expected), key


def test_norms_of_the_twin_count_kept_channels_only() -> None:
    model, inputs = zoo.build("GroupNormed"), zoo.inputs("GroupNormed")
    network = trace(model, inputs)
    plan = make_prune_plan(network, {"body.3": np.arange(8)})
    reference = mask_pruning(model, plan)
    plain = copy.deepcopy(model)
    plain.load_state_dict(reference.state_dict())
    assert (answers(plain, inputs)[0] - answers(reference, inputs)[0]).abs().max() > 1e-3
    assert prove(model, plan, inputs) < 1e-5


@pytest.mark.parametrize("verb", [apply_pruning, mask_pruning], ids=lambda verb: verb.__name__)
def test_the_callers_network_is_left_alone(verb: Any) -> None:
    model, plan = zoo.build("LayerNormed").train(), random_plan("LayerNormed")
    model.stem.eval()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    changed = verb(model, plan)
    with torch.no_grad():
        for parameter in (*changed.parameters(), *changed.buffers()):
            parameter.zero_()
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes == [m.training for m in changed.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert model.body[0].depthwise.groups == 16


def test_the_proof_leaves_network_inputs_and_generators_alone() -> None:
    model, plan, inputs = (
        zoo.build("Residual").train(),
        random_plan("Residual"),
        zoo.inputs("Residual"),
    )
    before, given, random = (
        copy.deepcopy(model.state_dict()),
        inputs[0].clone(),
        torch.get_rng_state(),
    )
    prove(model, plan, inputs)
    assert model.training and torch.equal(given, inputs[0])
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("name", zoo.ZOO)
def test_pruning_a_pruned_network_composes_into_one_plan(name: str) -> None:
    model, inputs = zoo.build(name), zoo.inputs(name)
    first = random_plan(name, seed=3)
    middle = apply_pruning(model, first)
    network = trace(middle, inputs)
    later = make_prune_plan(network, random_keep(network, 4))
    assert prove(middle, later, inputs) < 1e-5
    both = PrunePlan.from_json(first.then(later).to_json())
    small, direct = apply_pruning(middle, later), apply_pruning(model, both)
    for mine, theirs in zip(answers(small, inputs), answers(direct, inputs), strict=True):
        assert torch.equal(mine, theirs)
    assert prove(model, both, inputs) < 1e-5
    assert (both.macs_before, both.macs_after) == (first.macs_before, later.macs_after)


def test_plans_of_another_network_do_not_compose() -> None:
    first = random_plan("Residual", seed=1)
    with pytest.raises(PlanError, match="later plan was made for another network"):
        first.then(first)


@pytest.mark.parametrize("name", ["OptionAShortcut", "Res2NetSlices", "LayerNormed", "ManyGroups"])
def test_a_plan_survives_the_disk_byte_for_byte(name: str, tmp_path: Path) -> None:
    plan = random_plan(name)
    plan.save(tmp_path / "a.json")
    again = PrunePlan.load(tmp_path / "a.json")
    again.save(tmp_path / "b.json")
    random_plan(name).save(tmp_path / "c.json")
    text = (tmp_path / "a.json").read_bytes()
    assert text == (tmp_path / "b.json").read_bytes() == (tmp_path / "c.json").read_bytes()
    assert max(map(len, text.decode().splitlines())) < 400
    inputs = zoo.inputs(name)
    mine, theirs = (apply_pruning(zoo.build(name), p) for p in (plan, again))
    assert torch.equal(answers(mine, inputs)[0], answers(theirs, inputs)[0])


def test_a_plan_replays_on_a_fresh_constructor() -> None:
    plan, inputs = random_plan("OptionAShortcut"), zoo.inputs("OptionAShortcut")
    trained = apply_pruning(zoo.build("OptionAShortcut", seed=0), plan)
    fresh = apply_pruning(zoo.build("OptionAShortcut", seed=7), plan)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(answers(trained, inputs)[0], answers(fresh, inputs)[0])


@pytest.mark.parametrize("name", ["Depthwise", "AuxiliaryHead", "WeightNormed", "SharedWeight"])
def test_a_pruned_network_trains(name: str) -> None:
    small = apply_pruning(zoo.build(name), random_plan(name)).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    out = small(*zoo.inputs(name))
    sum(t.square().mean() for t in tree_leaves(out)).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
    optimizer.step()
    again = copy.deepcopy(small).eval()
    assert all(torch.isfinite(t).all() for t in answers(again, zoo.inputs(name)))


def test_a_shared_weight_stays_shared() -> None:
    small = apply_pruning(zoo.build("SharedWeight"), random_plan("SharedWeight"))
    assert small.first.weight is small.second.weight


def test_a_masked_reference_can_be_copied_and_left_by_an_exception() -> None:
    model, inputs, plan = (
        zoo.build("LayerNormed"),
        zoo.inputs("LayerNormed"),
        random_plan("LayerNormed"),
    )
    reference = mask_pruning(model, plan)
    expected = answers(reference, inputs)[0]
    with pytest.raises(RuntimeError):
        reference(torch.zeros(1, 4, 16, 16))
    assert torch.equal(answers(copy.deepcopy(reference), inputs)[0], expected)
    assert torch.equal(answers(reference, inputs)[0], expected)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"stem.0": []}, r"stem\.0: no channel would be left.*1 to 16 units"),
        ({"stem.0": [0, 16]}, r"stem\.0: .*out of range.*0\.\.15"),
        ({"stem.0": [3, 3]}, r"stem\.0: .*repeated"),
        ({"stem.0": [-1]}, r"stem\.0: .*out of range"),
    ],
    ids=["nothing", "too high", "repeated", "negative"],
)
def test_units_that_cannot_be_kept(keep: dict[str, list[int]], message: str) -> None:
    network = trace(zoo.build("Plain"), zoo.inputs("Plain"))
    with pytest.raises(PlanError, match=message):
        make_prune_plan(network, keep)


def test_a_group_that_does_not_exist_is_named_with_its_neighbours() -> None:
    network = trace(zoo.build("Plain"), zoo.inputs("Plain"))
    message = r"no such group 'stem'\. Did you mean 'stem\.0'.*Known: body"
    with pytest.raises(UnknownNameError, match=message):
        make_prune_plan(network, {"stem": [1]})


def test_what_a_plan_remembers_must_be_json() -> None:
    network = trace(zoo.build("Plain"), zoo.inputs("Plain"))
    with pytest.raises(PlanError, match="is not JSON"):
        make_prune_plan(network, {}, criterion=object())


@pytest.mark.parametrize("verb", [apply_pruning, mask_pruning], ids=lambda verb: verb.__name__)
def test_a_plan_of_another_network_is_refused(verb: Any) -> None:
    plan = random_plan("Residual")
    with pytest.raises(PlanError, match=r"the network has no such tensor"):
        verb(zoo.build("Plain"), plan)
    with pytest.raises(PlanError, match=r"its shape is .* as in the plan"):
        verb(apply_pruning(zoo.build("Residual"), plan), plan)


def _damaged(change: Any) -> Any:
    data = json.loads(json.dumps(random_plan("Plain").to_json()))
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("tensors"), "not a pruning plan: tensors: Field required"),
        (lambda d: d.update(schema=9), "schema: Input should be 1 or 2"),
        (lambda d: d["groups"]["stem.0"].update(kept="0-99"), "not ascending within"),
        (lambda d: d["groups"]["stem.0"].update(kept="5,2"), "not ascending within"),
        (lambda d: d["groups"]["stem.0"].update(kept="all"), "is no row of positions"),
        (lambda d: d["groups"]["stem.0"].update(kept=""), "is no row of positions"),
        (lambda d: d.update(macs=3), "not a pruning plan"),
    ],
    ids=["key", "schema", "range", "order", "text", "empty", "kind"],
)
def test_a_damaged_plan_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(_damaged(change)))
    with pytest.raises(PlanError, match=message) as caught:
        PrunePlan.load(path)
    assert str(path) in str(caught.value)


def test_a_plan_that_is_absent_or_no_json_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.json: cannot be read as JSON"):
        PrunePlan.load(tmp_path / "nowhere.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(PlanError, match=r"text\.json: cannot be read as JSON"):
        PrunePlan.load(tmp_path / "text.json")


@pytest.mark.slow
def test_every_torchvision_cnn_is_cut_and_proved() -> None:
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    cnns = [name for name in names if not name.startswith(("vit", "swin", "maxvit"))]
    assert len(cnns) == 68
    differences = {}
    for name in cnns:
        plain = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
        model = torchvision.models.get_model(name, weights=None, **plain).eval()
        zoo.randomize(model)
        small = name.startswith(("alex", "vgg", "squeeze", "inception", "densenet"))
        side = 224 if small else 64
        image = torch.randn(1, 3, side, side)
        network = trace(model, image)
        differences[name] = prove(model, make_prune_plan(network, random_keep(network, 0)), image)
    assert {name: d for name, d in differences.items() if not d < 1e-4} == {}
