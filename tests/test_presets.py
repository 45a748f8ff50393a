"""Every shipped preset loads, and those of the paper hold its numbers (arXiv 2509.15947)."""

from importlib import resources

import pytest
import torch
from torch import nn

from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.config import differing_keys, load_config, preset_path
from voxelbridge.core.data.augment import SpatialAugmentation
from voxelbridge.core.data.augment_intensity import IntensityAugmentation
from voxelbridge.core.train.averaging import WeightAveraging, tail_of
from voxelbridge.core.train.optim import SGD, AdamW
from voxelbridge.core.train.schedule import learning_rate_at
from voxelbridge.detect.build import build_detector, load_detect_config
from voxelbridge.detect.config import DeformableDETRConfig, DetectConfig, RetinaUNetConfig
from voxelbridge.detect.deformable_detr import DeformableDETR
from voxelbridge.detect.retina_unet import RetinaUNet
from voxelbridge.pretrain_ssl.config import PretrainConfig
from voxelbridge.pretrain_ssl.methods.mae import MAE
from voxelbridge.pretrain_ssl.methods.s3d import S3D
from voxelbridge.pretrain_sup.config import MultiTalentConfig
from voxelbridge.pretrain_sup.model import SegmentationNetwork, build_network

SSL = "voxelbridge.pretrain_ssl"
SUP = "voxelbridge.pretrain_sup"
DETECT_PRESETS = (
    "defdetr", "defdetr_small", "nndet_v001", "resenc_defdetr", "resenc_defdetr_small",
    "resenc_retunet", "resenc_retunet_small", "retunet", "retunet_small",
)  # fmt: skip
# Presets that extend one of these: rows of the paper's table 2, tunings, fractions of the data.
VARIANTS = {
    "retunet_lr1e-3": ("retunet", {"optim.lr"}),
    "retunet_all_weights": ("retunet", {"transfer.parts"}),
    **{f"{name}_default_spacing": (name, {"store_plan"}) for name in ("retunet", "defdetr")},
    **{
        f"{name}_stem_{policy}": (name, {"transfer.stem"})
        for name in ("retunet", "defdetr", "resenc_retunet", "resenc_defdetr")
        for policy in ("random", "replicate")
    },
    **{
        f"{name}_{ending}": (name, keys)
        for name in ("resenc_retunet", "resenc_defdetr")
        for ending, keys in (
            ("192", {"patch_size"}),
            ("10pct", {"data_fraction"}),
            ("30pct", {"data_fraction"}),
            ("lora", {"tune.name", "tune.rank", "tune.alpha"}),
            ("linear", {"tune.name", "schedule.steps", "schedule.frozen"}),
        )
    },
    **{
        f"{name}_{ending}_small": (f"{name}_small", keys)
        for name in ("resenc_retunet", "resenc_defdetr")
        for ending, keys in (
            ("lora", {"tune.name", "tune.rank", "tune.alpha"}),
            ("linear", {"tune.name"}),
        )
    },
}
SSL_METHODS = ("mae", "models_genesis", "s3d", "voco")
SSL_PRESETS = [f"{name}{suffix}" for name in SSL_METHODS for suffix in ("", "_24gb", "_small")]
SUP_PRESETS = (
    "multitalent_resenc_l", "multitalent_retina_unet", "multitalent_retina_unet_small",
    "multitalent_small",
)  # fmt: skip
PAPER_DETECTORS = {
    "retunet": 18_967_075,
    "resenc_retunet": 95_240_771,
    "defdetr": 18_173_073,
    "resenc_defdetr": 94_446_769,
    "nndet_v001": 18_967_555,  # nnDetection v0.1, not of the paper
}
RETINA = ("retunet", "resenc_retunet")
DETR = ("defdetr", "resenc_defdetr")


def shipped(package: str) -> list[str]:
    folder = resources.files(package) / "presets"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir())


def pretrain_config(name: str) -> PretrainConfig:
    return load_config(PretrainConfig, preset_path(SSL, name)).config


def multitalent_config(name: str) -> MultiTalentConfig:
    return load_config(MultiTalentConfig, preset_path(SUP, name)).config


def multitalent_network(name: str) -> SegmentationNetwork:
    """With one stem of one channel and one head of two outputs."""
    config = multitalent_config(name)
    with torch.device("meta"):
        return build_network(
            ENCODER_PRESETS[config.encoder], config.decoder, stems={"a": 1}, heads={"a": 2},
            init="torch_default",
        )  # fmt: skip


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_shipped_presets_for_many_data_sets_are_the_documented_ones() -> None:
    assert shipped(SUP) == list(SUP_PRESETS)


def test_shipped_presets_are_the_documented_ones() -> None:
    assert shipped("voxelbridge.detect") == sorted([*DETECT_PRESETS, *VARIANTS])
    assert shipped(SSL) == SSL_PRESETS


@pytest.mark.parametrize("name", DETECT_PRESETS)
def test_detect_preset_loads_and_builds(name: str) -> None:
    config = load_detect_config(name)
    with torch.device("meta"):
        detector = build_detector(config, in_channels=2, num_classes=3)
    assert detector.encoder.in_channels == 2
    match detector:
        case RetinaUNet():
            assert detector.head.num_classes == 3
            assert len(detector.anchor_sizes) == len(config.detector.head_levels)
        case DeformableDETR():
            assert detector.levels == config.detector.head_levels
            assert all(head.out_features == 3 for head in detector.transformer.class_heads)
    divisor = detector.encoder.strides[-1]
    assert all(edge % stride == 0 for edge, stride in zip(config.patch_size, divisor, strict=True))


def test_a_variant_differs_from_what_it_extends_in_the_named_settings_alone() -> None:
    for name, (base, keys) in VARIANTS.items():
        different = differing_keys(load_detect_config(base), load_detect_config(name))
        found = {line.partition(":")[0] for line in different}
        assert {"schedule.frozen" if k.startswith("schedule.frozen") else k for k in found} == keys
    assert load_detect_config("retunet_lr1e-3").optim.lr == 1e-3
    assert load_detect_config("resenc_retunet_192").patch_size == (192, 192, 192)
    assert load_detect_config("retunet_all_weights").transfer.parts == "encoder+decoder"
    assert load_detect_config("defdetr_stem_random").transfer.stem == "random"
    assert load_detect_config("resenc_defdetr_10pct").data_fraction == 0.1
    assert load_detect_config("resenc_retunet_linear_small").tune.name == "linear"


@pytest.mark.parametrize("name", SSL_PRESETS)
def test_pretraining_preset_loads_and_builds(name: str) -> None:
    config = pretrain_config(name)
    with torch.device("meta"):
        encoder = build_encoder(ENCODER_PRESETS[config.encoder], in_channels=1)
        objective = config.method.build(encoder)
    assert name.startswith(config.method.name)
    assert config.method.parity == "paper"
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    assert trained > count(encoder)


@pytest.mark.parametrize(("name", "expected"), PAPER_DETECTORS.items())
def test_paper_detectors_have_the_exact_number_of_parameters(name: str, expected: int) -> None:
    with torch.device("meta"):
        assert count(build_detector(name, in_channels=1, num_classes=1)) == expected


@pytest.mark.parametrize("name", PAPER_DETECTORS)
def test_paper_detectors_register_each_parameter_once(name: str) -> None:
    with torch.device("meta"):
        detector = build_detector(name, in_channels=1, num_classes=1)
    names = [key for key, _ in detector.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(detector.parameters()))


@pytest.mark.parametrize("name", RETINA)
def test_paper_detectors_train_as_in_appendix_c(name: str) -> None:
    config = load_detect_config(name)
    schedule, optim = config.schedule, config.optim
    assert (config.patch_size, config.batch_size) == ((128, 128, 128), 4)
    assert schedule.frozen is not None
    assert schedule.frozen.steps == 3 * 2500
    assert schedule.frozen.parts == ("detector.encoder",)
    assert (schedule.steps, schedule.warmup_steps) == ((3 + 50) * 2500, 4000)
    assert schedule.power == 0.9
    assert isinstance(optim, SGD)
    assert (optim.lr, optim.momentum, optim.nesterov) == (1e-2, 0.9, True)
    assert (optim.weight_decay, optim.decay_norm_layers) == (3e-5, False)
    assert learning_rate_at(schedule, 0, peak=optim.lr) == 1e-6
    assert learning_rate_at(schedule, 7500, peak=optim.lr) == 1e-6
    assert learning_rate_at(schedule, 11_500, peak=optim.lr) == 1e-2


@pytest.mark.parametrize("name", DETR)
def test_paper_transformers_train_as_in_appendix_c(name: str) -> None:
    config = load_detect_config(name)
    schedule, optim = config.schedule, config.optim
    assert (config.patch_size, config.batch_size) == ((128, 128, 128), 4)
    assert config.precision == "bf16"
    assert schedule.frozen is not None
    assert schedule.frozen.steps == 5 * 2500
    assert schedule.frozen.parts == ("detector.encoder",)
    assert (schedule.steps, schedule.warmup_steps) == ((5 + 100) * 2500, 4000)
    assert schedule.power == 0.9
    assert isinstance(optim, AdamW)
    assert (optim.lr, optim.betas, optim.eps) == (3e-4, (0.9, 0.999), 1e-4)
    assert (optim.weight_decay, optim.amsgrad) == (1e-4, True)
    assert learning_rate_at(schedule, 0, peak=optim.lr) == 1e-6
    assert learning_rate_at(schedule, 12_499, peak=optim.lr) == pytest.approx(3e-4, rel=1e-3)
    assert learning_rate_at(schedule, 12_500, peak=optim.lr) == 1e-6
    assert learning_rate_at(schedule, 16_500, peak=optim.lr) == 3e-4


@pytest.mark.parametrize("name", PAPER_DETECTORS)
def test_paper_detectors_are_validated_on_patches_and_on_whole_cases(name: str) -> None:
    config = load_detect_config(name)
    assert (config.validation_batches, config.validate_every_steps) == (100, 2500)
    assert (config.validate_cases_every_steps, config.validation_cases) == (25_000, 10)
    assert config.best_metric == "auto"


@pytest.mark.parametrize("name", DETR)
def test_paper_transformers_have_the_detr_settings(name: str) -> None:
    config = load_detect_config(name)
    detector = config.detector
    assert isinstance(detector, DeformableDETRConfig)
    assert detector.head_levels == (2, 3, 4, 5)
    assert (detector.width, detector.hidden, detector.heads, detector.points) == (128, 1024, 8, 4)
    assert (detector.encoder_blocks, detector.decoder_blocks) == (3, 6)
    assert (detector.queries, detector.class_prior) == (None, 0.05)
    assert detector.box_head_init == "torch_default"
    assert (detector.focal_gamma, detector.focal_alpha) == (1.0, 0.75)
    assert (detector.class_weight, detector.l1_weight, detector.giou_weight) == (1, 5, 2)
    assert (detector.class_cost, detector.l1_cost, detector.giou_cost) == (2, 5, 2)
    assert config.encoder == ("plain" if name == "defdetr" else "resenc_l")


@pytest.mark.parametrize("name", PAPER_DETECTORS)
def test_paper_detectors_change_intensities_as_nndetection_does(name: str) -> None:
    config = load_detect_config(name)
    assert config.intensity == IntensityAugmentation.nndetection()
    assert config.augmentation == SpatialAugmentation()


def test_small_detectors_leave_intensities_alone_and_name_what_they_change() -> None:
    for name in set(DETECT_PRESETS) - set(PAPER_DETECTORS):
        assert load_detect_config(name).intensity.changes_nothing
    gamma = load_detect_config("retunet_small", ["intensity.gamma_probability=1"]).intensity
    off = IntensityAugmentation.none()
    assert gamma == off.model_copy(update={"gamma_probability": 1.0})


def test_nndet_v001_is_the_public_version() -> None:
    config, paper = load_detect_config("nndet_v001"), load_detect_config("retunet")
    detector, schedule, optim = config.detector, config.schedule, config.optim
    assert isinstance(detector, RetinaUNetConfig)
    assert (detector.classification_loss, detector.box_loss) == ("hard_negatives", "giou")
    mined = detector.hard_negatives
    assert (mined.anchors_per_image, mined.positive_fraction, mined.pool_factor) == (32, 0.33, 20)
    assert (detector.class_weight, detector.box_weight, detector.segmentation_weight) == (1, 1, 1)
    assert (schedule.steps, schedule.warmup_steps, schedule.frozen) == (60 * 2500, 4000, None)
    swa = config.averaging
    assert isinstance(swa, WeightAveraging)
    assert (swa.last_steps, swa.every_steps, swa.rates) == (10 * 2500, 2500, (1e-5, 1e-3))
    assert isinstance(optim, SGD)
    assert optim == paper.optim
    # nnDetection's own figure for the rate of its iteration 60,000: the decay ends with epoch 50
    rate = learning_rate_at(schedule, 60_000, peak=optim.lr, tail=tail_of(swa))
    assert rate == pytest.approx(5.716e-3, rel=1e-3)
    assert config.post_processing == paper.post_processing


@pytest.mark.parametrize("name", RETINA)
def test_paper_detectors_have_the_retina_settings(name: str) -> None:
    config = load_detect_config(name)
    detector = config.detector
    assert isinstance(detector, RetinaUNetConfig)
    assert detector.head_levels == (2, 3, 4, 5)
    assert (detector.classification_loss, detector.box_loss) == ("focal", "l1")
    assert (detector.channels, detector.sizes_per_axis) == (128, 3)
    assert detector.atss_candidates == 4
    assert (detector.focal_gamma, detector.focal_alpha) == (1.0, 0.75)
    assert (detector.class_weight, detector.box_weight) == (0.3, 1.0)
    assert detector.segmentation_weight == 1.0
    assert detector.normalizer_decay == 0.7
    assert config.encoder == ("plain" if name == "retunet" else "resenc_l")


@pytest.mark.parametrize("name", ["retunet", "resenc_retunet"])
def test_small_detectors_differ_in_size_and_loss_weights_not_in_method(name: str) -> None:
    paper = load_detect_config(name)
    small = load_detect_config(f"{name}_small")
    assert small.encoder == {"plain": "plain_small", "resenc_l": "resenc_small"}[paper.encoder]
    # Why the weights differ stands in the presets and in docs/methods/retina_unet.md.
    own = {"head_levels", "channels", "class_weight", "box_weight", "segmentation_weight"}
    assert small.detector.model_dump(exclude=own) == paper.detector.model_dump(exclude=own)
    assert isinstance(small.detector, RetinaUNetConfig)
    weights = (small.detector.class_weight, small.detector.box_weight)
    assert (*weights, small.detector.segmentation_weight) == (1.0, 0.2, 0.1)
    assert small.post_processing == paper.post_processing


@pytest.mark.parametrize("name", DETR)
def test_small_transformers_differ_in_size_not_in_method(name: str) -> None:
    paper, small = load_detect_config(name), load_detect_config(f"{name}_small")
    assert small.encoder == {"plain": "plain_small", "resenc_l": "resenc_small"}[paper.encoder]
    own = {
        "head_levels", "width", "heads", "encoder_blocks", "decoder_blocks", "hidden", "queries",
        "box_head_init",
    }  # fmt: skip
    assert small.detector.model_dump(exclude=own) == paper.detector.model_dump(exclude=own)
    assert small.post_processing == paper.post_processing


@pytest.mark.parametrize("name", SSL_METHODS)
def test_pretraining_is_as_in_section_2_2(name: str) -> None:
    config = pretrain_config(name)
    optim = config.optim
    # Published VoCo weights state this patch; see docs/methods/voco.md.
    patch = (192, 192, 64) if name == "voco" else (192, 192, 192)
    assert (config.patch_size, config.batch_size) == (patch, 12)
    assert config.schedule.steps == 4000 * 250
    assert (config.schedule.warmup_steps, config.schedule.power) == (0, 0.9)
    assert config.schedule.frozen is None
    assert isinstance(optim, SGD)
    assert (optim.lr, optim.momentum, optim.nesterov) == (1e-2, 0.99, True)
    assert optim.weight_decay == 3e-5
    assert (config.encoder, config.clip_norm, config.precision) == ("resenc_l", 12.0, "bf16")


@pytest.mark.parametrize("name", ["mae", "s3d"])
def test_three_quarters_of_the_blocks_of_16_voxels_are_hidden(name: str) -> None:
    method = pretrain_config(name).method
    assert isinstance(method, MAE | S3D)
    assert (method.mask_ratio, method.block_size) == (0.75, 16)


def test_mae_network_has_the_exact_number_of_parameters() -> None:
    config = pretrain_config("mae")
    with torch.device("meta"):
        encoder = build_encoder(ENCODER_PRESETS[config.encoder], in_channels=1)
        objective = config.method.build(encoder)
    assert (count(encoder), count(objective)) == (90_296_576, 102_348_193)


@pytest.mark.parametrize(
    ("name", "patch", "batch"),
    [("multitalent_resenc_l", 192, 12), ("multitalent_retina_unet", 128, 48)],
)
def test_multitalent_trains_as_in_section_2_2(name: str, patch: int, batch: int) -> None:
    config = multitalent_config(name)
    optim = config.optim
    assert (config.patch_size, config.batch_size) == ((patch, patch, patch), batch)
    assert config.schedule.steps == 4000 * 250
    assert (config.schedule.warmup_steps, config.schedule.power) == (0, 0.9)
    assert isinstance(optim, SGD)
    assert (optim.lr, optim.momentum, optim.nesterov) == (1e-2, 0.99, True)
    assert optim.weight_decay == 3e-5
    assert (config.precision, config.clip_norm) == ("bf16", 12.0)
    assert config.sampling.dataset_exponent == 0.5
    assert config.sampling.foreground_probability == 0.33
    assert config.deep_supervision


def test_multitalent_networks_have_the_exact_number_of_parameters() -> None:
    unet = multitalent_network("multitalent_resenc_l")
    assert count(unet.encoder) == 90_296_576
    assert count(unet) == 102_349_770  # as nnU-Net's for two classes
    pyramid = multitalent_network("multitalent_retina_unet")
    assert (count(pyramid.encoder), count(pyramid.decoder)) == (14_022_880, 2_520_256)


@pytest.mark.parametrize(
    ("name", "detector"),
    [
        ("multitalent_retina_unet", "retunet"),
        ("multitalent_retina_unet_small", "retunet_small"),
    ],
)
def test_multitalent_pyramids_fit_the_detectors(name: str, detector: str) -> None:
    with torch.device("meta"):
        neck = build_detector(detector, in_channels=1, num_classes=1).get_submodule("neck")
    theirs = {name: tensor.shape for name, tensor in neck.state_dict().items()}
    ours = multitalent_network(name).decoder.state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == theirs
    assert multitalent_config(name).encoder == load_detect_config(detector).encoder


def test_small_presets_share_the_encoder_so_that_weights_fit() -> None:
    assert (
        pretrain_config("mae_small").encoder == load_detect_config("resenc_retunet_small").encoder
    )
    assert pretrain_config("mae").encoder == load_detect_config("resenc_retunet").encoder
    assert isinstance(load_detect_config("retunet_small").optim, AdamW)


def test_what_costs_gpu_weeks_when_wrong_has_no_default() -> None:
    for model in (DetectConfig, PretrainConfig, MultiTalentConfig):
        required = {name for name, field in model.model_fields.items() if field.is_required()}
        assert {"patch_size", "batch_size", "schedule", "encoder"} <= required
