"""Networks come out of wrappers, change their mode and come back, or are refused by name."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from compress.errors import ModelError
from compress.models import check_forward
from compress.models.cifar import resnet8
from compress.modules import evaluating, network_of, set_mode, with_gradients


class ModelEmaV2(nn.Module):
    """As timm keeps an average: the network is called ``module``."""

    def __init__(self, model):
        super().__init__()
        self.module, self.decay = model, 0.99


class ModelEMA:
    """As Ultralytics keeps an average: no module, the network is called ``ema``."""

    def __init__(self, model):
        self.ema, self.updates = model, 0


class EMANet(nn.Module):
    """A network that is named like an average: it has layers beside the module."""

    def __init__(self, model):
        super().__init__()
        self.module, self.head = model, nn.Linear(10, 2)

    def forward(self, x):
        return self.head(self.module(x))


class Trainer:
    def __init__(self, model):
        self.model = model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        ModelEmaV2,
        ModelEMA,
        lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    ],
)
def test_wrappers_are_taken_off(wrap):
    model = resnet8()
    found = network_of(wrap(model))
    assert type(found) is type(model)
    assert list(found.state_dict()) == list(model.state_dict())


def test_a_network_named_like_a_wrapper_stays():
    model = EMANet(resnet8())
    assert network_of(model) is model


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (Trainer(resnet8()), "model.model"),
        ({"state_dict": {}}, "dict"),
        (None, "NoneType"),
        (nn.Module(), "no forward"),
        (nn.Sequential(nn.LazyConv2d(4, 3)), "0.weight has no shape yet"),
    ],
)
def test_what_is_no_network_is_refused_by_name(thing, message):
    with pytest.raises(ModelError, match=message):
        network_of(thing)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "made", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(1, 2))]
)
def test_torchscript_is_refused_inside_a_network_too(made):
    scripted = made(nn.Linear(2, 2))
    for thing in (scripted, nn.Sequential(nn.ReLU(), scripted)):
        with pytest.raises(ModelError, match="TorchScript"):
            network_of(thing)


class Starts(nn.Linear):
    """As ``ultralytics.YOLO``: ``train`` starts a training."""

    def train(self, data=None, **options):
        raise RuntimeError("a training was started")


def test_a_train_that_is_no_switch_is_not_called():
    model = nn.Sequential(Starts(2, 2), nn.Dropout())
    set_mode(model[0], training=False)
    assert not model[0].training
    inner = Starts(2, 2)
    with evaluating(inner):
        assert not inner.training
    assert inner.training


def test_frozen_parts_keep_their_mode():
    model = resnet8().train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    frozen.eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    check_forward(model, torch.zeros(2, 3, 32, 32))
    assert model.training
    assert not frozen.training


def test_gradients_flow_inside_no_grad_and_inference_mode():
    weight = torch.ones(2, requires_grad=True)
    for context in (torch.no_grad, torch.inference_mode):
        with context(), with_gradients():
            assert torch.autograd.grad((weight * 2).sum(), weight)[0].tolist() == [2, 2]


def test_torchs_own_masks_do_not_hide_a_network():
    model = resnet8()
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    torch_prune.l1_unstructured(layer, "weight", 1)
    assert network_of(model) is model
