"""The configuration of a detector's training: one TOML preset over these typed fields."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, field_validator, model_validator

from voxelbridge.core.arch.config import EncoderConfig, Triple, cumulative_strides
from voxelbridge.core.arch.init import InitMethod
from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.config import Config
from voxelbridge.core.data.augment import SpatialAugmentation
from voxelbridge.core.data.augment_intensity import IntensityAugmentation
from voxelbridge.core.train.averaging import Averaging, NoAveraging
from voxelbridge.core.train.restart import RestartRule, check_scheme
from voxelbridge.core.train.settings import TrainingSettings

Fraction = Annotated[float, Field(ge=0, le=1)]
# Their probability says whether a transform of intensities takes place at all.
INTENSITY_TRANSFORMS = (
    "noise_probability", "blur_probability", "brightness_probability", "contrast_probability",
    "low_resolution_probability", "inverted_gamma_probability", "gamma_probability",
)  # fmt: skip
# What a checkpoint gives to a detector. The paper's choice is the encoder; with the decoder (a
# pyramid pre-trained with it, for a Retina U-Net) is its ablation.
InitParts = Literal["encoder", "encoder+decoder"]
TuneName = Literal["full", "linear", "lora"]
BestMetric = Literal[
    "auto", "val_case_map_range", "val_case_map_0.10", "val_case_froc_0.10", "val_map_range",
    "val_map_0.10", "val_total",
]  # fmt: skip


class Transfer(Config):
    """How a checkpoint given with `--init` is taken over; without one it means nothing."""

    parts: InitParts = "encoder"
    stem: str = "checkpoint"  # or random, replicate, the name of a stem; see `transfer_encoder`
    # Tensors, or their beginnings up to a dot, that may differ or be missing; "strides".
    allow: tuple[str, ...] = ()
    # Reconciles depth, kernels of 1 and 3, biases and strides of the encoder, and reports each.
    adapt: bool = False


class FullTuning(Config):
    """All weights train, after the schedule's frozen phase."""

    name: Literal["full"] = "full"


class LinearTuning(Config):
    """The encoder stays frozen for the whole run: what is after it trains."""

    name: Literal["linear"] = "linear"


class LowRankTuning(Config):
    """The encoder's convolutions get low-rank updates (LoRA, arXiv 2106.09685), the rest trains."""

    name: Literal["lora"] = "lora"
    rank: PositiveInt = 8  # fewer where a convolution has fewer outputs or inputs
    alpha: Annotated[float, Field(gt=0)] = 16.0  # the update counts alpha / rank times


Tuning = Annotated[FullTuning | LinearTuning | LowRankTuning, Field(discriminator="name")]


class HardNegatives(Config):
    """Which anchors the classification loss sees with hard-negative mining (nnDetection v0.1)."""

    anchors_per_image: PositiveInt = 32  # the budget counts over the whole batch
    positive_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.33  # of the budget, at most
    pool_factor: Annotated[float, Field(ge=1)] = 20.0  # drawn from so many times as hard ones


class RetinaUNetConfig(Config):
    """Retina U-Net after nnDetection v2 (arXiv 2509.15947, section 2.1 and appendix C).

    With the losses, biases and activations of nnDetection v0.1 on request (arXiv 2106.00817).
    """

    name: Literal["retina_unet"] = "retina_unet"
    # Encoder stages whose maps carry anchors, finest first.
    head_levels: tuple[int, ...] = Field(default=(2, 3, 4, 5), min_length=1)
    channels: PositiveInt = 128  # of the pyramid's coarse maps and of the heads
    sizes_per_axis: PositiveInt = 3  # anchors per cell = sizes_per_axis ** 3
    atss_candidates: PositiveInt = 4  # nearest cells per object and level
    neck_init: InitMethod = "kaiming"  # v0.1: torch_default
    upsample_bias: bool = False  # of the pyramid's transposed convolutions; v0.1: true
    head_activation: Literal["leaky_relu", "relu"] = "leaky_relu"  # v0.1: relu
    # focal: over all anchors; hard_negatives (v0.1): cross-entropy over few of them.
    classification_loss: Literal["focal", "hard_negatives"] = "focal"
    box_loss: Literal["l1", "giou"] = "l1"  # on deltas, or on decoded boxes (v0.1)
    focal_gamma: float = 1.0
    focal_alpha: float = 0.75
    hard_negatives: HardNegatives = HardNegatives()
    class_weight: float = 0.3  # of the classification loss in the total
    box_weight: float = 1.0
    dice_smoothing: Annotated[float, Field(ge=0)] = 0.0  # in the numerator; v0.1: 1e-5
    segmentation_weight: float = 1.0  # of (Dice + CE) / 2; 0 leaves the branch untrained
    normalizer_decay: float = 0.7  # moving average of the number of positives (focal only)


class DeformableDETRConfig(Config):
    """Deformable DETR after nnDetection v2 (arXiv 2509.15947, section 2.1 and appendix C)."""

    name: Literal["deformable_detr"] = "deformable_detr"
    # Encoder stages that the transformer reads, finest first.
    head_levels: tuple[int, ...] = Field(default=(2, 3, 4, 5), min_length=1)
    width: PositiveInt = 128
    heads: PositiveInt = 8
    points: PositiveInt = 4  # per head and level
    encoder_blocks: PositiveInt = 3
    decoder_blocks: PositiveInt = 6
    hidden: PositiveInt = 1024  # of the feed-forward layers
    queries: PositiveInt | None = None  # none: those of the store's plan, without a plan 300
    class_prior: Annotated[float, Field(gt=0, lt=1)] = 0.05  # first probability of every class
    # torch_default: first boxes are a little off the proposals (nnDetection v2); zero: on them.
    box_head_init: Literal["torch_default", "zero"] = "torch_default"
    focal_gamma: float = 1.0  # of the loss and of the matching
    focal_alpha: float = 0.75
    # Weights of the losses of the answer, of each earlier block and of the proposals alike.
    class_weight: float = 1.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    class_cost: float = 2.0  # costs decide who is matched with whom
    l1_cost: float = 5.0
    giou_cost: float = 2.0

    @model_validator(mode="after")
    def _divides(self) -> "DeformableDETRConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of the {self.heads} heads")
        if self.width % 4:  # sines and cosines of half the width
            raise ValueError(f"width {self.width} must be a multiple of 4")
        return self


def _detector_name(value: object) -> object:
    """Which detector a table is for; files from before there were two do not say it."""
    if isinstance(value, dict):
        return value.get("name", "retina_unet")
    return getattr(value, "name", None)


DetectorConfig = Annotated[
    Annotated[RetinaUNetConfig, Tag("retina_unet")]
    | Annotated[DeformableDETRConfig, Tag("deformable_detr")],
    Discriminator(_detector_name),
]


class PostProcessing(Config):
    """From raw anchors to boxes, after nnDetection; see `docs/inference.md`.

    Scores and IoUs in [0, 1], sizes in voxels of the stored grid. "Model" means one (model,
    mirroring) pair over all windows of a case, "ensemble" all pairs together.
    """

    candidates_per_patch: PositiveInt = 10_000
    patch_iou: Fraction = 0.6
    boxes_per_patch: PositiveInt = 100
    min_score: Fraction = 0.0  # of a candidate in a patch
    min_size: float = 0.01  # of every side, in the case; in a patch it is 0.01 always
    model_top_k: PositiveInt = 1000
    model_min_score: Fraction = 0.0  # nnDetection: model_score_thresh
    model_iou: Fraction = 0.1  # between the windows of one case
    # weighted: boxes compete by score times trust in their place in the window, which then counts
    # no more; plain: they compete by score, and the trust counts in the clustering.
    suppression: Literal["weighted", "plain"] = "weighted"
    boxes_per_case: PositiveInt = 100
    ensemble_top_k: PositiveInt = 1000
    ensemble_iou: Fraction = 0.5  # weighted box clustering between models and mirrored copies
    ensemble_min_score: Fraction = 0.0  # nnDetection: ensemble_score_thresh


class PlannedStages(Config):
    """Stages of the encoder, finest first, in place of those that the encoder's name stands for."""

    features: tuple[PositiveInt, ...]
    strides: tuple[Triple, ...]  # z, y, x, relative to the stage before
    kernels: tuple[Triple, ...]
    blocks: tuple[PositiveInt, ...] | None = None  # none: those of the encoder's name
    conv_bias: bool | None = None  # none: as the encoder's name says


class DetectConfig(TrainingSettings):
    """Everything a person decides about fine-tuning a detector.

    With `architecture = "plan"`, patch size, head levels and stages are those of the store's plan
    (`build.load_detect_config` fills them in); `encoder` still says which blocks the stages have.
    With `architecture = "checkpoint"`, stages and blocks are those of the checkpoint to begin with.
    """

    encoder: Literal["resenc_l", "plain", "resenc_small", "plain_small"]
    architecture: Literal["preset", "plan", "checkpoint"] = "preset"
    store_plan: Literal["default", "fixed"] | None = None  # rule of the store's plan; none: any
    stages: PlannedStages | None = None
    init: Literal["kaiming", "torch_default"] = "torch_default"
    detector: DetectorConfig = RetinaUNetConfig()
    transfer: Transfer = Transfer()
    tune: Tuning = FullTuning()
    data_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the fold's training patients
    data_fraction_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    object_fraction: Fraction = 0.5  # of a batch's patches that lie on an object
    augmentation: SpatialAugmentation = SpatialAugmentation()
    # Of training patches; a transform whose probability a preset does not name is off.
    intensity: IntensityAugmentation = IntensityAugmentation.none()
    # Voxel labels of cases that have boxes only: none (such batches train without the segmentation
    # losses), or the ellipsoids inscribed in the boxes.
    box_masks: Literal["none", "ellipsoid"] = "none"
    averaging: Averaging = NoAveraging()  # of the weights; what is validated and written then
    restart: RestartRule | None = None  # begin again where nothing improves
    validation_batches: Annotated[int, Field(ge=0)] = 0  # fixed patches; 0: no validation
    validate_every_steps: PositiveInt = 2500
    validate_cases_every_steps: Annotated[int, Field(ge=0)] = 0  # whole cases; 0: never
    validation_cases: PositiveInt = 10  # at most so many of the held-out fold
    # Which figure says that weights are the best; auto: see `Validation.deciding`.
    best_metric: BestMetric = "auto"
    post_processing: PostProcessing = PostProcessing()

    @field_validator("intensity", mode="before")
    @classmethod
    def _off_where_not_named(cls, value: object) -> object:
        # The defaults of IntensityAugmentation are nnU-Net's: one setting would switch all on.
        if not isinstance(value, dict):
            return value
        none = IntensityAugmentation.none()
        # What is returned counts as Python, not as JSON: strictly, a tuple is no list there.
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return {name: getattr(none, name) for name in INTENSITY_TRANSFORMS} | given

    @model_validator(mode="after")
    def _scheme_fits(self) -> "DetectConfig":
        check_scheme(self.schedule, self.averaging, self.restart)
        return self

    @model_validator(mode="after")
    def _measures_what_decides(self) -> "DetectConfig":
        needed = self.validation_batches
        setting = "validation_batches"
        if self.best_metric.startswith("val_case_"):
            needed, setting = self.validate_cases_every_steps, "validate_cases_every_steps"
        if self.best_metric != "auto" and not needed:
            raise ValueError(f"best_metric {self.best_metric} needs {setting} above 0")
        return self

    @model_validator(mode="after")
    def _fits_the_encoder(self) -> "DetectConfig":
        if (self.architecture != "preset") != (self.stages is not None):
            raise ValueError(
                'stages and architecture = "plan" or "checkpoint" belong together; a store\'s '
                "plan or the checkpoint of --init gives both"
            )
        strides = cumulative_strides(encoder_config(self).strides)
        levels = self.detector.head_levels
        if list(levels) != list(range(levels[0], levels[0] + len(levels))):
            raise ValueError("detector.head_levels must be neighbouring levels, finest first")
        if not 0 <= levels[0] <= levels[-1] < len(strides):
            raise ValueError(
                f"detector.head_levels: {self.encoder} has levels 0..{len(strides) - 1}"
            )
        total = strides[-1]
        for edge, stride in zip(self.patch_size, total, strict=True):
            if edge % stride or (stride > 1 and edge < 2 * stride):
                raise ValueError(
                    f"patch_size {list(self.patch_size)}: every edge must be a multiple of "
                    f"{_by(total)} and at least {_by([2 * step for step in total])} for the "
                    f"encoder {self.encoder}"
                )
        return self


def encoder_config(config: DetectConfig) -> EncoderConfig:
    """The encoder that the config asks for: its preset, or that with the plan's stages.

    Where blocks are not stated, stages beyond those of the preset have as many as its last one.
    """
    preset = ENCODER_PRESETS[config.encoder]
    if config.stages is None:
        return preset
    last = len(preset.blocks) - 1
    return EncoderConfig(
        kind=preset.kind,
        features=config.stages.features,
        strides=config.stages.strides,
        kernels=config.stages.kernels,
        blocks=config.stages.blocks
        or tuple(preset.blocks[min(stage, last)] for stage in range(len(config.stages.features))),
        conv_bias=preset.conv_bias if config.stages.conv_bias is None else config.stages.conv_bias,
    )


def _by(edges: Sequence[int]) -> str:
    """One number where all are equal, else all of them."""
    return str(edges[0]) if len(set(edges)) == 1 else str(list(edges))
