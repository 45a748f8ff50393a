import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from voxelbridge.core.arch.decoder import build_any_decoder
from voxelbridge.core.checkpoint import read_checkpoint
from voxelbridge.core.config import config_hash, load_config, preset_path
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.errors import CheckpointError, ConfigError
from voxelbridge.core.transfer import load_encoder, transfer_decoder
from voxelbridge.pretrain_sup.config import MultiTalentConfig
from voxelbridge.pretrain_sup.export import export
from voxelbridge.pretrain_sup.train import train
from voxelbridge.pretrain_sup.weights import read_network, saved_weights

SETTINGS = ("patch_size=[16,16,16]", "batch_size=2", "schedule.steps=2", "validation_patches=0")
NAMES = ("multitalent_small", "multitalent_retina_unet_small")


def config_of(preset: str) -> MultiTalentConfig:
    path = preset_path("voxelbridge.pretrain_sup", preset)
    return load_config(MultiTalentConfig, path, SETTINGS).config


@pytest.fixture(scope="module", params=NAMES)
def run(
    request: pytest.FixtureRequest, organs_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    train(config_of(request.param), store=organs_store, run=folder, device="cpu")
    return folder


def test_the_file_says_everything_about_its_weights(
    run: Path, organs_store: Path, tmp_path: Path
) -> None:
    path = tmp_path / "out.safetensors"
    written = export(run, path, license_name="CC-BY-4.0")
    metadata = read_checkpoint(path).metadata
    assert written == metadata
    config = read_network(run).config
    assert metadata.method == "multitalent"
    assert metadata.decoder == config.decoder
    assert {name: stem.channels for name, stem in metadata.stems.items()} == {
        "organs": 1,
        "glioma": 2,
        "lung": 1,
    }
    assert metadata.default_stem == "organs"  # has most cases
    zscore = {"name": "zscore", "nonzero_only": False}
    glioma = metadata.stems["glioma"]
    assert (glioma.modality, glioma.dataset) == ("T1+T2", "glioma")
    assert metadata.normalization_of("glioma") == (zscore, zscore)
    assert metadata.normalization == (zscore,)
    assert metadata.spacing_mm == (1.0, 1.0, 1.0)
    assert metadata.patch_size == (16, 16, 16)
    assert metadata.init == "kaiming"
    assert metadata.license == "CC-BY-4.0"
    assert metadata.source.datasets == ("organs", "glioma", "lung")
    assert metadata.source.steps == 2
    assert metadata.source.config_hash == config_hash(config)
    assert metadata.source.data_sha256 == CaseStore.open(organs_store).digest
    assert "2303.14444" in " ".join(metadata.citations)
    assert "2509.15947" in " ".join(metadata.citations)


def test_nothing_about_patients_or_heads_is_in_the_file(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    export(run, path)
    content = path.read_bytes()
    for secret in (b"organs__c", b"patient", str(run).encode()):
        assert secret not in content
    assert {name.split(".")[0] for name in read_checkpoint(path).tensors} == {"encoder", "decoder"}


def test_stems_trunk_and_decoder_are_those_of_the_run(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    export(run, path, default_stem="glioma")
    network = read_network(run).network
    image = torch.randn(1, 2, 16, 16, 16)
    encoder = load_encoder(path)  # the default stem
    maps = encoder(image)
    for found, expected in zip(maps, network.encoder([("glioma", image)]), strict=True):
        torch.testing.assert_close(found, expected)
    checkpoint = read_checkpoint(path)
    assert checkpoint.metadata.decoder is not None
    decoder = build_any_decoder(checkpoint.metadata.decoder, encoder.config)
    report = transfer_decoder(checkpoint, decoder)
    assert report.left_at_init == ()
    for found, expected in zip(decoder(maps), network.decoder(maps), strict=True):
        torch.testing.assert_close(found, expected)


def test_export_gives_the_finished_checkpoint_again(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out.safetensors")
    final = (run / "checkpoints" / "final.safetensors").read_bytes()
    assert (tmp_path / "out.safetensors").read_bytes() == final


def test_an_unknown_default_stem_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"spine: no such stem; there are organs, glioma, lung"):
        export(run, tmp_path / "out.safetensors", default_stem="spine")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_run_without_a_state_or_with_another_one_is_refused(
    organs_store: Path, tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    run = tmp_path / "run"
    train(config_of(NAMES[0]), store=organs_store, run=run, device="cpu")
    other = write_store(tmp_path / "store", ("organs",), layout="per_dataset")
    (run / "label_space.json").write_bytes((other / "label_space.json").read_bytes())
    with pytest.raises(CheckpointError, match="does not fit its run's config") as caught:
        export(run, tmp_path / "out.safetensors")
    assert "\n" not in str(caught.value)
    pointer = run / "checkpoints" / "state.json"
    (run / "checkpoints" / json.loads(pointer.read_text())["file"]).unlink()
    pointer.unlink()
    with pytest.raises(CheckpointError, match="no training state yet"):
        saved_weights(run)
