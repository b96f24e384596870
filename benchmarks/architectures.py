"""Prune real architectures of other packages and say what went wrong with each.

    python benchmarks/architectures.py [--networks WORD ...] [--folder benchmarks/results]
    python benchmarks/architectures.py --families --until reload

Each network gets random weights and random BatchNorm statistics and goes through these steps, in a
process of its own with one thread: plan to half the MACs (l2), cut, proof in float64 (equal to the
masked reference to 1e-8), save, reload (equal outputs), export to ONNX (equal in ONNX Runtime,
which export checks). A row holds the first step that failed and why. Rows of a file that exists are
kept, so that a run that was stopped goes on; ``--again`` tries them anew and ``--seconds`` ends it
in between. ``--until reload`` leaves out the export, which takes most of the time; the row then
says up to which step a network is right. ``--families`` tries networks that nobody picked: the
smallest of each family of timm's CNNs that the list below leaves out.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import resource
import signal
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress import environment
from compress.export import export_onnx
from compress.groups.proof import apply_pruning, prove
from compress.models import load_model, save_model
from compress.prune.plan import plan_pruning

RESULTS = Path(__file__).parent / "results"
KEEP_MACS = 0.5
STEPS = ("reload", "export")  # where a run may end
LIMIT_CPU_S = 400  # for each network: of the processor, so that load does not change the result


@dataclass(frozen=True)
class Architecture:
    """A network of another package: how ``load_model`` builds it, and what it takes."""

    package: str
    reference: str
    options: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (1, 3, 64, 64)

    @property
    def name(self) -> str:
        """Return the constructor and what tells it from others of the same one."""
        words = [str(v) for v in self.options.values() if isinstance(v, str)]
        return " ".join([self.reference, *words])

    @property
    def installed(self) -> bool:
        """Say whether the package can be imported."""
        return find_spec(self.package) is not None


def _timm(side: int, *names: str) -> list[Architecture]:
    return [Architecture("timm", f"timm:{name}", shape=(1, 3, side, side)) for name in names]


def _ultralytics(kind: str, *names: str) -> list[Architecture]:
    reference = f"ultralytics.nn.tasks:{kind}"
    return [
        Architecture("ultralytics", reference, {"cfg": f"{name}.yaml", "verbose": False})
        for name in names
    ]


def _segmentation(encoder: str, *names: str, side: int = 64) -> list[Architecture]:
    options = {"encoder_name": encoder, "encoder_weights": None}
    package, shape = "segmentation_models_pytorch", (1, 3, side, side)
    return [Architecture(package, f"{package}:{name}", dict(options), shape) for name in names]


def _monai(name: str, side: int, **options: Any) -> Architecture:
    shape = (1, 1, side, side)
    return Architecture("monai", f"monai.networks.nets:{name}", options, shape)


def _pytorchcv(side: int, *names: str, **options: Any) -> list[Architecture]:
    package, shape = "pytorchcv", (1, 3, side, side)
    return [Architecture(package, f"{package}.models.{n}", options, shape) for n in names]


def _spandrel(channels: int, *names: str) -> list[Architecture]:
    package, shape = "spandrel", (1, channels, 64, 64)
    return [Architecture(package, f"{package}.architectures.{n}", {}, shape) for n in names]


def _torchvision(names: str, module: str = "models") -> list[Architecture]:
    package, options = "torchvision", {"weights": None, "weights_backbone": None}
    given = options if module == "models.segmentation" else {"weights": None}
    return [Architecture(package, f"{package}.{module}:{n}", given) for n in names.split()]


ARCHITECTURES: tuple[Architecture, ...] = (
    *_timm(
        64,
        *["ecaresnet26t", "resnest14d", "res2net50_26w_4s", "skresnet18"],
        *["cspresnet50", "darknet53"],
        *["dla34", "dpn48b", "ese_vovnet19b_dw", "fbnetc_100", "ghostnet_100", "hardcorenas_a"],
        *["hrnet_w18_small", "lcnet_050", "mixnet_s", "mobileone_s0", "mobilenetv4_conv_small"],
        *["nf_regnet_b0", "nfnet_f0", "pvt_v2_b0", "repvgg_a0", "repghostnet_050", "rexnet_100"],
        *["selecsls42", "semnasnet_075", "tinynet_e", "tf_efficientnetv2_b0", "xception41"],
        *["convnextv2_atto", "edgenext_xx_small", "poolformer_s12", "starnet_s1", "repvit_m0_9"],
        *["shvit_s1", "fasternet_t0", "inception_next_atto", "focalnet_tiny_srf"],
        *["resnet26d", "regnetz_005", "gcresnext26ts"],
    ),
    *_timm(224, *["davit_tiny", "twins_svt_small", "xcit_nano_12_p16_224", "coat_lite_tiny"]),
    *_timm(224, *["mobilevit_xxs", "efficientformer_l1", "levit_128s", "convit_tiny"]),
    *_ultralytics("DetectionModel", *["yolov3-tiny", "yolov5n", "yolov6n", "yolov8n", "yolov9t"]),
    *_ultralytics("DetectionModel", *["yolov10n", "yolo11n", "yolo12n"]),
    *_ultralytics("SegmentationModel", "yolov8n-seg", "yolo11n-seg"),
    *_ultralytics("PoseModel", "yolov8n-pose"),
    *_ultralytics("ClassificationModel", "yolov8n-cls", "yolo11n-cls"),
    *_segmentation("resnet18", *["Unet", "UnetPlusPlus", "Linknet", "FPN"]),
    *_segmentation("resnet18", "PSPNet", "MAnet"),
    *_segmentation("resnet18", "PAN", side=128),
    *_segmentation("resnet18", *["DeepLabV3", "DeepLabV3Plus", "UPerNet"]),
    *_segmentation("mobilenet_v2", "Unet", "FPN", "DeepLabV3Plus"),
    *_segmentation("timm-efficientnet-b0", "Unet"),
    _monai("BasicUNet", 64, spatial_dims=2, in_channels=1, out_channels=2),
    _monai("BasicUNetPlusPlus", 64, spatial_dims=2, in_channels=1, out_channels=2),
    _monai("AttentionUnet", 64, spatial_dims=2, in_channels=1, out_channels=2,
           channels=[16, 32, 64], strides=[2, 2]),
    _monai("UNet", 64, spatial_dims=2, in_channels=1, out_channels=2,
           channels=[16, 32, 64], strides=[2, 2], num_res_units=2),
    _monai("SegResNet", 64, spatial_dims=2, in_channels=1, out_channels=2, init_filters=16),
    _monai("VNet", 64, spatial_dims=2, in_channels=1, out_channels=2),
    _monai("HighResNet", 64, spatial_dims=2, in_channels=1, out_channels=2),
    _monai("DenseNet121", 64, spatial_dims=2, in_channels=1, out_channels=2),
    _monai("SEResNet50", 64, spatial_dims=2, in_channels=1, num_classes=2),
    *_torchvision("resnet18 vgg11_bn squeezenet1_1 shufflenet_v2_x0_5 mnasnet0_5 regnet_y_400mf"),
    *_torchvision("efficientnet_b0 mobilenet_v3_small convnext_tiny densenet121"),
    *_torchvision("deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large", "models.segmentation"),
    *_pytorchcv(32, "nin_cifar:nin_cifar10", "preresnet_cifar:preresnet20_cifar10"),
    *_pytorchcv(32, "densenet_cifar:densenet40_k12_cifar10", "diaresnet_cifar:diaresnet20_cifar10"),
    *_pytorchcv(32, "rir_cifar:rir_cifar10", "xdensenet_cifar:xdensenet40_2_k24_bc_cifar10"),
    *_pytorchcv(32, "shakeshakeresnet_cifar:shakeshakeresnet20_2x16d_cifar10"),
    *_pytorchcv(32, "ror_cifar:ror3_56_cifar10", "pyramidnet_cifar:pyramidnet110_a48_cifar10"),
    *_pytorchcv(224, "squeezenext:sqnxt23_w1", "shufflenet:shufflenet_g3_w1"),
    *_pytorchcv(224, "menet:menet108_8x1_g3", "channelnet:channelnet", "bagnet:bagnet9"),
    *_pytorchcv(224, "condensenet:condensenet74_c4_g4", "bninception:bninception"),
    *_pytorchcv(224, "cbamresnet:cbam_resnet18", "bamresnet:bam_resnet18", "vovnet:vovnet27s"),
    *_pytorchcv(224, "dicenet:dicenet_wd5", "diracnetv2:diracnet18v2", "espnetv2:espnetv2_wd2"),
    *_pytorchcv(224, "hardnet:hardnet39ds", "igcv3:igcv3_wd4", "peleenet:peleenet"),
    *_pytorchcv(224, "ibnresnet:ibn_resnet50", "sepreresnet:sepreresnet10", "scnet:scnet50"),
    *_pytorchcv(224, "sharesnet:sharesnet18", "sparsenet:sparsenet121", "drn:drnc26"),
    *_pytorchcv(224, "airnet:airnet50_1x64d_r16", "airnext:airnext50_32x4d_r2"),
    *_pytorchcv(224, "mobilenet:mobilenet_wd4", "fdmobilenet:fdmobilenet_wd4"),
    *_pytorchcv(224, "proxylessnas:proxylessnas_mobile", "resnesta:resnestabc14"),
    *_pytorchcv(64, "bisenet:bisenet_resnet18_celebamaskhq", in_size=[64, 64]),
    *_pytorchcv(64, "cgnet:cgnet_cityscapes", "dabnet:dabnet_cityscapes", in_size=[64, 64]),
    *_pytorchcv(64, "edanet:edanet_cityscapes", "enet:enet_cityscapes", in_size=[64, 64]),
    *_pytorchcv(64, "erfnet:erfnet_cityscapes", "esnet:esnet_cityscapes", in_size=[64, 64]),
    *_pytorchcv(64, "fpenet:fpenet_cityscapes", "lednet:lednet_cityscapes", in_size=[64, 64]),
    *_pytorchcv(64, "linknet:linknet_cityscapes", "unet:unet_cityscapes", in_size=[64, 64]),
    *_pytorchcv(64, "simplepose_coco:simplepose_resnet18_coco", in_size=[64, 64]),
    *_pytorchcv(64, "centernet:centernet_resnet18_voc", in_size=[64, 64]),
    *_spandrel(1, "DnCNN:DnCNN", "DRUNet:DRUNet"),
    *_spandrel(3, "Compact:Compact", "CRAFT:CRAFT", "DCTLSA:DCTLSA", "DITN:DITN"),
    *_spandrel(3, "ESRGAN:ESRGAN", "FFTformer:FFTformer", "HVICIDNet:HVICIDNet", "KBNet:KBNet_l"),
    *_spandrel(3, "MixDehazeNet:MixDehazeNet", "MoESR:MoESR", "MoSR:MoSR", "NAFNet:NAFNet"),
    *_spandrel(3, "OmniSR:OmniSR", "PLKSR:RealPLKSR", "RCAN:RCAN", "RealCUGAN:UpCunet2x_fast"),
    *_spandrel(3, "RetinexFormer:RetinexFormer", "SCUNet:SCUNet", "SeemoRe:SeemoRe"),
    *_spandrel(3, "SwiftSRGAN:SwiftSRGAN"),
)  # fmt: skip


TRANSFORMERS = frozenset(  # modules of timm
    {"vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "naflexvit"}
    | {"vision_transformer_sam", "beit", "eva", "deit", "cait", "tnt", "volo", "hiera", "pit"}
    | {"hieradet_sam2", "mlp_mixer", "visformer", "sequencer", "swin_transformer", "crossvit"}
    | {"swin_transformer_v2", "swin_transformer_v2_cr", "xcit", "mvitv2", "maxxvit", "csatv2"}
)
LARGEST = 60_000_000  # parameters


def families() -> list[Architecture]:
    """Return the smallest network of each family of timm's CNNs that is not listed above.

    A family is the word that names begin with, in one module of timm. The images have 128 pixels
    a side, or the size that the network fixes.
    """
    import timm

    listed = {each.reference for each in ARCHITECTURES}
    smallest: dict[tuple[str, str], tuple[int, Architecture]] = {}
    for name in timm.list_models():
        module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        word = re.match(r"[a-z]+(?:_?v\d)?", name)
        if word is None or module in TRANSFORMERS or f"timm:{name}" in listed:
            continue
        with torch.device("meta"):
            network = timm.create_model(name).eval()
        size = sum(weight.numel() for weight in network.parameters())
        if size < smallest.get((module, word.group()), (LARGEST,))[0]:
            side = 128 if _runs(network, 128) else network.default_cfg["input_size"][-1]
            (found,) = _timm(side, name)
            smallest[module, word.group()] = size, found
    return [found for _, (_, found) in sorted(smallest.items())]


def _runs(network: nn.Module, side: int) -> bool:
    try:
        network(torch.empty(1, 3, side, side, device="meta"))
    except (RuntimeError, AssertionError):
        return False
    return True


def randomize(model: nn.Module) -> None:
    """Give BatchNorm random statistics and affines: a misaligned one hides behind fresh ones."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)


def tensors(model: nn.Module, image: Tensor) -> list[Tensor]:
    """Return the tensors that a network gives."""
    with torch.no_grad():
        return [t for t in tree_leaves(model(image.clone())) if isinstance(t, Tensor)]


def try_out(architecture: Architecture, until: str = STEPS[-1]) -> dict[str, Any]:
    """Return the row of one network: what is left of it, and the first step that failed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row: dict[str, Any] = {"right": False, "step": "build"}
    start = time.process_time()
    try:
        _steps(architecture, row, until)
    except Exception as error:  # noqa: BLE001 - whatever stops a network is its result
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    row["cpu_s"] = round(time.process_time() - start, 1)
    return row


def _steps(architecture: Architecture, row: dict[str, Any], until: str) -> None:
    model = load_model(architecture.reference, options=architecture.options)
    randomize(model)
    image = torch.rand(architecture.shape)
    row["step"] = "plan"
    start = time.process_time()
    plan = plan_pruning(model, image, criterion="l2", keep_macs=KEEP_MACS)
    row["plan_cpu_s"] = round(time.process_time() - start, 2)
    row["kept_macs"] = round(plan.macs_after / plan.macs_before, 4)
    row["frozen"] = len(plan.frozen)
    row["step"] = "cut"
    small = apply_pruning(model, plan).eval()
    shapes = [t.shape for t in tensors(model, image)]
    if [t.shape for t in tensors(small, image)] != shapes:
        raise ValueError("its outputs have other shapes")
    row["step"] = "prove"
    row["difference"] = prove(model.double(), plan, image.double())
    model.float()
    if not row["difference"] <= 1e-8:
        raise ValueError(f"differs from its masked reference by {row['difference']:.1e}")
    with tempfile.TemporaryDirectory() as folder:
        row["step"] = "save"
        save_model(
            small, folder, reference=architecture.reference, plan=plan, options=architecture.options
        )
        row["step"] = "reload"
        again = load_model(folder).eval()
        pairs = zip(tensors(small, image), tensors(again, image), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise ValueError("the saved network gives something else")
        if until == "export":
            row["step"] = "export"
            export_onnx(small, image, Path(folder) / "model.onnx")
    row["right"] = True


def is_done(row: dict[str, Any] | None, until: str) -> bool:
    """Say whether a row of an earlier run answers how far a network is right."""
    return row is not None and not (row["right"] and row["step"] == "reload" != until)


def _child(pipe: Any, architecture: Architecture, until: str) -> None:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_CPU_S, LIMIT_CPU_S + 1))
    pipe.send(try_out(architecture, until))


def forked(architecture: Architecture, until: str) -> dict[str, Any]:
    """Return the row made in a process of its own."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, architecture, until))
    process.start()
    theirs.close()
    try:
        row = dict(mine.recv())
    except EOFError:
        row = {"right": False, "step": "process", "error": "the process died"}
    process.join()
    if process.exitcode == -signal.SIGXCPU:
        row = {"right": False, "step": "time", "error": f"more than {LIMIT_CPU_S} s of processor"}
    if "error" in row:  # where a package is installed tells nothing
        row["error"] = re.sub(r"/\S*/site-packages/", "", row["error"])
    return row


def table(rows: dict[str, dict[str, Any]], options: str) -> str:
    """Return the results as Markdown."""
    right = sum(row["right"] for row in rows.values())
    lines = [
        "# Real architectures: planned, cut, proved, saved, reloaded, exported",
        "",
        f"{right} of {len(rows)} right in every step that was tried. "
        f"Made by `python benchmarks/architectures.py{options}`,"
        " whose first lines say how.",
        "",
        "| network | right up to | kept MACs | layers that stay | planning CPU s | what failed |",
        "|---|---|--:|--:|--:|---|",
    ]
    for name, row in rows.items():
        failed = "" if row["right"] else f"{row['step']}: {row.get('error', '')[:140]}"
        cells = [row.get(key, "") for key in ("kept_macs", "frozen", "plan_cpu_s")]
        answer = row["step"] if row["right"] else "no"
        text = failed.replace("|", "/").replace("\n", " ")
        lines.append(f"| {name} | {answer} | {cells[0]} | {cells[1]} | {cells[2]} | {text} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=[""], help="parts of names")
    parser.add_argument("--families", action="store_true", help="networks that nobody picked")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--until", choices=STEPS[-2:], default=STEPS[-1])
    parser.add_argument("--seconds", type=float, help="begin no network after this long")
    given = parser.parse_args()
    end = time.monotonic() + (given.seconds or math.inf)
    warnings.simplefilter("ignore")
    given.folder.mkdir(parents=True, exist_ok=True)
    path = given.folder / f"architectures{'_families' * given.families}.json"
    known = json.loads(path.read_text())["networks"] if path.exists() else {}
    for architecture in families() if given.families else ARCHITECTURES:
        name = architecture.name
        if not any(word in name for word in given.networks):
            continue
        if not given.again and is_done(known.get(name), given.until):
            continue
        if time.monotonic() > end:
            break
        if not architecture.installed:
            print(f"{name}: skipped, {architecture.package} is not installed", flush=True)
            continue
        known[name] = forked(architecture, given.until)
        print(name, known[name], flush=True)
        content = {"environment": environment.describe_machine(), "networks": known}
        path.write_text(json.dumps(content, indent=1) + "\n")
        path.with_suffix(".md").write_text(
            table(known, " --families --until reload" * given.families)
        )


if __name__ == "__main__":
    main()
