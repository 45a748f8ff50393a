"""Model cards say what the checkpoint says, and what it does not say as unknown."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from voxelbridge.core.arch.config import EncoderConfig
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.checkpoint import (
    Checkpoint,
    CheckpointMetadata,
    Source,
    Stem,
    collect_tensors,
    write_checkpoint,
)
from voxelbridge.core.cli import app
from voxelbridge.core.command_line import run_app
from voxelbridge.core.model_card import model_card

ARCH = EncoderConfig(
    kind="plain",
    features=(2, 3),
    strides=((1, 1, 1), (2, 2, 2)),
    kernels=((3, 3, 3), (3, 3, 3)),
    blocks=(2, 2),
    conv_bias=False,
)
FACTS: dict[str, Any] = {
    "stems": {"ct": Stem(channels=1, modality="CT", normalization=({"name": "zscore"},))},
    "patch_size": (16, 16, 16),
    "spacing_mm": (2.0, 1.0, 1.0),
    "normalization": ({"name": "zscore"},),
    "source": Source(datasets=("CT-RATE",), steps=1_000_000),
    "citations": ("Doe et al.\n2024",),
    "license": "CC-BY-4.0",
}


def make(**facts: Any) -> Checkpoint:
    torch.manual_seed(0)
    metadata = CheckpointMetadata.model_validate(
        {"method": "mae", "arch": ARCH, "stems": {"main": Stem(channels=1)}} | facts
    )
    return Checkpoint(metadata, collect_tensors(build_encoder(ARCH, in_channels=1)))


def front_matter(card: str) -> str:
    start, block, _ = card.split("---\n", 2)
    assert start == ""
    return block


def test_known_facts_stand_in_the_card() -> None:
    card = model_card(make(**FACTS), title="Encoder", file_name="e.safetensors")
    yaml = pytest.importorskip("yaml")
    facts = yaml.safe_load(front_matter(card))
    assert facts["license"] == "cc-by-4.0"
    assert facts["library_name"] == "voxelbridge"
    assert {"medical-imaging", "mae", "CT"} <= set(facts["tags"])
    for text in (
        "# Encoder", "masked autoencoding", "| data sets | CT-RATE |",
        "| optimiser steps | 1,000,000 |", "| spacing (mm, z y x) | 2 x 1 x 1 |",
        "| normalisation | zscore |", "- Doe et al. 2024", "no medical device",
    ):  # fmt: skip
        assert text in card, text
    assert "does not say" not in card


def test_unknown_facts_are_said_to_be_unknown() -> None:
    card = model_card(make(), title="E", file_name="e.safetensors")
    assert "license: unknown" in front_matter(card)
    assert "| data sets | not stated |" in card
    assert "ask its authors before using them" in card
    assert "The file does not say: the training data; the voxel spacing" in card


@pytest.mark.parametrize("name", ["Custom: terms # 1", "yes", "a\nb: c"])
def test_odd_licences_cannot_break_the_front_matter(name: str) -> None:
    yaml = pytest.importorskip("yaml")
    block = front_matter(model_card(make(license=name), title="E", file_name="e.safetensors"))
    facts = yaml.safe_load(block)
    assert facts["license"] == "other"
    assert facts["license_name"] == " ".join(name.split())


def test_the_code_in_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make(**FACTS)
    card = model_card(checkpoint, title="E", file_name="e.safetensors")
    write_checkpoint(tmp_path / "e.safetensors", checkpoint)
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert len(code) == 1
    assert len([line for line in code[0].splitlines() if line]) == 5
    names: dict[str, Any] = {}
    exec(code[0], names)
    assert [tuple(stage.shape[1:]) for stage in names["features"]] == [
        (2, 16, 16, 16),
        (3, 8, 8, 8),
    ]


def test_the_command_writes_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = write_checkpoint(tmp_path / "e.safetensors", make(**FACTS))
    out = tmp_path / "README.md"
    with pytest.raises(SystemExit) as end:
        run_app(app, ["card", str(tmp_path / "e.safetensors"), "-o", str(out), "--title", "T"])
    assert not end.value.code
    assert "read it before you publish it" in capsys.readouterr().out
    text = out.read_text(encoding="utf-8")
    assert "# T\n" in text
    assert str(written.tensors_sha256) in text
    assert str(tmp_path) not in text
