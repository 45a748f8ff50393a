"""Where the settings of a run came from: RUN/preset.json, and what `vb-detect show` prints.

    schema     1
    preset     the name or file that the run was started with
    sha256     of that file
    overrides  every KEY=VALUE of `--set` and of options that stand for a setting
    origins    of each dotted key: default, preset, a preset that it extends, plan, --set

Written at the first start; the values themselves are in config.json.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from voxelbridge.core.config import Config, Resolved, flatten, preset_path, validate
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.files import read_json, sha256_of, write_json
from voxelbridge.core.run import CONFIG_FILE, read_run_config
from voxelbridge.detect.build import resolve_detect_config
from voxelbridge.detect.config import DetectConfig

KIND = "detect"
FILE_NAME = "preset.json"
UNKNOWN = "run"  # origin of the values of a run without the file


class Origins(Config):
    """Content of the file."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    preset: str
    sha256: str
    overrides: tuple[str, ...]
    origins: dict[str, str]


def write_origins(
    run: Path, preset: str, overrides: Sequence[str], resolved: Resolved[DetectConfig]
) -> None:
    """Writes the file where it is not there yet: the first start of a run decides."""
    path = run / FILE_NAME
    if path.exists():
        return
    source = preset_path("voxelbridge.detect", preset)
    origins = Origins(
        preset=preset,
        sha256=sha256_of(source),
        overrides=tuple(overrides),
        origins=dict(resolved.origins),
    )
    write_json(path, origins.model_dump(mode="json", by_alias=True))


def settings_of(
    preset_or_run: str, overrides: Sequence[str] = (), *, store: Path | None = None
) -> Resolved[DetectConfig]:
    """Every setting of a preset, or of a run directory, with its origin."""
    folder = Path(preset_or_run)
    if (folder / CONFIG_FILE).is_file():
        if overrides or store:
            raise ConfigError(
                f"{folder}: a run has its settings; --set and --store are for presets"
            )
        return _of_run(folder)
    from voxelbridge.detect.plan import read_plan

    plan = read_plan(store) if store else None
    return resolve_detect_config(preset_or_run, overrides, plan=plan)


def _of_run(run: Path) -> Resolved[DetectConfig]:
    config = read_run_config(run, DetectConfig, kind=KIND)
    path = run / FILE_NAME
    known: dict[str, str] = {}
    if path.is_file():
        known = validate(Origins, read_json(path), where=str(path)).origins
    keys = flatten(config.model_dump(mode="json"))
    return Resolved(config, {key: known.get(key, UNKNOWN) for key in keys})
