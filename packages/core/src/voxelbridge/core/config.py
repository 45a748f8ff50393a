"""Configurations: frozen pydantic models filled from a TOML preset and `--set key=value`.

A preset may begin with `extends = "resenc_retunet"`, the name of a shipped preset of the model's
package or a file relative to its own folder: it then states only what differs. Tables are merged
key by key; one that names another variant takes the place of the base's.

A choice between variants is a union of models told apart by a `name` field
(`Field(discriminator="name")`; in a checkpoint by `kind`). Values are checked strictly: no text
becomes a number, no number becomes text, unknown keys are errors that suggest the nearest known
one.
"""

import copy
import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from voxelbridge.core.config_errors import explain
from voxelbridge.core.config_fields import chosen_model, locate, suggestion
from voxelbridge.core.errors import ConfigError

Tree = dict[str, Any]  # Any: a TOML or JSON tree before validation


class Config(BaseModel):
    """Base of all configurations: frozen, strict, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


C = TypeVar("C", bound=Config)

EXTENDS = "extends"
_NONE = ("null", "none")  # what stands for None on the command line and, as text, in a TOML file


@dataclass(frozen=True)
class Layer:
    """What one file of a chain of `extends` states itself."""

    source: Path
    tree: Tree


@dataclass(frozen=True)
class Resolved(Generic[C]):
    """A validated config and where each of its values came from.

    `origins` maps each dotted key to "default", "preset", the file name of a preset that the
    preset extends, or "--set".
    """

    config: C
    origins: Mapping[str, str]

    def describe(self) -> str:
        """One `key = value  (origin)` line per value, in the order of the model."""
        values = flatten(self.config.model_dump(mode="json"))
        width = max((len(key) for key in values), default=0)
        lines = [
            f"{key:<{width}} = {json.dumps(value)}  ({self.origins[key]})"
            for key, value in values.items()
        ]
        return "\n".join(lines)

    def as_json(self) -> Tree:
        """`{key: {"value": value, "origin": origin}}`, in the order of the model."""
        values = flatten(self.config.model_dump(mode="json"))
        return {key: {"value": value, "origin": self.origins[key]} for key, value in values.items()}


def load_config(model: type[C], source: Path, overrides: Sequence[str] = ()) -> Resolved[C]:
    """The config in `source` (TOML, or JSON as written to a run directory) with overrides applied.

    `overrides` are `dotted.key=value` texts; a value is read by the type of its field, so that
    text stays text (`tag=007`) and everything else is written as in JSON (`patch_size=[8,8,8]`).
    Raises ConfigError naming the file (or `--set`, where the file alone is sound), the dotted key,
    what was got and what is legal.
    """
    tree, stated = _merged(model, read_layers(model, source))
    own = copy.deepcopy(tree)
    overridden: set[str] = set()
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {override}: expected KEY=VALUE, such as batch_size=2")
        _assign(tree, key, _read_value(model, tree, key, text))
        overridden |= {key}
    config = validate(model, tree, where=_place(model, source, own, overrides))
    origins = {
        key: "--set" if _covered(key, overridden) else stated.get(key, "default")
        for key in flatten(config.model_dump(mode="json"))
    }
    return Resolved(config, origins)


def validate(model: type[C], tree: Tree, *, where: str) -> C:
    """`tree` as a checked `model`; the first problem becomes one ConfigError line."""
    try:
        # The JSON mode of pydantic is strict and still takes arrays for tuples.
        return model.model_validate_json(json.dumps(tree))
    except TypeError as error:
        raise ConfigError(f"{where}: {error}; only text, numbers, booleans and lists") from error
    except ValidationError as error:
        problems = error.errors(include_url=False)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{where}: {explain(model, tree, problems[0])}{more}") from None


def preset_path(package: str, name_or_path: str) -> Path:
    """The TOML file of a preset shipped in `package`/presets, or the file that a path names."""
    shipped = _shipped(package)
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    if path.suffix in (".toml", ".json") and path.is_file():
        return path
    raise ConfigError(
        f"preset {name_or_path}: neither a shipped preset nor a .toml file; "
        f"{_shipped_list(name_or_path, shipped)}"
    )


def read_layers(model: type[Config], source: Path) -> list[Layer]:
    """What `source` states, then what the file states that it extends, and so on.

    ConfigError for a file that cannot be read, a base that is not there and a circle.
    """
    layers: list[Layer] = []
    seen: list[Path] = []
    path: Path | None = source
    while path is not None:
        if path.resolve() in seen:
            chain = " -> ".join(layer.source.name for layer in layers)
            raise ConfigError(f"{source}: {EXTENDS} runs in a circle: {chain} -> {path.name}")
        seen.append(path.resolve())
        tree = _read_tree(path)
        base = tree.pop(EXTENDS, None) if path.suffix != ".json" else None
        layers.append(Layer(path, tree))
        path = None if base is None else _base_path(model, path, base)
    return layers


def merged_settings(model: type[Config], source: Path) -> Tree:
    """What `source` states together with what it extends, not yet checked."""
    return _merged(model, read_layers(model, source))[0]


def config_hash(config: Config) -> str:
    """SHA-256 over all values; equal configs have equal hashes whatever their origin."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def flatten(tree: Tree, prefix: str = "") -> Tree:
    """Nested tables as one table of dotted keys; lists count as values."""
    flat: Tree = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing_keys(first: Config, second: Config) -> list[str]:
    """`key: first's value -> second's value` for every dotted key in which two configs differ."""
    a, b = (flatten(config.model_dump(mode="json")) for config in (first, second))
    keys = [key for key in a | b if a.get(key) != b.get(key)]
    return [f"{key}: {a.get(key, 'absent')} -> {b.get(key, 'absent')}" for key in keys]


def _read_tree(source: Path) -> Tree:
    try:
        text = source.read_text(encoding="utf-8")
        tree = json.loads(text) if source.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected a table of settings, got {type(tree).__name__}")
    if source.suffix == ".json":  # a run's config.json says besides what it is
        return {key: value for key, value in tree.items() if key not in ("schema", "kind")}
    return tree


def _shipped(package: str) -> dict[str, Path]:
    try:
        folder = Path(str(resources.files(package) / "presets"))
    except (ModuleNotFoundError, ValueError):  # a model of a script or a notebook
        return {}
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _shipped_list(name: str, shipped: Mapping[str, Path]) -> str:
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}shipped are {', '.join(shipped) or 'none'}"


def _base_path(model: type[Config], source: Path, base: object) -> Path:
    """The file that `extends = base` in `source` means."""
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{source}: {EXTENDS}: got {base!r}, expected the name of a preset or a file"
        )
    shipped = _shipped(model.__module__.rpartition(".")[0])
    if base in shipped:
        return shipped[base]
    for path in (source.parent / base, source.parent / f"{base}.toml"):
        if path.suffix in (".toml", ".json") and path.is_file():
            return path
    raise ConfigError(
        f"{source}: {EXTENDS} = {base}: neither a shipped preset nor a .toml file relative to "
        f"{source.parent}; {_shipped_list(base, shipped)}"
    )


def _merged(model: type[Config], layers: Sequence[Layer]) -> tuple[Tree, dict[str, str]]:
    """All layers as one tree, and the origin of each dotted key in it."""
    tree: Tree = {}
    origins: dict[str, str] = {}
    for layer in reversed(layers):
        tree = _extended(model, tree, layer.tree)
        own = flatten(layer.tree)
        name = "preset" if layer is layers[0] else layer.source.name
        origins = {key: name if key in own else origins.get(key, name) for key in flatten(tree)}
    return tree, origins


def _extended(model: type[BaseModel] | None, base: Tree, own: Tree) -> Tree:
    """`base` with the values of `own`; tables of the same variant are merged."""
    merged = dict(base)
    for key, value in own.items():
        field = model.model_fields.get(key) if model else None
        annotation = field.annotation if field else None
        if isinstance(value, dict):
            default = field.get_default(call_default_factory=False) if field else None
            before = base.get(key)
            kept: Tree = before if isinstance(before, dict) else {}
            chosen = chosen_model(annotation, value, default)
            if not (value.keys() & {"name", "kind"}):
                chosen = chosen_model(annotation, kept, default)
            elif chosen is not chosen_model(annotation, kept, default):
                kept = {}
            merged[key] = _extended(chosen, kept, value)
        elif value in _NONE and annotation and _means_none(TypeAdapter(annotation), value):
            merged[key] = None
        else:
            merged[key] = value
    return merged


def _means_none(adapter: TypeAdapter[Any], text: str) -> bool:
    return _accepts(adapter, None) and not _accepts(adapter, text)


def _place(model: type[Config], source: Path, own: Tree, overrides: Sequence[str]) -> str:
    """What an error in the settings of `source`, whose own ones are `own`, has to name."""
    if not overrides:
        return str(source)
    try:
        validate(model, own, where=str(source))
    except ConfigError:
        return f"{source} with --set"
    return "--set"


def _assign(tree: Tree, key: str, value: object) -> None:
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: {parent} is a single value, not a table")
        node = child
    node[last] = value


def _read_value(model: type[Config], tree: Tree, key: str, text: str) -> object:
    annotation, known, parent = locate(model, tree, key.split("."))
    if annotation is None:
        raise ConfigError(f"--set {key}: no such setting{suggestion(key, known, parent)}")
    adapter = TypeAdapter(annotation)
    if text in _NONE and _accepts(adapter, None):
        return None
    if _accepts(adapter, text):
        return text
    try:
        return json.loads(text.replace("_", "")) if _is_number(text) else json.loads(text)
    except ValueError:
        return text  # the validation names the field and what is legal


def _accepts(adapter: TypeAdapter[Any], value: object) -> bool:
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _is_number(text: str) -> bool:
    try:
        float(text)  # takes 1_000, which JSON does not
    except ValueError:
        return False
    return True


def _covered(key: str, overridden: set[str]) -> bool:
    return any(key == given or key.startswith(f"{given}.") for given in overridden)
