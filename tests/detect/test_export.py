"""Exported networks compute what the detectors compute."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.init import initialize
from voxelbridge.core.arch.presets import PLAIN_SMALL, RESENC_SMALL
from voxelbridge.core.arch.ufpn import UFPN
from voxelbridge.core.errors import ConfigError, VoxelbridgeError
from voxelbridge.detect import export_onnx as module
from voxelbridge.detect.deform_transformer import (
    DecoderBlock,
    DeformableAttention,
    DeformableTransformer,
    EncoderBlock,
)
from voxelbridge.detect.deformable_detr import (
    BoxHead,
    ChannelMapper,
    DeformableDETR,
    initialize_transformer,
)
from voxelbridge.detect.export_onnx import export_onnx, export_program, output_names
from voxelbridge.detect.retina_head import RetinaHead
from voxelbridge.detect.retina_unet import RetinaUNet

Build = Callable[[], RetinaUNet | DeformableDETR]

PATCH = (32, 32, 48)  # not a cube: axes must not be mixed up


def retina_unet() -> RetinaUNet:
    torch.manual_seed(0)
    encoder = build_encoder(PLAIN_SMALL, in_channels=1)
    initialize(encoder, "torch_default")
    neck = UFPN(encoder.channels, encoder.strides, out_channels=16)
    head = RetinaHead(16, 8, num_classes=2, num_levels=2)
    with torch.no_grad():  # the levels' scales differ after training
        head.level_scales.copy_(torch.tensor([0.7, 1.4]))
    pair = (4.0, 6.0)
    sizes = ((pair, pair, pair), ((8.0, 12.0), (9.0, 11.0), (7.0, 13.0)))
    return RetinaUNet(
        encoder, neck, head, segmenter=nn.Conv3d(neck.channels[0], 2, 1), head_levels=(2, 3),
        anchor_sizes=sizes,
    ).eval()  # fmt: skip


def deformable_detr(*, in_channels: int = 1) -> DeformableDETR:
    torch.manual_seed(1)
    encoder = build_encoder(RESENC_SMALL, in_channels=in_channels)
    initialize(encoder, "torch_default")
    shape = {"heads": 2, "levels": 2, "points": 2, "hidden": 32}
    transformer = DeformableTransformer(
        [EncoderBlock(16, **shape)],
        [DecoderBlock(16, **shape) for _ in range(2)],
        [nn.Linear(16, 2) for _ in range(3)],
        [BoxHead(16) for _ in range(3)],
        width=16, levels=2, queries=5,
    )  # fmt: skip
    mapper = ChannelMapper(encoder.channels[-2:], 16)
    initialize_transformer(mapper, transformer, class_prior=0.01, zero_box_heads=False)
    last = len(encoder.channels)
    return DeformableDETR(encoder, mapper, transformer, levels=(last - 2, last - 1)).eval()


def image_of(batch: int = 1, channels: int = 1) -> Tensor:
    return torch.randn(batch, channels, *PATCH, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def outputs(detector: RetinaUNet | DeformableDETR, image: Tensor) -> list[Tensor]:
    if isinstance(detector, RetinaUNet):
        out = detector(image, segment=False)
        return [out.logits, out.deltas, out.anchors.boxes()]
    answer = detector(image).blocks[-1]
    return [answer.boxes, answer.logits]


@pytest.mark.slow
@pytest.mark.parametrize("build", [retina_unet, deformable_detr])
def test_exported_program_computes_what_the_detector_computes(build: Build) -> None:
    detector = build()
    program = export_program(detector, patch_size=PATCH, in_channels=1)
    found = program.module()(image_of())
    for got, expected in zip(found, outputs(detector, image_of()), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("build", [retina_unet, deformable_detr])
def test_onnxruntime_computes_what_the_detector_computes(build: Build, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    detector, path = build(), tmp_path / "model.onnx"
    metadata = {"class_names": ["a", "ü"], "spacing_mm": [3.0, 1.0, 1.0]}
    differences = export_onnx(
        detector, path, patch_size=PATCH, in_channels=1, metadata=metadata, check=True
    )
    assert set(differences) == set(output_names(detector))
    assert max(differences.values()) < 1e-4
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(list(output_names(detector)), {"image": image_of().numpy()})
    for got, expected in zip(found, outputs(detector, image_of()), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4)
    assert [entry.name for entry in session.get_inputs()] == ["image"]
    assert session.get_inputs()[0].shape == [1, 1, *PATCH]

    model = onnx.load(path)
    facts = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert facts["voxelbridge.class_names"] == ["a", "ü"]
    assert facts["voxelbridge.spacing_mm"] == [3.0, 1.0, 1.0]
    assert facts["voxelbridge.patch_size"] == list(PATCH)
    assert facts["voxelbridge.schema"] == 1
    assert set(facts["voxelbridge.outputs"]) == set(output_names(detector))
    # nothing of the machine that wrote the file
    content = path.read_bytes()
    assert str(Path(module.__file__).parent).encode() not in content
    assert b"site-packages" not in content
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.slow
def test_batches_and_channels_are_those_asked_for(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    detector, path = deformable_detr(in_channels=2), tmp_path / "model.onnx"
    export_onnx(detector, path, patch_size=PATCH, in_channels=2, batch_size=2)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    boxes, logits = session.run(["boxes", "logits"], {"image": image_of(2, 2).numpy()})
    expected = outputs(detector, image_of(2, 2))
    torch.testing.assert_close(torch.from_numpy(boxes), expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(logits), expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_failed_check_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    with pytest.raises(VoxelbridgeError, match="nothing was written"):
        export_onnx(
            deformable_detr(), tmp_path / "m.onnx", patch_size=PATCH, in_channels=1, check=True
        )
    assert list(tmp_path.iterdir()) == []


def test_missing_libraries_are_one_line_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(missing: str) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == missing else object()
        )

    path, detector = tmp_path / "m.onnx", deformable_detr()
    without("onnxscript")
    with pytest.raises(ConfigError, match=r"install voxelbridge-detect\[export\]"):
        export_onnx(detector, path, patch_size=PATCH, in_channels=1)
    monkeypatch.undo()
    without("onnxruntime")
    with pytest.raises(ConfigError, match="onnxruntime is not installed"):
        export_onnx(detector, path, patch_size=PATCH, in_channels=1, check=True)
    assert not path.exists()


def test_detector_is_left_as_it_is() -> None:
    detector = deformable_detr()
    plain = module._plain_copy(detector)
    blocks = [m for m in detector.modules() if isinstance(m, DeformableAttention)]
    copies = [m for m in plain.modules() if isinstance(m, DeformableAttention)]
    assert len(copies) == 3
    assert {block.backend for block in blocks} == {"auto"}
    assert {block.backend for block in copies} == {"torch"}


def test_queries_that_change_places_are_compared_with_their_partners() -> None:
    boxes, logits = torch.rand(2, 5, 6), torch.rand(2, 5, 2)
    order = torch.tensor([1, 0, 2, 4, 3])
    paired = module._paired([boxes[:, order], logits[:, order]], [boxes, logits])
    torch.testing.assert_close(paired, [boxes, logits])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["retunet_small", "defdetr_small"])
def test_the_command_exports_a_run_that_explains_itself(
    raw_dataset: Path, tmp_path: Path, preset: str
) -> None:
    onnx = pytest.importorskip("onnx")
    from typer.testing import CliRunner

    from voxelbridge.detect.cli import app
    from voxelbridge.detect.prepare import prepare
    from voxelbridge.detect.train import train

    prepare(raw_dataset, tmp_path / "store", workers=0)
    run, path = tmp_path / "run", tmp_path / "model.onnx"
    overrides = ["patch_size=[32,32,32]", "schedule.steps=1", "schedule.warmup_steps=0"]
    train(preset, store=tmp_path / "store", run=run, overrides=overrides, device="cpu", workers=0)
    done = CliRunner().invoke(app, ["export", str(run), "-o", str(path), "--check"])
    assert done.exit_code == 0, done.output
    assert "one patch of 32 x 32 x 32 voxels" in done.output
    assert "checked with onnxruntime" in done.output
    facts = {e.key: json.loads(e.value) for e in onnx.load(path).metadata_props}
    assert facts["voxelbridge.class_names"] == ["hot", "cold"]
    assert facts["voxelbridge.channel_names"] == ["CT"]
    assert facts["voxelbridge.normalization"][0]["name"] == "ct_percentile"
    assert len(facts["voxelbridge.spacing_mm"]) == 3


def test_run_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    from voxelbridge.detect.export_run import export_run

    with pytest.raises(VoxelbridgeError) as caught:
        export_run(tmp_path / "none", tmp_path / "m.onnx", check=False)
    assert "\n" not in str(caught.value)
