"""Configs: strict values, readable errors, origins of values."""

import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from voxelbridge.core.config import (
    Config,
    config_hash,
    differing_keys,
    load_config,
    preset_path,
)
from voxelbridge.core.errors import ConfigError


class Poly(Config):
    name: Literal["poly"] = "poly"
    steps: int = Field(gt=0)
    power: float = 0.9


class Constant(Config):
    name: Literal["constant"] = "constant"
    steps: int


class Example(Config):
    tag: str = "none given"
    patch_size: tuple[int, int, int]
    precision: Literal["fp32", "bf16"] = "fp32"
    clip: float | None = 12.0
    schedule: Annotated[Poly | Constant, Field(discriminator="name")]
    shares: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)


TOML = 'patch_size = [8, 8, 8]\n[schedule]\nname = "poly"\nsteps = 10\n'


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "example.toml"
    path.write_text(TOML)
    return path


def _error(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Example, path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_values_and_their_origins(preset: Path) -> None:
    resolved = load_config(Example, preset, ["schedule.power=0.5", "patch_size=[4,8,16]"])
    assert resolved.config.patch_size == (4, 8, 16)
    assert resolved.config.schedule == Poly(steps=10, power=0.5)
    assert resolved.origins["schedule.power"] == "--set"
    assert resolved.origins["schedule.steps"] == "preset"
    assert resolved.origins["tag"] == "default"
    assert "schedule.power = 0.5  (--set)" in resolved.describe()


@pytest.mark.parametrize("text", ["007", "1.5", "2024-01-01", "true", "[1]"])
def test_text_fields_keep_their_text(preset: Path, text: str) -> None:
    assert load_config(Example, preset, [f"tag={text}"]).config.tag == text


def test_none_is_read_where_a_field_may_be_none(preset: Path) -> None:
    assert load_config(Example, preset, ["clip=none"]).config.clip is None
    assert load_config(Example, preset, ["clip=3"]).config.clip == 3.0


def test_underscores_and_exponents_are_numbers(preset: Path) -> None:
    resolved = load_config(Example, preset, ["schedule.steps=1_000", "schedule.power=1e-2"])
    assert resolved.config.schedule == Poly(steps=1000, power=0.01)


def test_an_unknown_key_suggests_the_nearest(preset: Path) -> None:
    assert "did you mean patch_size?" in _error(preset, "patchsize=[1,2,3]")
    assert "did you mean schedule.power?" in _error(preset, "schedule.pover=1")
    preset.write_text(TOML + "powr = 1\n")
    message = _error(preset)
    assert "schedule.powr" in message
    assert "did you mean schedule.power?" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("schedule.steps=0", "schedule.steps: got 0"),
        ("schedule.steps=1.5", "schedule.steps: got 1.5"),
        ("schedule.steps=true", "schedule.steps: got true"),
        ("schedule.steps=abc", 'schedule.steps: got "abc"'),
        ("precision=fp16", "'fp32' or 'bf16'"),
        ("patch_size=[1,2]", "patch_size"),
        ("schedule.name=cosine", 'schedule.name: got "cosine"'),
        ("schedule={}", "schedule.name: got nothing, expected one of 'poly', 'constant'"),
        ('schedule={"name": null}', "schedule.name: got null, expected one of 'poly', 'constant'"),
        ("tag", "expected KEY=VALUE"),
        ("tag.deeper=1", "tag.deeper"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_legal(
    preset: Path, override: str, expected: str
) -> None:
    assert expected in _error(preset, override)


def test_a_wrong_value_names_where_it_was_given(preset: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--set: precision: got \"fp8\""):
        load_config(Example, preset, ["precision=fp8"])
    preset.write_text(TOML.replace("10", "-1"))
    with pytest.raises(ConfigError, match=rf"^{preset}: schedule\.steps: got -1"):
        load_config(Example, preset)
    with pytest.raises(ConfigError, match=rf"^{preset} with --set: schedule\.steps: got -1"):
        load_config(Example, preset, ["tag=a"])


def test_a_missing_field_is_named(preset: Path) -> None:
    preset.write_text("[schedule]\nname = 'poly'\nsteps = 1\n")
    assert "patch_size: missing" in _error(preset)


def test_broken_toml_and_a_missing_file_are_config_errors(preset: Path) -> None:
    preset.write_text("patch_size = [")
    assert "example.toml" in _error(preset)
    assert "cannot be read" in _error(preset.with_name("absent.toml"))


def test_the_variant_can_be_changed_by_name(preset: Path) -> None:
    resolved = load_config(Example, preset, ["schedule.name=constant"])
    assert resolved.config.schedule == Constant(steps=10)


def test_config_written_as_json_reads_back_equal(preset: Path, tmp_path: Path) -> None:
    config = load_config(Example, preset).config
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"schema": 1, "kind": "x", **config.model_dump(mode="json")}))
    again = load_config(Example, path).config
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert differing_keys(config, again) == []


def test_differing_keys_name_both_values(preset: Path) -> None:
    first = load_config(Example, preset).config
    second = load_config(Example, preset, ["schedule.steps=11"]).config
    assert differing_keys(first, second) == ["schedule.steps: 10 -> 11"]
    assert config_hash(first) != config_hash(second)


def test_an_unknown_preset_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="neither a shipped preset nor"):
        preset_path("voxelbridge.core", "nothing_like_it")


def _beside(preset: Path, name: str, text: str) -> Path:
    path = preset.with_name(name)
    path.write_text(text)
    return path


def test_a_preset_states_only_what_differs_from_the_one_it_extends(preset: Path) -> None:
    middle = _beside(preset, "middle.toml", 'extends = "example"\ntag = "m"\nclip = "none"\n')
    last = _beside(preset, "last.toml", 'extends = "middle.toml"\n[schedule]\npower = 0.5\n')
    resolved = load_config(Example, last, ["tag=t"])
    assert resolved.config.schedule == Poly(steps=10, power=0.5)
    assert resolved.config.patch_size == (8, 8, 8)
    assert resolved.config.clip is None
    assert resolved.origins == {
        "tag": "--set", "patch_size": "example.toml", "precision": "default",
        "clip": "middle.toml", "schedule.name": "example.toml", "schedule.steps": "example.toml",
        "schedule.power": "preset", "shares": "default",
    }  # fmt: skip
    assert "patch_size     = [8, 8, 8]  (example.toml)" in resolved.describe()
    written = _beside(preset, "config.json", json.dumps(resolved.config.model_dump(mode="json")))
    again = _beside(preset, "again.toml", f'extends = "{written.name}"\n')
    assert load_config(Example, again).config == resolved.config
    assert load_config(Example, middle).config.tag == "m"


def test_another_variant_takes_the_place_of_the_extended_one(preset: Path) -> None:
    poly = _beside(preset, "poly.toml", 'extends = "example"\n[schedule]\npower = 0.5\n')
    text = 'extends = "poly"\n[schedule]\nname = "constant"\nsteps = 3\n'
    resolved = load_config(Example, _beside(poly, "other.toml", text))
    assert resolved.config.schedule == Constant(steps=3)
    _beside(poly, "other.toml", text.replace("steps = 3", ""))
    assert "schedule.steps: missing" in _error(poly.with_name("other.toml"))


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("own", "own.toml: extends runs in a circle: own.toml -> own.toml"),
        ("b.toml", "own.toml: extends runs in a circle: own.toml -> b.toml -> own.toml"),
        ("absent", "own.toml: extends = absent: neither a shipped preset nor a .toml file"),
        ("", "extends: got ''"),
    ],
)
def test_a_base_that_cannot_be_extended_is_one_line(preset: Path, base: str, expected: str) -> None:
    _beside(preset, "b.toml", 'extends = "own"\n')
    assert expected in _error(_beside(preset, "own.toml", f'extends = "{base}"\n'))


@pytest.mark.parametrize(
    "override", ["shares.organs=4.0", "shares.organs=4", 'shares={"organs": 4.0}']
)
def test_a_table_of_free_keys_is_set_whole_or_by_key(preset: Path, override: str) -> None:
    assert load_config(Example, preset, [override]).config.shares == {"organs": 4.0}


def test_keys_of_a_table_are_added_to_those_of_the_preset(preset: Path) -> None:
    preset.write_text(TOML + "[shares]\nlungs = 1.0\norgans = 2.0\n")
    resolved = load_config(Example, preset, ["shares.organs=4.5", "shares.Set_7-x=0"])
    assert resolved.config.shares == {"lungs": 1.0, "organs": 4.5, "Set_7-x": 0.0}
    assert resolved.origins["shares.organs"] == "--set"
    assert resolved.origins["shares.lungs"] == "preset"
    assert 'shares.organs: got "many"' in _error(preset, "shares.organs=many")
    assert "shares.organs: got -1" in _error(preset, "shares.organs=-1")
    assert "shares.organs.x" in _error(preset, "shares.organs.x=1")
