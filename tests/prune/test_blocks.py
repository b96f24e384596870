"""Blocks fitted together come closer to the original, on images not seen too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
import zoo
from torch import Tensor, nn

import compress
from compress.errors import UsageError
from compress.models.cifar import CifarResNet
from compress.prune import refit, refit_blocks
from compress.prune.blocks import _blocks


def images(count: int, seed: int = 0, side: int = 16) -> list[tuple[Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(32, 3, side, side, generator=draw),) for _ in range(count)]


def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = CifarResNet(8, 10, 3, 16)
    zoo.randomize(model)
    return model.eval()


def errors(pruned: nn.Module, original: nn.Module, plan: compress.PrunePlan) -> list[float]:
    """Return the error of each block's answer on images not seen, as a share of its power."""
    ((x,),) = images(1, seed=9)
    found = []
    for block in _blocks(pruned, original, plan, x[:1]):
        names = {n for n, module in original.named_modules() if module is block.before[-1]}
        (got,), (wanted,) = (_answers(net, names, x).values() for net in (pruned, original))
        wanted = wanted if block.kept is None else wanted[:, torch.as_tensor(block.kept)]
        found.append(float((got - wanted).square().sum() / wanted.square().sum()))
    return found


def test_blocks_fitted_together_come_closer_than_layers_fitted_alone() -> None:
    model, shown = resnet(), images(8)
    plan = compress.plan_pruning(model, shown[0][0][:1], keep_macs=0.5)
    pruned = compress.apply_pruning(model, plan)
    refit(pruned, model, plan, shown)
    alone = errors(pruned, model, plan)
    flags = [p.requires_grad for p in pruned.parameters()]
    assert refit_blocks(pruned, model, plan, shown, steps=60) is pruned
    together = errors(pruned, model, plan)
    assert len(together) == 3
    assert all(now < before for now, before in zip(together, alone, strict=True))
    assert sum(together) < 0.95 * sum(alone)
    assert [p.requires_grad for p in pruned.parameters()] == flags
    assert all(p.grad is None for p in pruned.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pruned.modules())


def test_the_channels_of_a_block_are_those_of_the_masked_original() -> None:
    """A wrong order would teach a block another function, and nothing else would show it."""
    single = [name for name, difficulty in zoo.ZOO.items() if len(difficulty.shapes) == 1]
    assert sum(map(_compared, single)) >= 40  # networks that have a block


def _compared(name: str) -> bool:
    """Return whether a network has blocks, once those cut answer as those masked do."""
    model, (x,) = zoo.build(name), zoo.inputs(name)
    plan = compress.plan_pruning(model, x[:1], keep_channels=0.6)
    pruned, masked = compress.apply_pruning(model, plan), compress.mask_pruning(model, plan)
    blocks = _blocks(pruned, model, plan, x[:1])
    return bool(_same(model, pruned, masked, blocks, x, name))


def _same(
    model: nn.Module, pruned: nn.Module, masked: nn.Module, blocks: Any, x: Tensor, told: str
) -> set[str]:
    """Return the names of the blocks, once those cut answer as those masked do."""
    by_id = {id(block.before[-1]): block for block in blocks}
    names = {name: by_id[id(m)] for name, m in model.named_modules() if id(m) in by_id}
    cut, left = (_answers(net, set(names), x) for net in (pruned, masked))
    for place, block in names.items():
        kept = slice(None) if block.kept is None else torch.as_tensor(block.kept)
        torch.testing.assert_close(
            cut[place], left[place][:, kept], rtol=1e-3, atol=1e-4, msg=f"{told}: {place}"
        )
    return set(names)


class Fire(nn.Module):
    """Two branches of a squeezed tensor, side by side, shuffled or not."""

    def __init__(self, before: int, width: int, *, shuffled: bool = False) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(before, width // 2, 1)
        self.one = nn.Conv2d(width // 2, width, 1)
        self.three = nn.Conv2d(width // 2, width, 3, padding=1)
        self.shuffled = shuffled

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        joined = torch.cat([self.one(x).relu(), self.three(x).relu()], 1)
        return nn.functional.channel_shuffle(joined, 2) if self.shuffled else joined


def fires() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        Fire(8, 8),  # pooling, then a layer
        nn.MaxPool2d(2),
        Fire(16, 12),  # BatchNorm
        nn.BatchNorm2d(24),
        nn.ReLU(),
        Fire(24, 12, shuffled=True),  # a layer, inside the next block
        Fire(24, 16),  # pooling, flattening, a layer
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).eval()


def test_a_block_of_branches_is_ordered_by_what_reads_it() -> None:
    model, (x,) = fires(), images(1)[0]
    plan = compress.plan_pruning(model, x[:1], keep_channels=0.6)
    pruned, masked = compress.apply_pruning(model, plan), compress.mask_pruning(model, plan)
    blocks = _blocks(pruned, model, plan, x[:1])
    names = {name for name, m in model.named_modules() for b in blocks if m is b.before[-1]}
    assert names == {"1", "3", "6", "7"}
    assert all(block.kept is not None for block in blocks)
    assert _same(model, pruned, masked, blocks, x, "fires") == names


class Dense(nn.Module):
    """A layer of a DenseNet: it gets a list, and by its name what is not in it."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(before)
        self.one = nn.Conv2d(before, 16, 1)
        self.three = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, parts: list[Tensor], *, image: Tensor) -> Tensor:
        x = self.norm(torch.cat([*parts, image], 1)).relu_()
        return self.three(self.one(x).relu_())


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second, self.head = Dense(11), Dense(19), nn.Conv2d(24, 10, 16)
        zoo.randomize(self)

    def forward(self, image: Tensor) -> Tensor:
        parts = [self.stem(image)]
        for layer in (self.first, self.second):
            parts.append(layer(parts, image=image))
        return self.head(torch.cat(parts, 1)).flatten(1)


def test_blocks_that_get_several_tensors_are_fitted() -> None:
    model, shown = DenseNet().eval(), images(4)
    plan = compress.plan_pruning(model, shown[0][0][:1], keep_macs=0.5)
    pruned = compress.apply_pruning(model, plan)
    refit(pruned, model, plan, shown)
    alone = errors(pruned, model, plan)
    refit_blocks(pruned, model, plan, shown, steps=60)
    together = errors(pruned, model, plan)
    assert len(together) == 2
    assert sum(together) < 0.95 * sum(alone)


def chain() -> nn.Module:
    """Fourteen layers in one Sequential, as a VGG has them, three of them in a block."""
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1)]
    for number in range(10):
        parts += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
        parts += [Fire(8, 4)] if number == 4 else []
    return nn.Sequential(nn.Sequential(*parts), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_long_chain_is_fitted_in_portions() -> None:
    model, (x,) = chain().eval(), images(1)[0]
    plan = compress.plan_pruning(model, x[:1], keep_channels=0.6)
    pruned, masked = compress.apply_pruning(model, plan), compress.mask_pruning(model, plan)
    blocks = _blocks(pruned, model, plan, x[:1])
    parts = [[type(part).__name__ for part in block.before] for block in blocks]
    assert [names.count("Conv2d") for names in parts] == [6, 4]
    assert ["Fire" in names for names in parts] == [False, True]
    assert all(len(part.weight) < 8 for part in blocks[0].parts if isinstance(part, nn.Conv2d))
    assert len(_same(model, pruned, masked, blocks, x, "chain")) == 2


def test_a_block_that_nothing_orders_is_left_out() -> None:
    model, (x,) = nn.Sequential(fires()[:2], nn.Tanh(), nn.Conv2d(16, 4, 1)).eval(), images(1)[0]
    plan = compress.plan_pruning(model, x[:1], keep_channels=0.6)
    assert _blocks(compress.apply_pruning(model, plan), model, plan, x[:1]) == []


def _answers(model: nn.Module, names: set[str], x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, answer, name=name: found.update({name: answer.clone()})
        )
        for name in names
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def test_a_network_that_lost_nothing_stays_as_it_is() -> None:
    model, ((x,),) = resnet(), images(1)
    plan = compress.plan_pruning(model, x[:1], keep_channels=1.0)
    pruned = compress.apply_pruning(model, plan)
    refit_blocks(pruned, model, plan, images(2), steps=5)
    for name, weight in pruned.named_parameters():
        if weight.ndim > 1:  # BatchNorm's statistics are those of the images now
            assert torch.equal(weight, model.get_parameter(name)), name
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-3, atol=1e-4)


def test_a_network_without_blocks_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    plan = compress.plan_pruning(model, torch.zeros(1, 3, 16, 16), keep_channels=0.5)
    with pytest.raises(UsageError, match="no block can be fitted"):
        refit_blocks(compress.apply_pruning(model, plan), model, plan, images(1))


def test_a_network_without_blocks_is_refused_before_it_is_scored() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    with pytest.raises(UsageError, match="no block can be fitted"):
        compress.prune(
            model,
            (1, 3, 16, 16),
            batches=images(1),
            criterion="no such",
            keep_macs=0.5,
            refit_steps=5,
        )


@pytest.mark.parametrize("options", [{"refit": False, "batches": images(1)}, {}])
def test_steps_without_what_they_go_on_from_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="refit_steps goes on from what refit found"):
        compress.prune(resnet(), torch.zeros(1, 3, 16, 16), keep_macs=0.5, refit_steps=5, **options)


RECIPE = {
    "model": {"name": "compress.models.cifar:resnet8", "options": {"in_channels": 1, "width": 4}},
    "data": {"name": "digits", "calibration": 32},
    "stages": [{"prune": {"criterion": "l1", "keep_macs": 0.5, "refit_steps": 2}}],
    "targets": [],
}


def test_a_recipe_fits_blocks_and_says_what_that_brought(compress: Any, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(RECIPE))
    code, _, err = compress("run", recipe, "--out", out)
    assert code == 0, err
    metrics = json.loads((out / "01-prune" / "metrics.json").read_text())
    told = metrics["facts"]["validation_top1_pct"]
    assert list(told) == ["before", "cut", "refitted", "blocks refitted"]
