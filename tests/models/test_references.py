"""References to networks in code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress import models
from compress.errors import ModelError
from compress.models import cifar, load_model
from compress.models.references import classifier_layers, replace_head


def test_a_reference_written_before_the_networks_moved_still_opens() -> None:
    former = "compress." + "networks:resnet8"
    model = models.load_model(former, num_classes=10)
    assert type(model) is type(cifar.resnet8())


def test_a_new_head_gives_other_classes_and_keeps_every_other_weight():
    from torchvision.models import resnet18

    model = resnet18(num_classes=7)
    new = replace_head(model, 3).eval()
    assert new(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert model.fc.out_features == 7  # untouched
    before = model.state_dict()
    for name, value in new.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(value, before[name]), name


def test_a_classifier_of_1x1_convolutions_is_replaced_too():
    from torchvision.models import squeezenet1_1

    new = replace_head(squeezenet1_1(num_classes=6), 4)
    assert new(torch.zeros(1, 3, 64, 64)).shape == (1, 4)
    assert new.num_classes == 4


def test_auxiliary_heads_are_replaced_with_the_main_one():
    from torchvision.models import googlenet

    model = googlenet(num_classes=6, aux_logits=True, init_weights=False)
    new = replace_head(model, 4).train()
    assert classifier_layers(model) == ["fc", "aux1.fc2", "aux2.fc2"]
    assert [tuple(part.shape) for part in new(torch.zeros(2, 3, 96, 96))] == [(2, 4)] * 3


def test_a_fitting_head_keeps_its_weights():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    assert torch.equal(replace_head(model, 5)[1].weight, model[1].weight)


def test_a_network_without_a_head_is_refused():
    with pytest.raises(ModelError, match="no linear layer or 1x1 convolution that could be the cl"):
        replace_head(nn.Sequential(nn.Conv2d(3, 4, 3)), 2)


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("compress.networks:resnet8", "compress.models.cifar:resnet8"),
        ("compress.detector:detector", "compress.models.detector:detector"),
        ("compress.models.restoration:generator", "compress.models.cifar:generator"),
    ],
)
def test_names_that_modules_had_when_runs_were_written_still_lead_to_their_networks(former, now):
    assert type(load_model(former)) is type(load_model(now))
