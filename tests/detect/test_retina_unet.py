"""Retina U-Net: the paper's parameter counts, output order, what inference leaves out."""

import pytest
import torch

from voxelbridge.detect.build import build_detector, load_detect_config
from voxelbridge.detect.config import RetinaUNetConfig
from voxelbridge.detect.retina_head import RetinaHead
from voxelbridge.detect.retina_unet import RetinaUNet


@pytest.mark.parametrize(
    ("preset", "num_classes", "parameters"),
    [
        ("retunet", 1, 18_967_075),
        ("retunet", 2, 19_060_414),
        ("resenc_retunet", 1, 95_240_771),
        ("resenc_retunet", 2, 95_334_110),
    ],
)
def test_parameter_counts_are_the_papers(preset: str, num_classes: int, parameters: int) -> None:
    with torch.device("meta"):
        detector = build_detector(preset, in_channels=1, num_classes=num_classes)
    assert sum(p.numel() for p in detector.parameters()) == parameters
    state = detector.state_dict()
    assert len(state) == len(list(detector.parameters()))


def test_head_counts_are_nndetections() -> None:
    with torch.device("meta"):
        head = RetinaHead(128, 27, num_classes=1, num_levels=4)
    assert sum(p.numel() for p in head.classifier.parameters()) == 978_587
    rest = sum(p.numel() for p in head.regressor.parameters()) + head.level_scales.numel()
    assert rest == 1_445_286


def test_initial_scores_are_the_prior() -> None:
    torch.manual_seed(0)
    head = RetinaHead(16, 8, num_classes=3, num_levels=1)
    logits, deltas = head([torch.zeros(1, 16, 2, 3, 4)])
    assert logits.shape == (1, 2 * 3 * 4 * 8, 3)
    assert deltas.shape == (1, 2 * 3 * 4 * 8, 6)
    torch.testing.assert_close(logits.sigmoid(), torch.full_like(logits, 0.01))


def test_outputs_are_ordered_as_the_anchors() -> None:
    """A cell's outputs stand where its anchors stand: location in C order, then anchor."""
    head = RetinaHead(16, 8, num_classes=2, num_levels=1)
    classifier = torch.nn.Conv3d(16, 16, kernel_size=1)
    with torch.no_grad():
        classifier.weight.zero_()
        classifier.bias.copy_(torch.arange(16.0))  # pyright: ignore[reportOptionalMemberAccess]
        classifier.weight[:, 0] = 100.0
    head.classifier = torch.nn.Sequential(classifier)
    cells = torch.arange(24.0).reshape(1, 1, 2, 3, 4)
    logits, _ = head([torch.cat([cells, torch.zeros(1, 15, 2, 3, 4)], dim=1)])
    expected = 100 * torch.arange(24.0)[:, None] + torch.arange(16.0)
    torch.testing.assert_close(logits[0].reshape(24, 16), expected)


def test_without_segmentation_the_finer_maps_are_not_computed() -> None:
    config = load_detect_config("resenc_retunet_small")
    detector = build_detector(config, in_channels=1, num_classes=1).eval()
    assert isinstance(detector, RetinaUNet)
    image = torch.randn(1, 1, 16, 16, 16)
    with_segmentation = detector(image, segment=True)
    fine = next(iter(detector.neck.out))
    calls: list[int] = []
    fine.register_forward_hook(lambda *_: calls.append(1))
    without = detector(image, segment=False)
    assert calls == []
    assert without.segmentation is None
    assert with_segmentation.segmentation is not None
    assert with_segmentation.segmentation.shape == (1, 2, 16, 16, 16)
    torch.testing.assert_close(without.logits, with_segmentation.logits)


@pytest.mark.parametrize("segment", [True, False])
def test_all_but_the_idle_parameters_get_gradients(segment: bool) -> None:
    torch.manual_seed(0)
    config = load_detect_config("retunet_small")
    levels = RetinaUNetConfig(head_levels=(2, 3), channels=16, sizes_per_axis=1)
    config = config.model_copy(update={"detector": levels})
    detector = build_detector(config, in_channels=2, num_classes=2)
    assert isinstance(detector, RetinaUNet)
    output = detector(torch.randn(1, 2, 16, 16, 16), segment=segment)
    parts = [output.logits, output.deltas]
    if output.segmentation is not None:
        parts.append(output.segmentation)
    torch.stack([part.square().sum() for part in parts]).sum().backward()
    idle = {id(parameter) for parameter in detector.idle_parameters(segment=segment)}
    without = {id(parameter) for parameter in detector.parameters() if parameter.grad is None}
    assert without == idle
    assert idle


def test_anchors_of_a_non_cubic_patch_lie_on_its_cells() -> None:
    detector = build_detector("retunet_small", in_channels=1, num_classes=1)
    output = detector(torch.randn(1, 1, 16, 24, 32), segment=False)
    anchors = output.anchors.boxes()
    assert anchors.shape == (output.logits.shape[1], 6)
    centers = (anchors[:, :3] + anchors[:, 3:]) / 2
    assert centers.min() == 2.0  # half of stride 4
    torch.testing.assert_close(centers.max(dim=0).values, torch.tensor([14.0, 22.0, 30.0]))
