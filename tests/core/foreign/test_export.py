"""Exports: every key of the peers' networks, the same outputs, and no weight stored twice."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from voxelbridge.core.arch.config import AnyDecoderConfig, DecoderConfig, EncoderConfig, UFPNConfig
from voxelbridge.core.arch.decoder import build_any_decoder
from voxelbridge.core.arch.encoder import build_encoder, build_stem
from voxelbridge.core.arch.presets import RESENC_L
from voxelbridge.core.arch.unet import UNetDecoder, build_decoder
from voxelbridge.core.checkpoint import (
    Checkpoint,
    CheckpointMetadata,
    Stem,
    collect_tensors,
    expected_shapes,
    read_checkpoint,
    write_checkpoint,
)
from voxelbridge.core.cli import app
from voxelbridge.core.command_line import run_app
from voxelbridge.core.errors import CheckpointError
from voxelbridge.core.foreign.export_file import export_checkpoint, write_exported

# Projections with and without a pool, one pool without a projection, and uneven kernels.
RESIDUAL = EncoderConfig(
    kind="residual",
    features=(4, 6, 8, 8),
    strides=((1, 1, 1), (1, 2, 2), (1, 1, 1), (2, 2, 2)),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    blocks=(1, 2, 1, 2),
    conv_bias=True,
)
PLAIN = EncoderConfig(
    kind="plain",
    features=(4, 6, 8),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    blocks=(1, 2, 2),
    conv_bias=False,
)
CT = {"name": "ct_percentile", "lower": -120.0, "upper": 260.0, "mean": 80.0, "std": 60.0}
CLASSES = {"residual": "ResidualEncoderUNet", "plain": "PlainConvUNet"}


def ramp(module: nn.Module) -> None:
    """Every parameter different, so that no swap of tensors goes unseen."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            values = torch.linspace(-1, 1, parameter.numel()) * (1 + 0.01 * index)
            parameter.copy_((values + 0.3 * torch.sin(7 * values + index)).view_as(parameter) / 2)


def make(
    arch: EncoderConfig, decoder: AnyDecoderConfig | None, *, channels: int = 1, **facts: Any
) -> Checkpoint:
    encoder = build_encoder(arch, in_channels=channels)
    ramp(encoder)
    module = None if decoder is None else build_any_decoder(decoder, arch)
    if module is not None:
        ramp(module)
    metadata = CheckpointMetadata.model_validate(
        {
            "method": "mae",
            "arch": arch,
            "decoder": decoder,
            "stems": {"ct": Stem(channels=channels)},
        }
        | facts
    )
    return Checkpoint(metadata, collect_tensors(encoder, module), origin="here")


def decoder_of(arch: EncoderConfig) -> DecoderConfig:
    levels = len(arch.features) - 1
    return DecoderConfig(convs_per_stage=(1, 2, 1)[:levels], conv_bias=arch.conv_bias)


def peer_network(plan: dict[str, Any], *, channels: int, outputs: int) -> nn.Module:
    """The network of dynamic-network-architectures that a plan asks for, as nnU-Net builds it."""
    pytest.importorskip("dynamic_network_architectures")
    module, _, name = plan["network_class_name"].rpartition(".")
    arguments = dict(plan["arch_kwargs"])
    for key in plan["_kw_requires_import"]:
        if arguments.get(key) is not None:
            home, _, attribute = arguments[key].rpartition(".")
            arguments[key] = getattr(importlib.import_module(home), attribute)
    network_class = getattr(importlib.import_module(module), name)
    return network_class(
        input_channels=channels, num_classes=outputs, deep_supervision=True, **arguments
    ).eval()


def saved_and_loaded(path: Path, checkpoint: Checkpoint, **options: Any) -> dict[str, Any]:
    write_exported(path, export_checkpoint(checkpoint, **options))
    return torch.load(path, weights_only=True)  # noqa: TID251


def our_maps(checkpoint: Checkpoint, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Stage outputs and decoder maps, finest first."""
    metadata = checkpoint.metadata
    encoder = build_encoder(metadata.arch, in_channels=image.shape[1])
    encoder.load_state_dict(part(checkpoint.tensors, "encoder."))
    assert isinstance(metadata.decoder, DecoderConfig)
    decoder: UNetDecoder = build_decoder(metadata.decoder, metadata.arch)
    decoder.load_state_dict(part(checkpoint.tensors, "decoder."))
    stages = encoder.eval()(image)
    return stages, decoder.eval()(stages)


def part(tensors: Any, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@pytest.mark.parametrize("to", ["nnunet", "nnssl"])
@pytest.mark.parametrize("arch", [RESIDUAL, PLAIN], ids=["residual", "plain"])
@torch.no_grad()
def test_the_peers_network_loads_it_strictly_and_gives_the_same_outputs(
    arch: EncoderConfig, to: str, tmp_path: Path
) -> None:
    checkpoint = make(arch, decoder_of(arch), channels=2)
    content = saved_and_loaded(tmp_path / "x.pth", checkpoint, to=to, outputs=3)
    if to == "nnunet":
        plans = content["init_args"]["plans"]
        plan = plans["configurations"][content["init_args"]["configuration"]]["architecture"]
    else:
        arch_plans = content["nnssl_adaptation_plan"]["architecture_plans"]
        assert arch_plans["arch_class_name"] == CLASSES[arch.kind]
        plan = {
            "network_class_name": "dynamic_network_architectures.architectures.unet."
            + arch_plans["arch_class_name"],
            "arch_kwargs": arch_plans["arch_kwargs"],
            "_kw_requires_import": arch_plans["arch_kwargs_requiring_import"],
        }
    network: Any = peer_network(plan, channels=2, outputs=3)
    state = content["network_weights"]
    assert state.keys() == network.state_dict().keys()
    network.load_state_dict(state, strict=True)

    image = torch.randn(1, 2, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    stages, maps = our_maps(checkpoint, image)
    for ours, theirs in zip(stages, network.encoder(image), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    for level, (ours, theirs) in enumerate(zip(maps, network(image), strict=True)):
        head = network.decoder.seg_layers[len(maps) - 1 - level]
        assert torch.allclose(head(ours), theirs, atol=1e-5)


def test_the_full_residual_network_has_the_956_keys_of_nnssl(shared: Path) -> None:
    path = shared / "checkpoints" / "nnssl_mae" / "resencl_full_keys.json"
    if not path.is_file():
        pytest.skip(f"needs {path.name}")
    decoder = DecoderConfig(convs_per_stage=(1,) * 5, conv_bias=True)
    metadata = CheckpointMetadata(
        method="mae", arch=RESENC_L, decoder=decoder, stems={"ct": Stem(channels=1)}
    )
    shapes = expected_shapes(metadata, named_stems=False)
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    state = export_checkpoint(Checkpoint(metadata, tensors), to="nnssl").content["network_weights"]
    theirs = json.loads(path.read_text())
    assert len(theirs) == 956
    assert {name: list(tensor.shape) for name, tensor in state.items()} == theirs


def test_copies_share_memory_and_the_file_does_not_grow(tmp_path: Path) -> None:
    checkpoint = make(RESIDUAL, decoder_of(RESIDUAL))
    path = tmp_path / "x.pth"
    state = saved_and_loaded(path, checkpoint, to="nnunet")["network_weights"]
    first = "encoder.stages.1.blocks.0.conv1"
    same = [f"{prefix}{first}.{name}.weight" for prefix in ("", "decoder.") for name in
            ("conv", "all_modules.0")]  # fmt: skip
    assert len({state[name].untyped_storage().data_ptr() for name in same}) == 1
    heads = sum(t.numel() for n, t in state.items() if ".seg_layers." in n)
    unique = {t.untyped_storage().data_ptr(): t.numel() for t in state.values()}
    assert sum(unique.values()) == heads + sum(t.numel() for t in checkpoint.tensors.values())


def test_views_are_not_saved_with_all_that_lies_behind_them(tmp_path: Path) -> None:
    checkpoint = make(PLAIN, None)
    behind = torch.zeros(1_000_000)
    tensors = dict(checkpoint.tensors)
    name = "encoder.stem.norm.weight"
    behind[:4] = tensors[name]
    tensors[name] = behind[:4]
    path = tmp_path / "x.pth"
    saved_and_loaded(path, Checkpoint(checkpoint.metadata, tensors), to="nnssl")
    assert path.stat().st_size < 1_000_000


def test_an_encoder_alone_is_exported_as_such_and_said_so() -> None:
    dna = pytest.importorskip("dynamic_network_architectures.building_blocks.residual_encoders")
    exported = export_checkpoint(make(RESIDUAL, None), to="nnunet")
    state = exported.content["network_weights"]
    assert {name.partition(".")[0] for name in state} == {"encoder"}
    notes = " ".join(exported.notes)
    assert "encoder alone" in notes
    assert "--fresh-decoder" in notes
    encoder = dna.ResidualEncoder(
        1, 4, RESIDUAL.features, nn.Conv3d, RESIDUAL.kernels, RESIDUAL.strides, RESIDUAL.blocks,
        conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU, return_skips=True,
    )  # fmt: skip
    encoder.load_state_dict(part(state, "encoder."), strict=True)
    assert "--fresh-decoder" not in " ".join(
        export_checkpoint(make(RESIDUAL, None), to="nnssl").notes
    )


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        (None, "the decoder is new"),
        (UFPNConfig(out_channels=8, first_level=1), "pyramid of a Retina U-Net"),
        (DecoderConfig(convs_per_stage=(1, 1, 1), conv_bias=False), "its decoder is left out"),
    ],
)
def test_a_fresh_decoder_is_asked_for_seeded_and_named_as_new(
    decoder: AnyDecoderConfig | None, words: str
) -> None:
    checkpoint = make(RESIDUAL, decoder)
    state = torch.get_rng_state()
    first = export_checkpoint(checkpoint, to="nnunet", fresh_decoder=True)
    assert torch.equal(state, torch.get_rng_state())
    second = export_checkpoint(checkpoint, to="nnunet", fresh_decoder=True)
    assert words in " ".join(first.notes)
    plans = first.content["init_args"]["plans"]["configurations"]["3d_fullres"]
    network = peer_network(plans["architecture"], channels=1, outputs=2)
    network.load_state_dict(first.content["network_weights"], strict=True)
    for name, tensor in first.content["network_weights"].items():
        assert torch.equal(tensor, second.content["network_weights"][name]), name
    if decoder is not None:
        left_out = export_checkpoint(checkpoint, to="nnunet")
        assert not any(n.startswith("decoder.") for n in left_out.content["network_weights"])


def test_plans_say_what_the_checkpoint_knows_and_null_elsewhere() -> None:
    checkpoint = make(
        RESIDUAL,
        decoder_of(RESIDUAL),
        stems={"ct": Stem(channels=1, modality="CT", dataset="Dataset007", normalization=(CT,))},
        patch_size=(16, 32, 32),
        spacing_mm=(2.0, 1.0, 1.0),
        license="CC-BY-4.0",
        citations=("Doe 2024",),
    )
    content = export_checkpoint(checkpoint, to="nnunet").content
    plans = content["init_args"]["plans"]
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["patch_size"] == [16, 32, 32]
    assert configuration["spacing"] == [2.0, 1.0, 1.0]
    assert configuration["normalization_schemes"] == ["CTNormalization"]
    assert plans["foreground_intensity_properties_per_channel"]["0"] == {
        "mean": 80.0, "std": 60.0, "percentile_00_5": -120.0, "percentile_99_5": 260.0
    }  # fmt: skip
    assert plans["dataset_name"] == "Dataset007"
    assert configuration["architecture"]["arch_kwargs"]["n_conv_per_stage_decoder"] == [1, 2, 1]
    assert content["init_args"]["dataset_json"]["channel_names"] == {"0": "CT"}
    assert content["license"] == "CC-BY-4.0"

    plan = export_checkpoint(checkpoint, to="nnssl").content["nnssl_adaptation_plan"]
    assert plan["pretrain_plan"]["configurations"]["median"]["spacing"] == [2.0, 1.0, 1.0]
    assert plan["recommended_downstream_patchsize"] == [16, 32, 32]

    bare = export_checkpoint(make(RESIDUAL, None), to="nnssl")
    settings = bare.content["nnssl_adaptation_plan"]["pretrain_plan"]["configurations"]
    assert settings["noresample"]["normalization_schemes"] is None
    assert "spacing, patch size, normalisation" in bare.notes[-1]


def test_the_adaptation_plan_leads_to_encoder_stem_and_input_weights() -> None:
    for arch in (RESIDUAL, PLAIN):
        content = export_checkpoint(make(arch, None, channels=3), to="nnssl").content
        plan, state = content["nnssl_adaptation_plan"], content["network_weights"]
        assert plan["pretrain_num_input_channels"] == 3
        assert any(name.startswith(f"{plan['key_to_encoder']}.") for name in state)
        assert any(name.startswith(f"{plan['key_to_stem']}.") for name in state)
        for key in plan["keys_to_in_proj"]:
            assert state[f"{key}.weight"].shape[:2] == (4, 3)


def two_stems() -> Checkpoint:
    encoder = build_encoder(RESIDUAL, in_channels=1)
    ramp(encoder)
    tensors = {n: t for n, t in collect_tensors(encoder).items() if ".stem." not in n}
    for name, channels in {"4": 1, "40": 2}.items():
        stem = build_stem(RESIDUAL, in_channels=channels)
        ramp(stem)
        tensors |= {f"encoder.stems.{name}.{key}": t + channels
                    for key, t in stem.state_dict().items()}  # fmt: skip
    stems = {"4": Stem(channels=1), "40": Stem(channels=2)}
    metadata = CheckpointMetadata(method="multitalent", arch=RESIDUAL, stems=stems)
    return Checkpoint(metadata, tensors, origin="two")


def test_one_of_several_stems_is_named() -> None:
    checkpoint = two_stems()
    with pytest.raises(CheckpointError, match=r"two: has several stems.*4 \(1 ch.\), 40"):
        export_checkpoint(checkpoint, to="nnssl")
    with pytest.raises(CheckpointError, match="no stem '5'"):
        export_checkpoint(checkpoint, to="nnssl", stem="5")
    state = export_checkpoint(checkpoint, to="nnssl", stem="4").content["network_weights"]
    own = checkpoint.tensors["encoder.stems.4.conv.weight"]
    assert torch.equal(state["encoder.stem.convs.0.conv.weight"], own)


def test_only_plain_values_are_written(tmp_path: Path) -> None:
    def check(value: object) -> None:
        match value:
            case dict():
                for key, inner in value.items():
                    assert type(key) is str
                    check(inner)
            case list():
                for inner in value:
                    check(inner)
            case _:
                assert value is None or type(value) in (Tensor, str, int, float, bool)

    for to in ("nnunet", "nnssl"):
        check(saved_and_loaded(tmp_path / "x.pth", make(PLAIN, None), to=to))


def test_the_command_writes_a_file_and_says_what_is_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "a.safetensors", tmp_path / "a.pth"
    write_checkpoint(source, make(RESIDUAL, decoder_of(RESIDUAL), decoder_outputs=5))
    run_app_quietly("export", source, "--to", "nnunet", "-o", out)
    printed = capsys.readouterr().out
    assert "in the layout of nnunet" in printed
    assert "output layers (5 channels) are new" in printed
    content = torch.load(out, weights_only=True)  # noqa: TID251
    assert content["network_weights"]["decoder.seg_layers.0.weight"].shape[0] == 5
    assert list(content["init_args"]["dataset_json"]["labels"].values()) == [0, 1, 2, 3, 4]
    before = source.read_bytes()
    with pytest.raises(SystemExit) as end:
        run_app(app, ["export", str(source), "--to", "nnssl", "-o", str(source)])
    assert end.value.code == 2
    assert source.read_bytes() == before


def run_app_quietly(*arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        run_app(app, [str(argument) for argument in arguments])
    assert not end.value.code


@pytest.mark.parametrize("to", ["nnunet", "nnssl"])
@pytest.mark.parametrize(
    "sample", ["nnssl_mae/checkpoint_final.pth", "nnunet_plain/checkpoint_weights_only.pth"]
)
@torch.no_grad()
def test_import_export_import_is_the_identity(
    sample: str, to: str, shared: Path, tmp_path: Path
) -> None:
    from voxelbridge.core.foreign.import_file import import_checkpoint

    path = shared / "checkpoints" / sample
    if not path.is_file():
        pytest.skip(f"needs {sample}")
    first = import_checkpoint(path).checkpoint
    write_checkpoint(tmp_path / "first.safetensors", first)
    out = tmp_path / "out.pth"
    exported = export_checkpoint(read_checkpoint(tmp_path / "first.safetensors"), to=to)  # type: ignore[arg-type]
    write_exported(out, exported)
    original = torch.load(path, weights_only=True)["network_weights"]  # noqa: TID251
    assert exported.content["network_weights"].keys() == original.keys()
    for name, tensor in exported.content["network_weights"].items():
        assert tensor.shape == original[name].shape, name
        assert ".seg_layers." in name or torch.equal(tensor, original[name]), name
    second = import_checkpoint(out).checkpoint
    assert second.tensors.keys() == first.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name
    assert second.metadata == first.metadata


@pytest.mark.parametrize("to", ["nnunet", "nnssl"])
def test_what_no_layout_can_say_survives_the_way_there_and_back(to: str, tmp_path: Path) -> None:
    from voxelbridge.core.foreign.import_file import import_checkpoint

    first = make(
        RESIDUAL,
        None,
        method="voco",
        stems={"mr-t1": Stem(channels=1, modality="MR", dataset="ABCD")},
        source={"datasets": ("ABCD", "CT-RATE"), "steps": 7},
        license="CC-BY-SA-4.0",
        citations=("Doe 2024",),
        init="kaiming",
    )
    out = tmp_path / "x.pth"
    write_exported(out, export_checkpoint(first, to=to, fresh_decoder=True))  # type: ignore[arg-type]
    second = import_checkpoint(out).checkpoint
    assert second.metadata == first.metadata
    assert second.tensors.keys() == first.tensors.keys()  # without the fresh decoder
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name


def test_metadata_of_other_weights_are_refused(tmp_path: Path) -> None:
    from voxelbridge.core.foreign.import_file import import_checkpoint

    exported = export_checkpoint(make(RESIDUAL, None), to="nnssl")
    other = export_checkpoint(make(RESIDUAL, None, channels=2), to="nnssl")
    exported.content["voxelbridge"] = other.content["voxelbridge"]
    write_exported(tmp_path / "x.pth", exported)
    with pytest.raises(CheckpointError, match="its weights are not those that its metadata"):
        import_checkpoint(tmp_path / "x.pth")
