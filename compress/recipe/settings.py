"""What a recipe may say: one frozen class for each of its parts, with every default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compress import plugins

Fraction = Annotated[float, Field(gt=0, le=1)]  # of what is kept, in (0, 1]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Deviation = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Side = Annotated[int, Field(ge=4, le=32_768)]  # pixels; a typing error would take all memory
FEWEST_CALIBRATION = 8  # images below which int8 ranges would mean nothing
OWN = ".py:"  # in the name of what the user's own file gives
Plugin = str | dict[str, dict[str, Any]]  # a name, or one name with its options

RuntimeName = Annotated[str, Field(json_schema_extra={"examples": plugins.names("runtimes")})]
Precision = Literal["fp32", "fp16", "int8"]


class Settings(BaseModel):
    """A part of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def parts(self, place: str = "") -> Iterator[tuple[str, Settings]]:
        """Yield every part below this one with its key path, such as ``stages[0].distill``."""
        for key in type(self).model_fields:
            value = getattr(self, key)
            several = isinstance(value, tuple)
            for number, part in enumerate(value if several else (value,)):
                if isinstance(part, Settings):
                    at = f"{place}.{key}[{number}]" if several else f"{place}.{key}"
                    yield at.removeprefix("."), part
                    yield from part.parts(at)


class ModelSettings(Settings):
    """The network to start from."""

    name: str = Field(description="MODEL, e.g. torchvision:resnet18 or path/file.py:factory")
    weights: str | None = Field(None, description="Weight file, or the name of published weights")
    num_classes: int | None = Field(
        None, ge=0, description="Classes; the data's if absent; 0: features alone (timm)"
    )
    replace_head: bool = Field(
        False, description="Weights are of other classes: start a new classifier head"
    )
    options: dict[str, Any] = Field({}, description="Further arguments of the constructor")
    input_size: tuple[int, int, int] | None = Field(
        None, description="Channels, height and width to fix dynamic sizes of an ONNX file to"
    )


def data_reference(reference: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a DATA reference stands for.

    It is ``voc:DIR``, ``FILE.npz``, or ``{voc: {root: DIR, labels: classes}}`` with any options.
    """
    if not isinstance(reference, str):
        name, given = next(iter(reference.items()))
        own = {key: each for key, each in (given or {}).items() if key in DataSettings.model_fields}
        others = {key: each for key, each in (given or {}).items() if key not in own}
        return own | {"name": name, "options": own.get("options", {}) | others}
    if OWN in reference:
        return {"name": "dataset", "root": reference.removeprefix("dataset:")}
    if ":" not in reference and reference.endswith((".npy", ".npz")):
        return {"name": "npz", "root": reference}
    name, _, root = reference.partition(":")
    return {"name": name} | ({"root": root} if root else {})


class DataSettings(Settings):
    """The images, how they are prepared, and how they are split."""

    name: str = Field(description="DATA kind: digits, npz, cifar10, imagefolder, ...")
    root: str | None = Field(None, description="Folder or file the images are in")
    image_size: Side | tuple[Side, Side] | None = Field(
        None, description="Side of the network's input, or height and width, pixels"
    )
    options: dict[str, Any] = Field({}, description="Further options of the kind of data")
    channels: Literal[1, 3] | None = Field(None, description="Grey is repeated, colour averaged")
    mean: tuple[Finite, ...] | None = Field(
        None, description="Per channel as the network takes them, of images in input_range"
    )
    std: tuple[Deviation, ...] | None = Field(
        None, description="Per channel as the network takes them, of images in input_range; above 0"
    )
    input_range: tuple[float, float] | None = Field(
        None, description="Values of black and white pixels before mean and std: [0, 1] if absent"
    )
    color: Literal["RGB", "BGR"] | None = Field(
        None, description="Order of the network's channels; RGB if absent"
    )
    layout: Literal["NCHW", "NHWC"] | None = Field(
        None, description="Order of the dimensions of an ONNX file's input; by its shape if absent"
    )
    inputs: dict[str, float | list[Any] | str] | None = Field(
        None,
        description="Values of an ONNX file's additional inputs by name: numbers, or a .npy file",
    )
    batch_size: int = Field(128, ge=1, description="Images in a batch of evaluation")
    workers: int = Field(0, ge=0, description="Processes that decode images read from files")
    shuffle_buffer: int = Field(10_000, ge=1, description="webdataset: images mixed at a time")
    calibration: int = Field(
        512, ge=FEWEST_CALIBRATION, description="Images of train that ranges come from"
    )
    validation: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Share of train held back to choose checkpoints and passes by"
    )

    @model_validator(mode="before")
    @classmethod
    def _kind_with_options(cls, value: Any) -> Any:
        """Accept ``voc:DIR``, or ``{voc: {root: DIR, labels: classes}}`` with all options."""
        if isinstance(value, str):
            return data_reference(value)
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            return value | data_reference(value["name"]) if OWN in value["name"] else value
        if not isinstance(value, dict) or len(value) != 1:
            return value
        name, given = next(iter(value.items()))
        if name in cls.model_fields or not isinstance(given, dict | None):
            return value
        return data_reference(value)


class AugmentSettings(Settings):
    """Random changes of training images; each is off unless asked for."""

    crop_padding: int = Field(0, ge=0, description="Pixels of padding before a random crop")
    flip: bool = Field(False, description="Mirror half of the images left to right")
    rotation_degrees: float = Field(0.0, ge=0, le=180, description="Largest random rotation")
    scale: tuple[float, float] | None = Field(None, description="Range of random zoom factors")
    randaugment: int = Field(0, ge=0, description="RandAugment operations for each image")
    erasing: float = Field(0.0, ge=0, le=1, description="Probability of random erasing")
    mixup: float = Field(0.0, ge=0, description="Alpha of mixup's Beta distribution; 0 = off")
    cutmix: float = Field(0.0, ge=0, description="Alpha of cutmix's Beta distribution; 0 = off")
    fixed: bool = Field(False, description="Augment an image alike in every epoch")


def _rate(sgd: float) -> Any:
    """Return the field of a peak learning rate: ``sgd``, with other optimizers a fiftieth of it.

    Those divide by the size of gradients themselves, which is below one where networks are trained.
    """
    return Field(
        default_factory=lambda given: sgd if given.get("optimizer") == "sgd" else sgd / 50,
        gt=0,
        description=f"Peak learning rate; if absent {sgd:g} with sgd, {sgd / 50:g} with others",
    )


class TrainSettings(Settings):
    """The training loop, whatever the loss."""

    epochs: int = Field(1, ge=0, description="Passes over the training images")
    epoch_images: int | None = Field(None, ge=1, description="Images of an epoch, all if absent")
    batch_size: int = Field(128, ge=1, description="Images in a step, over all processes")
    accumulate: int = Field(
        1, ge=1, description="Gradient-accumulation steps: parts that a batch is computed in"
    )
    halve_batch: bool = Field(
        False, description="When memory runs out, compute batches in more parts and go on"
    )
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = Field(
        "sgd", description="Optimizer of the weights"
    )
    lr: float = _rate(0.05)
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of sgd")
    nesterov: bool = Field(True, description="Nesterov momentum, of sgd")
    weight_decay: float = Field(
        5e-4, ge=0, description="Weight decay (L2) of weights, not of biases and norms"
    )
    l1: float = Field(0.0, ge=0, description="Weight of the L1 norm of the weights in the loss")
    schedule: Literal["constant", "cosine", "step", "one-cycle"] = Field(
        "cosine", description="Learning-rate schedule"
    )
    warmup_epochs: float = Field(0.0, ge=0, description="Epochs of learning-rate warm-up")
    step_epochs: tuple[float, ...] = Field((), description="Epochs at which 'step' cuts the rate")
    step_factor: float = Field(0.1, gt=0, lt=1, description="What 'step' multiplies the rate by")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Label smoothing: share spread over all classes"
    )
    clip_norm: float | None = Field(None, gt=0, description="Gradient clipping: largest norm")
    ema: float | None = Field(
        None, gt=0, lt=1, description="Decay of the exponential moving average (EMA) of the weights"
    )
    patience: int | None = Field(None, ge=1, description="Early stopping: epochs without gain")
    keep: Literal["best", "last"] = Field(
        "last", description="Which checkpoint is the result; best: also that before training"
    )
    augment: AugmentSettings = Field(
        AugmentSettings(), description="Random changes of training images"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Number format of training; auto: bf16 where the device is fast at it"
    )
    channels_last: bool = Field(
        True, description="Memory format NHWC, except for networks that NCHW trains faster"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores if absent")
    deterministic: bool = Field(False, description="Use deterministic kernels only")
    compile: bool = Field(False, description="Run network and teacher compiled by torch.compile")
    sync_batchnorm: bool = Field(
        False, description="Synchronized BatchNorm: statistics over all processes"
    )
    freeze_until: str | None = Field(None, description="Layers before this one are not trained")
    layer_lr: dict[str, float] = Field({}, description="Learning-rate factors, by layer prefix")
    checkpoint_minutes: float = Field(10.0, ge=0, description="Longest time between checkpoints")
    track: Literal["tensorboard", "mlflow"] | None = Field(
        None, description="Also log trainings there: tensorboard or mlflow"
    )


class FinetuneSettings(TrainSettings):
    """Training of a network that knows its task: a cut one, say."""

    lr: float = _rate(0.01)


class QatSettings(TrainSettings):
    """Quantization-aware training: weights move a little, to make up for rounding."""

    lr: float = _rate(1e-3)

    @model_validator(mode="before")
    @classmethod
    def _of_training(cls, given: Any) -> Any:
        return given.model_dump(exclude_unset=True) if isinstance(given, TrainSettings) else given


class DistillSettings(FinetuneSettings):
    """Training towards a teacher."""

    teacher: str | None = Field(None, description="MODEL; the recipe's original if absent")
    teacher_weights: str | None = Field(None, description="Weight file of the teacher")
    teacher_num_classes: int | None = Field(None, ge=2, description="Classes of the teacher")
    teacher_classes: tuple[str, ...] | None = Field(
        None, description="Its class names, in its order"
    )
    teacher_device: str | None = Field(None, description="Where the teacher runs, if elsewhere")
    teacher_image_size: int | None = Field(
        None, ge=4, le=32_768, description="Side of its input, if different"
    )
    losses: tuple[Plugin, ...] | None = Field(
        None, description="Distillation losses, summed; those that suit the task if absent"
    )
    hard: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the true labels")
    loss_warmup_epochs: float = Field(0.0, ge=0, description="Epochs of warm-up of the losses")
    control: bool = Field(
        False, description="Teacher ablation: compare short trainings with and without it"
    )
    cache_teacher: bool = Field(False, description="Keep the teacher's logits on disk")


class PruneSettings(Settings):
    """What to cut, by what measure, and how far."""

    criterion: Plugin = Field("obs", description="Pruning criterion: how channels are scored")
    keep_macs: Fraction | None = Field(
        None, description="Share of the multiply-accumulates to keep"
    )
    keep_params: Fraction | None = Field(None, description="Share of the parameters to keep")
    keep_channels: Fraction | dict[str, Fraction] | None = Field(
        None, description="Share of the channels to keep, of all groups or by layer"
    )
    keep_latency: Fraction | None = Field(
        None, description="Share of the latency on `runtime`; both are timed in turns"
    )
    latency_ms: float | None = Field(None, gt=0, description="Latency limit on `runtime`")
    runtime: RuntimeName = Field("onnxruntime", description="Runtime on which latency is measured")
    ranking: Literal["global", "uniform"] = Field(
        "global", description="Rank channels over all layers, or cut every layer alike"
    )
    normalize: Literal["auto", "per_cost", "none", "mean", "max", "gaussian"] = Field(
        "auto", description="How scores are made comparable across groups"
    )
    round_to: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Keep channels in multiples of this; auto: of 16, of 8 or 4 in narrow layers",
    )
    min_channels: int = Field(1, ge=1, description="Keep at least so many of every group")
    max_cut: Fraction = Field(1.0, description="Largest share of a group's channels that is cut")
    exclude: tuple[str, ...] = Field((), description="Layers that are not cut")
    outputs: tuple[str, ...] | None = Field(
        None, description="Outputs to keep, by index or name; the task's choice if absent"
    )
    rounds: int = Field(
        1, ge=1, description="Prune in so many rounds, with a short training between them"
    )
    round_training: FinetuneSettings | None = Field(None, description="Training between the rounds")
    sparsity_training: TrainSettings | None = Field(
        None, description="Group-sparsity training before the first cut"
    )
    sparsity_strength: float = Field(1e-4, gt=0, description="Weight of the group-sparsity penalty")
    refit: bool = Field(
        True, description="Reconstruction: fit the remaining weights to the original's outputs"
    )
    refit_steps: int = Field(
        0, ge=0, description="Then fit whole blocks together, in so many steps each; 0: do not"
    )
    recalibrate_batches: int = Field(
        16, ge=1, description="Training batches that BatchNorm's statistics are taken from"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> PruneSettings:
        names = ("keep_macs", "keep_params", "keep_channels", "keep_latency", "latency_ms")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(names)}; here: {', '.join(given) or 'none'}"
            )
        if self.refit_steps and not self.refit:
            raise ValueError("refit_steps goes on from what refit found: leave refit on")
        return self


class SparsifySettings(Settings):
    """Which single weights to zero."""

    keep_weights: Fraction | None = Field(None, description="Share kept; not with pattern 2:4")
    pattern: Literal["unstructured", "2:4"] = Field(
        "unstructured", description="Which weights may be zeroed together"
    )
    criterion: Literal["l1", "l2", "lamp", "taylor", "random"] = Field(
        "l1", description="How weights are scored"
    )
    ranking: Literal["global", "uniform"] = Field(
        "global", description="Rank weights over all layers, or in each layer alone"
    )

    @model_validator(mode="after")
    def _one_share(self) -> SparsifySettings:
        if (self.keep_weights is None) != (self.pattern == "2:4"):
            raise ValueError("give keep_weights, or pattern 2:4, which keeps half")
        return self


class QuantizeSettings(Settings):
    """How int8 ranges are found and corrected."""

    method: str = Field("auto", description="Corrections to make; auto keeps those that help")
    observer: Plugin | None = Field(
        None, description="How ranges are chosen (compress list observers); by the method if absent"
    )
    samples: int = Field(512, ge=FEWEST_CALIBRATION, description="Calibration images")
    data: DataSettings | None = Field(
        None, description="Where calibration images come from instead: synthetic, or any DATA"
    )
    max_drop_pct: float | None = Field(None, ge=0, description="Largest loss of top-1, in points")
    max_drop: float | None = Field(
        None, ge=0, description="Largest loss of the task's primary metric, in its unit"
    )
    qat: QatSettings | None = Field(None, description="Quantization-aware training, if given")
    learned_scales: bool = Field(False, description="LSQ: train the scales in qat as well")
    exclude: tuple[str, ...] = Field((), description="ONNX nodes that stay in float")

    @model_validator(mode="after")
    def _one_limit(self) -> QuantizeSettings:
        if self.max_drop is not None and self.max_drop_pct is not None:
            raise ValueError("give max_drop or max_drop_pct, not both")
        return self

    @property
    def drop_limit(self) -> float | None:
        """Largest loss of the primary metric, by either name; None where there is no limit."""
        return self.max_drop if self.max_drop_pct is None else self.max_drop_pct


class Target(Settings):
    """Where the result must run."""

    runtime: RuntimeName = Field(description="Name, or {NAME: {OPTION: VALUE}}")
    options: dict[str, Any] = Field(
        {}, description="Options of the runtime, as compress show runtimes/NAME lists them"
    )
    precision: Precision = Field("int8", description="Number format: fp32, fp16 or int8")
    batch: int = Field(1, ge=1, description="Images in a batch")
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores if absent")
    when_installed: bool = Field(
        False, description="Skip this target, and say so, where it cannot be built for"
    )

    @model_validator(mode="before")
    @classmethod
    def _unfolded(cls, value: Any) -> Any:
        """Take ``runtime: {NAME: {OPTION: VALUE}}`` apart."""
        if not isinstance(value, dict) or not isinstance(value.get("runtime"), dict):
            return value
        if len(value["runtime"]) != 1:
            raise ValueError("runtime names one runtime, as in {openvino: {device: gpu}}")
        name, options = next(iter(value["runtime"].items()))
        parts = (options or {}, value.get("options") or {})
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("the options of a runtime are a mapping: {device: gpu}")
        return {**value, "runtime": name, "options": parts[0] | parts[1]}

    @property
    def reference(self) -> Plugin:
        """The runtime with its options."""
        return {self.runtime: self.options} if self.options else self.runtime


class Gates(Settings):
    """What the result must reach, or the command exits with code 1."""

    metric_drop: float | None = Field(
        None, description="Largest loss of the task's primary metric, in its unit"
    )
    top1_drop_pct: float | None = Field(None, description="Largest loss of top-1, in points")
    speedup: float | None = Field(None, gt=0, description="Smallest speed-up over the original")
    size_ratio: float | None = Field(None, gt=0, description="Smallest original : result size")
    worst_class_drop_pct: float | None = Field(None, description="Largest loss of a class, points")
    agreement_pct: float | None = Field(
        None, description="Smallest agreement with the original's predictions"
    )


AttributionMethod = Literal["grad-cam", "integrated-gradients", "lime", "kernel-shap"]


class MeasureSettings(Settings):
    """How variants are timed and what the report looks into."""

    rounds: int = Field(20, ge=3, description="Interleaved rounds of the latency measurement")
    round_ms: float = Field(50.0, gt=0, description="Time each variant is run for in a round")
    test_images: int | None = Field(
        None, ge=1, description="Measure accuracy on so many test images only, from all over them"
    )
    explain_images: int = Field(0, ge=0, description="Images with attribution maps in the report")
    explain_methods: tuple[AttributionMethod, ...] = Field(
        ("grad-cam", "kernel-shap"),
        description="The first two need gradients and explain the last float network, the others "
        "explain the int8 file that ships, on its runtime",
    )
    sensitivity: bool = Field(
        False, description="Chart of pruning sensitivity: the original with one group cut at a time"
    )


class Stage(Settings):
    """One verb of a recipe with its settings: exactly one of the keys."""

    train: TrainSettings | None = Field(None, description="Train; the result is the original")
    prune: PruneSettings | None = Field(None, description="Cut channels")
    sparsify: SparsifySettings | None = Field(None, description="Zero single weights")
    distill: DistillSettings | None = Field(None, description="Train towards a teacher")
    finetune: FinetuneSettings | None = Field(None, description="Train on the labels alone")
    quantize: QuantizeSettings | None = Field(None, description="Write int8 graphs")

    @model_validator(mode="before")
    @classmethod
    def _one_verb(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {value: {}}
        if isinstance(value, dict):
            if len(value) != 1:
                given_keys = ", ".join(map(str, value)) or "none"
                raise ValueError(
                    f"a stage has exactly one key, such as prune or quantize; here: {given_keys}"
                )
            return {verb: {} if given is None else given for verb, given in value.items()}
        return value

    @property
    def verb(self) -> str:
        """The one key that is given."""
        return next(iter(self.model_fields_set))

    @property
    def settings(self) -> Settings:
        """The settings of that verb."""
        settings: Settings = getattr(self, self.verb)
        return settings


class Recipe(Settings):
    """The whole job: a network, images, what is done to it, where it must run, how good."""

    name: str = Field("", description="Name of the run; the file's name if absent")
    model: ModelSettings
    data: DataSettings
    task: Plugin | None = Field(None, description="What the network is for; the data's if absent")
    seed: int = Field(0, ge=0, lt=2**32)
    stages: tuple[Stage, ...] = ()
    targets: tuple[Target, ...] = ()
    gates: Gates = Gates()
    measure: MeasureSettings = MeasureSettings()

    def placed_stages(self) -> Iterator[tuple[str, Stage]]:
        """Yield each stage with its key path."""
        for number, stage in enumerate(self.stages):
            yield f"stages[{number}].{stage.verb}", stage

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        if name in {".", ".."} or set(name) & set("/\\\0"):
            raise ValueError("the name of a run is that of one folder: no /, no ..")
        return name

    @model_validator(mode="after")
    def _order(self) -> Recipe:
        verbs = [stage.verb for stage in self.stages]
        if "quantize" in verbs[:-1]:
            raise ValueError(
                "quantize must be the last stage: a later stage would train the fp32 network"
            )
        if any(target.precision == "int8" for target in self.targets) and "quantize" not in verbs:
            raise ValueError("a target asks for int8 and no stage is quantize")
        options: dict[tuple[Any, ...], dict[str, Any]] = {}
        for number, target in enumerate(self.targets):
            place = (target.runtime, target.batch, target.threads)
            if options.setdefault(place, target.options) != target.options:
                raise ValueError(
                    f"targets[{number}] has other options of {target.runtime} than one before it, "
                    "and one report tells of one: run them as two recipes, or measure with bench"
                )
        if "sparsify" in verbs:
            after = self.stages[verbs.index("sparsify") + 1 :]
            if "prune" in [stage.verb for stage in after]:
                raise ValueError(
                    "prune must come before sparsify: reconstruction would overwrite the zeros"
                )
            if any(stage.quantize is not None and stage.quantize.qat for stage in after):
                raise ValueError("quantize.qat after sparsify would overwrite the zeros")
        return self
