"""References become networks, weights are read without running code, saved networks come back."""

import os
import pickle
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import nn

from compress import models
from compress.errors import CompressError, ModelError, UnknownNameError, UsageError
from compress.groups.proof import apply_pruning
from compress.models.cifar import resnet8, resnet20
from compress.models.references import check_reference, class_option
from compress.models.weights import read_weights
from compress.prune import plan_pruning

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from torch import nn\n"
        "def factory(num_classes=5, width=4):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(width, num_classes))\n"
        "def plain():\n    return nn.Linear(2, 2)\n"
        "def broken():\n    raise ValueError('no such depth')\n"
        "def text():\n    return 'network'\n"
    )
    return path


def answers(model):
    with torch.no_grad():
        return model.eval()(EXAMPLE)


def test_torchvision_networks_are_built_by_name():
    model = models.load_model("torchvision:squeezenet1_1", num_classes=7)
    assert not model.training
    assert models.check_forward(model, torch.zeros(1, 3, 64, 64)) == (1, 7)


def test_timm_networks_are_built_by_name():
    model = models.load_model("timm:resnet10t", num_classes=3)
    assert models.check_forward(model, torch.zeros(1, 3, 32, 32)) == (1, 3)


def test_a_factory_in_a_file_gets_its_options(network_file):
    model = models.load_model(f"{network_file}:factory", num_classes=3, options={"width": 6})
    assert (model[0].out_channels, model[3].out_features) == (6, 3)
    assert class_option(f"{network_file}:factory") == "num_classes"
    assert class_option(f"{network_file}:plain") is None


@pytest.mark.parametrize(
    ("signature", "options", "built"),
    [
        ("classes=1, **kwargs", {}, (7, {})),  # as in segmentation_models_pytorch
        ("n_classes: int = 2", {}, (7, {})),
        ("**kwargs", {}, (None, {"num_classes": 7})),
        ("classes=('cat', 'dog'), **kwargs", {}, (("cat", "dog"), {"num_classes": 7})),
        ("classes=1, **kwargs", {"classes": 3}, (3, {})),
        ("num_classes=5", {"num_classes": 0}, (0, {})),
        ("width=4", {}, (4, {})),
    ],
)
def test_the_count_of_classes_goes_by_other_names_too(tmp_path, signature, options, built):
    first = signature.partition("=")[0].partition(":")[0].strip().lstrip("*").partition(",")[0]
    more = "kwargs" if "kwargs" in signature else "{}"
    (tmp_path / "net.py").write_text(
        f"from torch import nn\ndef net({signature}):\n    made = nn.Linear(2, 2)\n"
        f"    made.built = ({'None' if first == 'kwargs' else first}, {more})\n    return made\n"
    )
    model = models.load_for(7, f"{tmp_path}/net.py:net", options=options)
    assert model.built == built


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("torchvision:resnet81", UnknownNameError, "no such torchvision network 'resnet81'. Did"),
        ("timm:resnet81", UnknownNameError, "no such timm network 'resnet81'. Did you mean"),
        ("resnet18", UsageError, "'resnet18' is no reference to a network. Expected torchvision:"),
        ("no.such.module:net", ModelError, "no.such.module: cannot be imported"),
        ("none.py:net", ModelError, "none.py: no such file"),
        ("FILE:facto", UnknownNameError, "no such network 'facto'. Did you mean 'factory'?"),
        ("FILE:broken", ModelError, "cannot be built: ValueError('no such depth')"),
        ("FILE:text", ModelError, "returned a str. Expected a torch.nn.Module"),
        ("x.onnx", ModelError, "an ONNX file is not a network that can be trained or pruned"),
    ],
)
def test_references_that_lead_nowhere_say_so(network_file, reference, error, message):
    with pytest.raises(error) as caught:
        models.load_model(reference.replace("FILE", str(network_file)))
    assert message in str(caught.value)


def test_an_option_that_the_constructor_has_not_is_named(network_file):
    with pytest.raises(ModelError, match=r"takes no depth. Expected one of: num_classes, width"):
        models.load_model(f"{network_file}:factory", options={"depth": 3})


def test_checking_a_reference_does_not_build_it(network_file):
    check_reference(f"{network_file}:broken")
    with pytest.raises(UnknownNameError):
        check_reference("torchvision:resnet81")


def test_a_file_that_fails_to_import_is_named(tmp_path):
    (tmp_path / "bad.py").write_text("import no_such_package")
    with pytest.raises(ModelError, match=r"bad.py: importing it fails: ModuleNotFoundError"):
        models.load_model(f"{tmp_path / 'bad.py'}:net")


def _zeros(state):
    """Return other weights of the same shapes: those of the epoch, beside their average."""
    return {key: torch.zeros_like(value) for key, value in state.items()}


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
        lambda state: {"net": state, "acc": np.float64(93.1), "epoch": np.int64(7)},
        lambda state: {"params": _zeros(state), "params_ema": state},
        lambda state: {"state_dict": _zeros(state), "state_dict_ema": state, "arch": "resnet8"},
        lambda state: {"model": _zeros(state), "model_ema": state, "args": Namespace(lr=0.1)},
        lambda state: {"model_state": state, "optimizer": {"state": {0: torch.zeros(2)}}},
        lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}, "loops": {}},
        lambda state: {
            "state_dict": {
                **{f"net.backbone.{k}": v for k, v in state.items()},
                "loss.weight": torch.ones(10),
            }
        },
        lambda state: {
            "n_averaged": torch.tensor(3),
            **{f"module.{k}": v for k, v in state.items()},
        },
        lambda state: {"anything": {f"module._orig_mod.{k}": v for k, v in state.items()}},
        lambda state: {"mean": np.zeros(3), **state},
    ],
    ids=[
        *("plain", "state_dict", "model and module.", "compiled", "net and numpy scalars"),
        *("BasicSR", "timm", "model_ema and Namespace", "model_state", "Lightning"),
        *("Lightning with a loss", "SWA", "one unknown key", "an array beside"),
    ],
)
def test_checkpoints_of_all_forms_fit(tmp_path, wrapped):
    source = resnet8()
    torch.save(wrapped(source.state_dict()), tmp_path / "weights.th")
    model = models.load_model("compress.models.cifar:resnet8", tmp_path / "weights.th")
    assert torch.equal(answers(model), answers(source))


def test_safetensors_fit(tmp_path):
    from safetensors.torch import save_file

    source = resnet8()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = models.load_model("compress.models.cifar:resnet8", tmp_path / "weights.safetensors")
    assert torch.equal(answers(model), answers(source))


class Payload:
    """What an attacker would put into a checkpoint."""

    def __reduce__(self):
        return os.system, ("true",)


def test_a_checkpoint_with_code_is_refused_and_names_it(tmp_path):
    torch.save({"state_dict": {}, "extra": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match=r"refused: .* would run code \(.*system"):
        read_weights(tmp_path / "evil.pth")


def test_a_plain_pickle_with_code_is_refused(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ModelError, match="refused"):
        read_weights(tmp_path / "evil.pt")


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_a_truncated_weight_file_is_named(tmp_path, name):
    from safetensors.torch import save

    whole = tmp_path / "whole.pth"
    torch.save(resnet8().state_dict(), whole)
    content = whole.read_bytes() if name.endswith("pth") else save(resnet8().state_dict())
    (tmp_path / name).write_bytes(content[:1000])
    with pytest.raises(ModelError, match=f"{name}: is not a readable weight file"):
        read_weights(tmp_path / name)


def test_weights_that_do_not_fit_name_the_first_keys(tmp_path):
    torch.save(resnet20().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ModelError) as caught:
        models.load_model("compress.models.cifar:resnet8", tmp_path / "weights.pth")
    assert "layer1.1.conv1.weight is not in the network" in str(caught.value)
    assert "and 69 more" in str(caught.value)


def test_keys_of_a_file_and_the_nearest_are_told(tmp_path):
    state = {f"enc_{key}": value for key, value in resnet8().state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=r"The file has enc_.* nearest to conv1.weight is enc_"):
        models.load_model("compress.models.cifar:resnet8", tmp_path / "weights.pth")


def test_a_file_without_weights_names_its_keys(tmp_path):
    torch.save({"epoch": 3, "history": [0.1]}, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match="holds the keys epoch, history, none of which is"):
        read_weights(tmp_path / "weights.pth")


def test_a_new_head_keeps_its_own_weights_and_takes_the_rest(tmp_path):
    source = resnet8(num_classes=10)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    reference = "compress.models.cifar:resnet8"
    with pytest.raises(ModelError, match=r"linear.weight has shape \(10, 64\), the network \(4"):
        models.load_model(reference, tmp_path / "weights.pth", 4)
    model = models.load_model(reference, tmp_path / "weights.pth", 4, new_head=True)
    assert model.linear.out_features == 4
    assert torch.equal(model.conv1.weight, source.conv1.weight)


class Dense(nn.Module):
    """A head of 3 x 3 behind layers of 1 x 1, as in decoders for segmentation."""

    def __init__(self, num_classes=2):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, num_classes, 3, padding=1)

    def forward(self, x):
        return self.head(self.stem(x))


def test_a_new_head_is_what_has_other_outputs_whatever_layer_that_is(tmp_path, monkeypatch):
    source = Dense(5)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr("compress.models.construct", lambda *_args, **_options: Dense(3))
    model = models.load_model("own:Dense", tmp_path / "weights.pth", 3, new_head=True)
    assert model.head.out_channels == 3 and torch.equal(model.stem.weight, source.stem.weight)


def test_published_weights_of_a_detector_serve_other_classes(monkeypatch):
    from torchvision.models import _api, get_model

    name = "ssdlite320_mobilenet_v3_large"
    published = get_model(name, weights=None, weights_backbone=None, num_classes=91)
    monkeypatch.setattr(
        _api, "load_state_dict_from_url", lambda *_args, **_options: published.state_dict()
    )
    model = models.load_model(f"torchvision:{name}", "COCO_V1", 4)
    own, theirs = model.state_dict(), published.state_dict()
    other = {key for key in own if own[key].shape != theirs[key].shape}
    assert other and all("classification_head" in key for key in other)
    assert all(torch.equal(own[key], theirs[key]) for key in own.keys() - other)
    rows = models.check_forward(model, torch.rand(1, 3, 64, 64))
    assert rows[1] == 4 + 3  # boxes, and the classes without the background


def test_a_missing_weight_file_is_named():
    with pytest.raises(ModelError, match=r"none\.pth: no such file\. Expected a weight file"):
        models.load_model("compress.models.cifar:resnet8", "none.pth")


def test_unknown_published_weights_list_the_known():
    with pytest.raises(UnknownNameError, match="Known: IMAGENET1K_V1"):
        models.load_model("torchvision:resnet18", "IMAGENET1K_V9")


def test_a_forward_that_fails_says_on_what_and_leaves_the_mode():
    model = nn.Linear(3, 2).train()
    with pytest.raises(ModelError, match=r"fails on an input of shape \(1, 3, 8, 8\)"):
        models.check_forward(model, torch.zeros(1, 3, 8, 8))
    assert model.training


class Halving(nn.Module):
    """Adds to an image what it is when halved and enlarged again, as U-Nets do."""

    def __init__(self, times):
        super().__init__()
        self.steps = nn.Sequential(*[nn.Conv2d(3, 3, 3, 2, 1) for _ in range(times)])

    def forward(self, x):
        return x + nn.functional.interpolate(self.steps(x), scale_factor=2 ** len(self.steps))


@pytest.mark.parametrize(
    ("times", "size", "said"),
    [(3, (62, 90), "64 x 96, multiples of 8"), (5, (96, 100), "96 x 128")],
)
def test_the_size_that_a_network_takes_is_told(times, size, said):
    model = Halving(times)
    with pytest.raises(ModelError, match=f"forward pass fails .* It runs at {said}"):
        models.check_forward(model, torch.zeros(1, 3, *size))
    assert models.check_forward(model, torch.zeros(1, 3, 64, 128)) == (1, 3, 64, 128)
    with pytest.raises(ModelError, match="Check the image size and channels"):
        models.check_forward(model, torch.zeros(1, 4, *size))


def test_classes_that_do_not_match_are_counted():
    with pytest.raises(ModelError, match=r"output has shape \(2, 10\) and the data has 7 classes"):
        models.check_classes(resnet8(), EXAMPLE, 7)


def pruned_twice(tmp_path):
    torch.manual_seed(0)
    model = resnet8(num_classes=6)
    first = plan_pruning(model, EXAMPLE[:1], criterion="l1", keep_macs=0.7)
    small = apply_pruning(model, first)
    models.save_model(
        small, tmp_path / "one", plan=first, reference="compress.models.cifar:resnet8"
    )
    second = plan_pruning(small, EXAMPLE[:1], criterion="l1", keep_macs=0.7)
    smaller = apply_pruning(small, second)
    models.save_model(smaller, tmp_path / "two", plan=second, reference=tmp_path / "one")
    return smaller


def test_a_network_pruned_twice_comes_back_in_a_fresh_process_without_pickle(tmp_path):
    smaller = pruned_twice(tmp_path)
    np.save(tmp_path / "input.npy", EXAMPLE.numpy())
    code = (
        "import sys, numpy as np, torch, compress\n"
        "root = sys.argv[1]\n"
        "model = compress.load_model(root + '/two')\n"
        "out = model(torch.from_numpy(np.load(root + '/input.npy')))\n"
        "np.save(root + '/output.npy', out.detach().numpy())\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "output.npy"), answers(smaller), atol=1e-6)
    assert {path.suffix for path in (tmp_path / "two").iterdir()} == {".json", ".safetensors"}


def test_a_run_folder_stands_for_its_last_network(tmp_path):
    model = resnet8()
    models.save_model(model, tmp_path / "00-original", reference="compress.models.cifar:resnet8")
    (tmp_path / "01-quantize").mkdir()
    assert torch.equal(answers(models.load_model(tmp_path)), answers(model))


def test_a_network_that_its_reference_does_not_give_is_not_saved(tmp_path):
    with pytest.raises(ModelError, match="do not give a network of these shapes"):
        models.save_model(resnet20(), tmp_path / "x", reference="compress.models.cifar:resnet8")
    assert not (tmp_path / "x").exists()


def test_a_saved_network_of_another_format_is_refused(tmp_path):
    models.save_model(resnet8(), tmp_path, reference="compress.models.cifar:resnet8")
    path = tmp_path / "model.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ModelError, match="was written in format 2"):
        models.load_model(tmp_path)


SAVED = "compress.models.cifar:resnet8"


@pytest.fixture(scope="module")
def halved():
    model = resnet8(num_classes=7)
    plan = plan_pruning(model, EXAMPLE[:1], criterion="l1", keep_macs=0.5)
    return model, apply_pruning(model, plan), plan


@pytest.mark.parametrize("classes", [None, 7])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
    ],
    ids=["compiled", "DataParallel", "averaged"],
)
def test_what_is_saved_out_of_a_wrapper_is_loaded(halved, tmp_path, wrap, classes):
    _, small, plan = halved
    models.save_model(wrap(small), tmp_path, reference=SAVED, plan=plan, num_classes=classes)
    assert torch.equal(answers(models.load_model(tmp_path)), answers(small))


def test_a_saved_network_has_its_own_number_of_classes(halved, tmp_path):
    _, small, plan = halved
    models.save_model(small, tmp_path, reference=SAVED, plan=plan)
    own = answers(small).shape[1]
    assert answers(models.load_model(tmp_path, num_classes=own)).shape[1] == own
    with pytest.raises(CompressError, match=f"{own + 1}"):
        models.load_model(tmp_path, num_classes=own + 1)


@pytest.mark.parametrize("classes", [None, 7])
@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("plan forgotten", "give plan="),
        ("unpruned", "not pruned"),
        ("another plan", "do not give a network of these shapes"),
        ("another network", "num_classes and options"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(halved, tmp_path, which, message, classes):
    model, small, plan = halved
    other = plan_pruning(model, EXAMPLE[:1], criterion="l1", keep_macs=0.3)
    network, given = {
        "plan forgotten": (small, None),
        "unpruned": (model, plan),
        "another plan": (small, other),
        "another network": (resnet20(num_classes=7), None),
    }[which]
    with pytest.raises(ModelError, match=message):
        models.save_model(network, tmp_path / "x", reference=SAVED, plan=given, num_classes=classes)
    assert not (tmp_path / "x").exists()


def test_a_buffer_that_the_forward_replaces_is_saved(tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.mlp = nn.Conv2d(3, 16, 1), nn.Linear(4, 16)\n"
        "        self.b, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)\n"
        "        self.register_buffer('bias', torch.zeros(1, 16, 1, 1))\n"
        "        self.register_buffer('grid', None)\n"
        "    def forward(self, x):\n"
        "        self.bias = self.mlp(torch.ones(1, 4)).view(1, -1, 1, 1)\n"
        "        self.grid = torch.ones(x.shape[2:])\n"
        "        x = self.b((self.a(x) + self.bias).relu() * self.grid).relu()\n"
        "        return self.head(x.mean((2, 3)))\n"
    )
    reference = f"{tmp_path / 'own.py'}:Net"
    model = models.load_model(reference)
    plan = plan_pruning(model, EXAMPLE[:1], criterion="l1", keep_macs=0.5)
    small = apply_pruning(model, plan)
    for name in ("never run", "run once"):
        models.save_model(small, tmp_path / name, reference=reference, plan=plan)
        assert torch.equal(answers(models.load_model(tmp_path / name)), answers(small))


def test_channels_last_stays(tmp_path):
    model = resnet20().to(memory_format=torch.channels_last)
    plan = plan_pruning(model, EXAMPLE[:1], criterion="l1", keep_macs=0.5)
    small = apply_pruning(model, plan)
    models.save_model(small, tmp_path, reference="compress.models.cifar:resnet20", plan=plan)
    for network in (small, models.load_model(tmp_path)):
        weight = network.layer2[0].conv2.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
