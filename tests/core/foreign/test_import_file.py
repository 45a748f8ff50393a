"""Published checkpoints become canonical ones that compute the same; contradictions are told."""

import copy
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelbridge.core.arch.config import DecoderConfig, EncoderConfig, UFPNConfig
from voxelbridge.core.arch.decoder import build_any_decoder
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import PLAIN_SMALL, RESENC_L, RESENC_SMALL
from voxelbridge.core.checkpoint import collect_tensors, read_checkpoint, write_checkpoint
from voxelbridge.core.cli import app
from voxelbridge.core.command_line import run_app
from voxelbridge.core.errors import CheckpointError, ConfigError
from voxelbridge.core.foreign.import_file import import_checkpoint
from voxelbridge.core.transfer import load_encoder

Weights = dict[str, Tensor]


def foreign_names(config: EncoderConfig, *, decoder: bool = True, stem: str = "stem") -> Weights:
    """Weights of a network like `config` under the names of dynamic-network-architectures."""
    encoder = build_encoder(config, in_channels=1)
    levels = len(config.features) - 1
    network = build_any_decoder(
        DecoderConfig(convs_per_stage=(1,) * levels, conv_bias=config.conv_bias), config
    )
    weights: Weights = {}
    for name, tensor in collect_tensors(encoder, network if decoder else None).items():
        part, kind, *rest = name.split(".")
        if kind == "stem":
            name = ".".join([part, stem, "convs.0", *rest])
            if config.kind == "plain" and stem == "stem":
                name = ".".join([part, "stages.0.0.convs.0", *rest])
        elif part == "encoder" and config.kind == "plain":
            stage, _, conv, *leaf = rest
            index = int(conv) + (stage == "0" and stem == "stem")
            name = ".".join([part, "stages", stage, "0.convs", str(index), *leaf])
        elif part == "decoder":
            kind = "transpconvs" if kind == "upsample" else kind
            name = ".".join([part, kind, str(levels - 1 - int(rest[0])), *rest[1:]])
        weights[name.replace(".skip.", ".skip.1.")] = torch.randn(tensor.shape) * 0.1
    return weights


def with_aliases(weights: Mapping[str, Tensor]) -> Weights:
    doubled = dict(weights)
    for name, tensor in weights.items():
        listed = name.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1.")
        doubled[listed] = tensor
    for name, tensor in list(doubled.items()):
        if name.startswith("encoder."):
            doubled[f"decoder.{name}"] = tensor
    return doubled


def nnssl_plan(config: EncoderConfig, **changes: Any) -> dict[str, Any]:
    return {
        "architecture_plans": {
            "arch_class_name": "ResidualEncoderUNet",
            "arch_kwargs": {
                "n_stages": len(config.features),
                "features_per_stage": list(config.features),
                "strides": [list(s) for s in config.strides],
                "kernel_sizes": [list(k) for k in config.kernels],
                "n_blocks_per_stage": list(config.blocks),
                "n_conv_per_stage_decoder": [1] * (len(config.features) - 1),
                "conv_bias": config.conv_bias,
            },
        },
        "pretrain_plan": {
            "dataset_name": "Dataset001_X",
            "configurations": {
                "onemmiso": {
                    "spacing": [1, 1, 1],
                    "patch_size": [64, 64, 64],
                    "normalization_schemes": ["ZScoreNormalization"],
                }
            },
        },
        "pretrain_num_input_channels": 1,
        "citations": [{"type": "Method", "name": "M", "apa_citations": ["Doe, J. (2024). M."]}],
        **changes,
    }


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def command(path: Path, out: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run_app(app, ["import", str(path), "-o", str(out)])
    assert ended.value.code == 0


def encoder_of(path: Path, tmp_path: Path, **options: Any) -> torch.nn.Module:
    imported = import_checkpoint(path, **options)
    out = tmp_path / "out.safetensors"
    write_checkpoint(out, imported.checkpoint)
    return load_encoder(out)


@pytest.mark.parametrize(
    ("file", "reference", "tolerance", "origin"),
    [
        # See test_encoder: this reference itself misses the exact result by 1.5e-5.
        ("nnssl_mae/checkpoint_final.pth", "reference_io.npz", 2e-5, "nnssl"),
        ("nnunet_plain/checkpoint_final.pth", "reference.npz", 1e-5, "nnunet"),
        ("nnunet_plain/checkpoint_weights_only.pth", "reference.npz", 1e-5, "nnunet"),
    ],
)
def test_samples_give_their_reference_outputs_and_nothing_about_cases(
    file: str, reference: str, tolerance: float, origin: str, shared: Path, tmp_path: Path
) -> None:
    path = shared / "checkpoints" / file
    out = tmp_path / "out.safetensors"
    command(path, out)
    expected = np.load(path.parent / reference)
    with torch.no_grad():
        outputs = load_encoder(out)(torch.from_numpy(expected["input"]))
    for index, output in enumerate(outputs):
        error = np.abs(output.numpy() - expected[f"stage_{index}"]).max()
        assert error <= tolerance
    checkpoint = read_checkpoint(out)
    assert import_checkpoint(path).origin == origin
    assert checkpoint.metadata.spacing_mm == (1.0, 1.0, 1.0)
    assert checkpoint.metadata.patch_size == (32, 32, 32)
    assert checkpoint.metadata.decoder is not None
    for word in (b"sub-01", b"pretrain_json", b"init_args", b"image_path", b"nnssl_preprocessed"):
        assert word not in out.read_bytes()


def test_nnunet_keeps_its_ct_statistics(shared: Path) -> None:
    path = shared / "checkpoints" / "nnunet_plain" / "checkpoint_final.pth"
    scheme = {"name": "ct_percentile", "lower": -120.0, "upper": 260.0, "mean": 80.0, "std": 60.0}
    assert import_checkpoint(path).checkpoint.metadata.normalization == (scheme,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_plain_file_needs_a_plan_or_a_decoder_for_its_strides(
    legacy: bool, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    weights = foreign_names(RESENC_SMALL, decoder=False)
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="--plan or the architecture with --arch"):
        import_checkpoint(path)
    imported = import_checkpoint(path, arch=RESENC_SMALL)
    assert imported.origin == "plain"
    assert any("no checksums" in note for note in imported.notes) == legacy
    for name, tensor in imported.checkpoint.tensors.items():
        theirs = name.replace("stem.", "stem.convs.0.").replace(".skip.", ".skip.1.")
        assert torch.equal(tensor, weights[theirs])
    with pytest.raises(CheckpointError, match="kind: plan plain, weights residual"):
        import_checkpoint(path, arch=PLAIN_SMALL)
    path = saved(tmp_path / "all.pth", foreign_names(RESENC_SMALL))
    assert import_checkpoint(path).checkpoint.metadata.arch == RESENC_SMALL


def test_own_names_and_safetensors_and_wrappers_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = collect_tensors(build_encoder(RESENC_SMALL, in_channels=2))
    path = tmp_path / "weights.safetensors"
    save_file({f"module._orig_mod.{k}": v for k, v in weights.items()}, path)
    imported = import_checkpoint(path, arch=RESENC_SMALL)
    assert imported.checkpoint.tensors.keys() == weights.keys()
    assert imported.checkpoint.metadata.stems["default"].channels == 2
    bare = {k.removeprefix("encoder."): v for k, v in weights.items()}
    path = saved(tmp_path / "bare.pth", {"state_dict": bare})
    assert import_checkpoint(path, arch=RESENC_SMALL).checkpoint.tensors.keys() == weights.keys()
    out = tmp_path / "ours.safetensors"
    write_checkpoint(out, imported.checkpoint)
    with pytest.raises(CheckpointError, match="already a voxelbridge checkpoint"):
        import_checkpoint(out)


def test_disagreeing_duplicates_take_the_trained_copy_and_warn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = foreign_names(RESENC_SMALL)
    stale = {k: torch.randn_like(v) if ".conv.w" in k else v.clone() for k, v in trained.items()}
    content = with_aliases(trained) | stale
    content |= {f"decoder.{k}": v for k, v in stale.items() if k.startswith("encoder.")}
    path = saved(
        tmp_path / "s3d.pth",
        {"network_weights": content, "trainer_name": "SparkMAETrainer", "spark_weights": {}},
    )
    imported = import_checkpoint(path)
    assert (imported.origin, imported.checkpoint.metadata.method) == ("nnssl", "s3d")
    stem = imported.checkpoint.tensors["encoder.stem.conv.weight"]
    assert torch.equal(stem, trained["encoder.stem.convs.0.conv.weight"])
    count = sum(".conv.w" in name for name in trained)
    command(path, tmp_path / "o.safetensors")
    captured = capsys.readouterr()
    assert f"warning: {count} weights are stored twice with different values" in captured.err
    assert "nnssl" in captured.err
    assert "all_modules" in captured.err


def test_copies_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    weights = with_aliases(foreign_names(RESENC_SMALL))
    name = "decoder.encoder.stem.convs.0.all_modules.0.weight"
    weights[name] = weights[name] + 1
    with pytest.raises(CheckpointError, match="one weight but hold different values"):
        import_checkpoint(saved(tmp_path / "a.pth", {"network_weights": weights}))


@pytest.mark.parametrize("config", [RESENC_SMALL, PLAIN_SMALL])
def test_multitalent_keeps_every_stem_under_its_id(config: EncoderConfig, tmp_path: Path) -> None:
    weights = foreign_names(config, stem="stem.4")
    for other, channels in (("40", 4), ("351_0", 1)):
        for name, tensor in list(weights.items()):
            if name.startswith("encoder.stem.4."):
                repeat = (1, channels, 1, 1, 1) if tensor.ndim == 5 else (1,)
                copied = (tensor + channels + len(other)).repeat(repeat)
                weights[name.replace("stem.4.", f"stem.{other}.")] = copied
    weights["decoder.seg_layers.4.0.weight"] = torch.zeros(3, 8, 1, 1, 1)
    path = saved(tmp_path / "mt.pth", {"network_weights": weights})
    imported = import_checkpoint(path)
    metadata = imported.checkpoint.metadata
    assert imported.origin == "multitalent"
    assert {k: s.channels for k, s in metadata.stems.items()} == {"351_0": 1, "4": 1, "40": 4}
    assert metadata.default_stem == "351_0"
    assert metadata.arch == config
    for name in ("4", "40", "351_0"):
        assert torch.equal(
            imported.checkpoint.tensors[f"encoder.stems.{name}.conv.weight"],
            weights[f"encoder.stem.{name}.convs.0.conv.weight"],
        )
    chosen = import_checkpoint(path, stem="40").checkpoint.metadata
    assert chosen.default_stem == "40"
    with pytest.raises(ConfigError, match="has no stem"):
        import_checkpoint(path, stem="5")


def test_nndetection_v1_gives_encoder_and_pyramid(tmp_path: Path) -> None:
    pyramid = UFPNConfig(out_channels=16, first_level=2, upsample_bias=True)
    encoder = build_encoder(PLAIN_SMALL, in_channels=1)
    ours = collect_tensors(encoder, build_any_decoder(pyramid, PLAIN_SMALL))
    theirs: Weights = {"model.head.classifier.conv_out.weight": torch.zeros(1)}
    for name, tensor in ours.items():
        part, kind, *rest = name.split(".")
        if kind == "stem":
            name = ".".join(["encoder.stages.0.convs.0.0", *rest])
        elif part == "encoder":
            stage, _, conv, *leaf = rest
            name = ".".join(
                ["encoder.stages", stage, "convs.0", str(int(conv) + (stage == "0")), *leaf]
            )
        elif kind == "upsample":
            name = f"decoder.up.P{int(rest[0]) + 1}.conv.{rest[1]}"
        else:
            name = f"decoder.{kind}.P{rest[0]}.0.conv.{rest[1]}"
        theirs[f"model.{name}"] = tensor
    path = saved(
        tmp_path / "model_last.ckpt",
        {"state_dict": theirs, "epoch": 59, "hyper_parameters": {"plan": {"a": np.arange(3)}}},
    )
    imported = import_checkpoint(path)
    assert imported.origin == "nndetection"
    assert imported.checkpoint.metadata.arch == PLAIN_SMALL
    assert imported.checkpoint.metadata.decoder == pyramid
    assert imported.checkpoint.tensors.keys() == ours.keys()
    assert all(torch.equal(t, ours[n]) for n, t in imported.checkpoint.tensors.items())
    assert any("ReLU" in warning for warning in imported.warnings)
    assert any("model.head" in note for note in imported.notes)


def test_nndetection_v2_backbone_is_read(tmp_path: Path) -> None:
    weights = {
        name.replace("encoder.", "model.backbone.resenc."): tensor
        for name, tensor in with_aliases(foreign_names(RESENC_SMALL, decoder=False)).items()
        if not name.startswith("decoder.")
    }
    weights["model.transformer.level_embed"] = torch.zeros(4, 8)
    path = saved(tmp_path / "model_last.ckpt", {"state_dict": weights})
    imported = import_checkpoint(path, arch=RESENC_SMALL)
    assert imported.origin == "nndetection"
    assert not imported.warnings
    assert imported.checkpoint.metadata.arch == RESENC_SMALL


def test_a_plan_beside_the_file_is_used_and_its_citations_kept(tmp_path: Path) -> None:
    weights = with_aliases(foreign_names(RESENC_SMALL, decoder=False))
    path = saved(tmp_path / "checkpoint_final.pth", {"network_weights": weights})
    plan = nnssl_plan(RESENC_SMALL, license="CC-BY-4.0")
    (tmp_path / "adaptation_plan.json").write_text(json.dumps(plan))
    imported = import_checkpoint(path)
    assert imported.origin == "nnssl"
    metadata = imported.checkpoint.metadata
    assert (metadata.citations, metadata.license) == (("Doe, J. (2024). M.",), "CC-BY-4.0")
    assert metadata.patch_size == (64, 64, 64)
    assert "Doe, J. (2024). M." in "\n".join(imported.lines())
    wrong = copy.deepcopy(plan)
    wrong["architecture_plans"]["arch_kwargs"]["features_per_stage"][3] = 48
    (tmp_path / "other.json").write_text(json.dumps(wrong))
    with pytest.raises(CheckpointError, match=r"features: plan \(8, 16, 32, 48\), weights \(8"):
        import_checkpoint(path, plan=tmp_path / "other.json")


def test_what_was_imported_is_told_in_words(tmp_path: Path) -> None:
    weights = foreign_names(RESENC_SMALL)
    plan = nnssl_plan(RESENC_SMALL)
    path = saved(tmp_path / "a.pth", {"network_weights": weights, "nnssl_adaptation_plan": plan})
    lines = import_checkpoint(path).lines()
    for key, words in {
        "features": "8, 16, 32, 64",
        "strides": "1x1x1, 2x2x2, 2x2x2, 2x2x2",
        "spacing (mm)": "1 x 1 x 1",
        "patch": "64 x 64 x 64",
        "normalization": "zscore (nonzero_only no)",
    }.items():
        assert f"{key:<16} {words}" in lines
    plan["architecture_plans"]["arch_kwargs"]["strides"][1] = [1, 2, 2]
    (tmp_path / "other.json").write_text(json.dumps(plan))
    with pytest.raises(CheckpointError, match=r"strides: plan \(1x1x1, 1x2x2, .*\), weights \(1x"):
        import_checkpoint(path, plan=tmp_path / "other.json")


def test_transposed_training_axes_are_turned_to_zyx(tmp_path: Path) -> None:
    config = RESENC_SMALL.model_copy(
        update={
            "kernels": ((1, 3, 3), *RESENC_SMALL.kernels[1:]),
            "strides": ((1, 1, 1), (1, 2, 2), *RESENC_SMALL.strides[2:]),
        }
    )
    plan = nnssl_plan(config)
    plan["pretrain_plan"]["transpose_forward"] = [1, 2, 0]  # the network's first axis is y
    plan["pretrain_plan"]["configurations"]["onemmiso"]["spacing"] = [3, 2, 1]
    content = {"network_weights": foreign_names(config), "nnssl_adaptation_plan": plan}
    path = saved(tmp_path / "a.pth", content)
    encoder = encoder_of(path, tmp_path)
    metadata = import_checkpoint(path).checkpoint.metadata
    assert metadata.spacing_mm == (1.0, 3.0, 2.0)
    assert metadata.arch.kernels[0] == (3, 1, 3)
    plan["pretrain_plan"]["transpose_forward"] = [0, 1, 2]
    theirs = encoder_of(saved(tmp_path / "b.pth", content), tmp_path)
    image = torch.randn(1, 1, 8, 16, 16)
    with torch.no_grad():
        mine = encoder(image)
        reference = theirs(image.permute(0, 1, 3, 4, 2))
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a.permute(0, 1, 3, 4, 2), b, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({"encoder.stages.1.blocks.0.conv3.conv.w": torch.zeros(1)}), "no enc"),
        (lambda w: w.pop("encoder.stages.1.blocks.0.conv1.norm.bias"), "is missing"),
        (lambda w: w.update({"encoder.stem.convs.0.conv.bias": torch.arange(8)}), "int64"),
        (lambda w: w["encoder.stem.convs.0.conv.weight"].fill_(float("nan")), "NaN"),
        (lambda w: w.update({"encoder.stem.convs.0.norm.bias": torch.zeros(9)}), r"shape \(9,\)"),
        (lambda w: w.update({"classifier.weight": torch.zeros(9)}), "no encoder or decoder"),
    ],
)  # fmt: skip
def test_unexpected_missing_and_broken_tensors_are_refused(
    change: Any, message: str, tmp_path: Path
) -> None:
    weights = foreign_names(RESENC_SMALL)
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(saved(tmp_path / "a.pth", weights))


def test_nnunet_plans_with_inheritance_and_numpy_numbers_are_read(tmp_path: Path) -> None:
    arguments = nnssl_plan(RESENC_SMALL)["architecture_plans"]["arch_kwargs"]
    network = {"network_class_name": "x.unet.ResidualEncoderUNet", "arch_kwargs": arguments}
    plans = {
        "dataset_name": "Dataset002_Y",
        "transpose_forward": [np.int64(0), np.int64(1), np.int64(2)],
        "configurations": {
            "3d_fullres": {
                "spacing": np.array([2.5, 1.0, 1.0]),
                "patch_size": [16, 32, 32],
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [True],
                "architecture": network,
            },
            "3d_fine": {"inherits_from": "3d_fullres", "patch_size": [32, 32, 32]},
        },
    }
    content = {
        "network_weights": with_aliases(foreign_names(RESENC_SMALL)),
        "init_args": {"plans": plans, "configuration": "3d_fine", "fold": 0},
    }
    path = saved(tmp_path / "a.pth", content)
    imported = import_checkpoint(path)
    metadata = imported.checkpoint.metadata
    assert imported.origin == "nnunet"
    assert metadata.spacing_mm == (2.5, 1.0, 1.0)
    assert metadata.patch_size == (32, 32, 32)
    assert metadata.normalization == ({"name": "zscore", "nonzero_only": True},)
    assert metadata.source.datasets == ("Dataset002_Y",)
    assert import_checkpoint(path, origin="nnssl").origin == "nnssl"


def test_foreign_kinds_are_named(tmp_path: Path) -> None:
    v1 = saved(tmp_path / "v1.model", {"state_dict": {"conv_blocks_context.0.w": torch.ones(1)}})
    with pytest.raises(CheckpointError, match="nnU-Net v1"):
        import_checkpoint(v1)
    other = saved(tmp_path / "other.pth", {"layer1.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"not recognised .*layer1\.weight"):
        import_checkpoint(other)
    primus = nnssl_plan(RESENC_SMALL, architecture_plans={"arch_class_name": "PrimusM"})
    content = {"network_weights": foreign_names(RESENC_SMALL), "nnssl_adaptation_plan": primus}
    with pytest.raises(CheckpointError, match="PrimusM"):
        import_checkpoint(saved(tmp_path / "p.pth", content))


_CHILD = """
import sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from voxelbridge.core.checkpoint import write_checkpoint
from voxelbridge.core.foreign.import_file import import_checkpoint
def peak():  # getrusage would give the peak of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
before = peak()
start = time.monotonic()
imported = import_checkpoint(sys.argv[1])
write_checkpoint(Path(sys.argv[2]), imported.checkpoint)
seconds = time.monotonic() - start
names = [name for name in imported.checkpoint.tensors if name.startswith("encoder.")]
print(len(names), seconds, peak() - before)
"""


@pytest.mark.slow
def test_full_size_imports_fast_in_little_memory(tmp_path: Path) -> None:
    architectures = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    network = architectures.ResidualEncoderUNet(
        1, 6, RESENC_L.features, torch.nn.Conv3d, 3, RESENC_L.strides, RESENC_L.blocks, 1,
        (1,) * 5, True, torch.nn.InstanceNorm3d, {"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )  # fmt: skip
    state = network.state_dict()
    assert len(state) == 956
    plan = nnssl_plan(RESENC_L, architecture_plans={"arch_class_name": "ResEncL"})
    path = saved(
        tmp_path / "checkpoint_final.pth",
        {"network_weights": state, "nnssl_adaptation_plan": plan},
    )
    out = tmp_path / "out.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(path), str(out)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    count, seconds, grown = done.stdout.split()
    assert int(count) == 224
    assert float(seconds) < 30
    assert 0 < float(grown) < 1.5 * path.stat().st_size
    assert read_checkpoint(out).metadata.arch == RESENC_L
