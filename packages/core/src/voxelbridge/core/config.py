"""Configurations: frozen pydantic models filled from a TOML preset and `--set key=value`.

A choice between variants is a union of models told apart by a `name` field
(`Field(discriminator="name")`; in a checkpoint by `kind`). Values are checked strictly: no text
becomes a number, no number becomes text, unknown keys are errors that suggest the nearest known
one.
"""

import difflib
import hashlib
import json
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from voxelbridge.core.errors import ConfigError

Tree = dict[str, Any]  # Any: a TOML or JSON tree before validation


class Config(BaseModel):
    """Base of all configurations: frozen, strict, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Resolved(Generic[C]):
    """A validated config and where each of its values came from.

    `origins` maps each dotted key to "default", "preset" or "--set".
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


def load_config(model: type[C], source: Path, overrides: Sequence[str] = ()) -> Resolved[C]:
    """The config in `source` (TOML, or JSON as written to a run directory) with overrides applied.

    `overrides` are `dotted.key=value` texts; a value is read by the type of its field, so that
    text stays text (`tag=007`) and everything else is written as in JSON (`patch_size=[8,8,8]`).
    Raises ConfigError naming the file, the dotted key, what was got and what is legal.
    """
    tree = _read_tree(source)
    from_file = set(flatten(tree))
    overridden: set[str] = set()
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {override}: expected KEY=VALUE, such as batch_size=2")
        _assign(tree, key, _read_value(model, tree, key, text))
        overridden |= {key}
    config = validate(model, tree, where=str(source))
    origins = {
        key: "--set" if _covered(key, overridden) else "preset" if key in from_file else "default"
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
        raise ConfigError(f"{where}: {_explain(model, tree, problems[0])}{more}") from None


def preset_path(package: str, name_or_path: str) -> Path:
    """The TOML file of a preset shipped in `package`/presets, or the file that a path names."""
    folder = Path(str(resources.files(package) / "presets"))
    shipped = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    if path.suffix in (".toml", ".json") and path.is_file():
        return path
    near = difflib.get_close_matches(name_or_path, shipped, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"preset {name_or_path}: neither a shipped preset nor a .toml file; "
        f"shipped are {', '.join(shipped)}{hint}"
    )


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
    annotation, known, parent = _locate(model, tree, key.split("."))
    if annotation is None:
        raise ConfigError(f"--set {key}: no such setting{_suggestion(key, known, parent)}")
    adapter = TypeAdapter(annotation)
    if text in ("null", "none") and _accepts(adapter, None):
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


def _locate(
    model: type[Config], tree: object, parts: Sequence[str]
) -> tuple[Any, list[str], str]:  # Any: a type annotation
    """Annotation of the field at `parts` (None if there is none), known names, parent's key."""
    current: type[Config] | None = model
    annotation: Any = model  # Any: annotations have no common type
    path: list[str] = []
    for part in parts:
        if current is None:
            return None, [], ".".join(path)
        field = current.model_fields.get(part)
        if field is None:
            return None, list(current.model_fields), ".".join(path)
        annotation = field.annotation
        value = tree.get(part) if isinstance(tree, dict) else None
        default = field.get_default(call_default_factory=False)
        current = _chosen_model(annotation, value, default)
        tree = value
        path.append(part)
    return annotation, [], ".".join(path[:-1])


def _chosen_model(annotation: object, value: object, default: object) -> type[Config] | None:
    models = _models(annotation)
    name = value.get("name", value.get("kind")) if isinstance(value, dict) else None
    if name is None:
        name = getattr(default, "name", getattr(default, "kind", None))
    for model in models:
        if len(models) == 1 or name in _names(model):
            return model
    return None


def _models(annotation: object) -> list[type[Config]]:
    if get_origin(annotation) is Annotated:
        return _models(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [model for member in get_args(annotation) for model in _models(member)]
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return []


def _names(model: type[Config]) -> tuple[object, ...]:
    field = model.model_fields.get("name") or model.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def _tag_of(parent: type[Config] | None, location: Sequence[str]) -> str:
    """What tells the variants at `location` apart: `name`, in parts of a checkpoint `kind`."""
    field = parent.model_fields.get(location[-1]) if parent else None
    variants = _models(field.annotation) if field else []
    return "kind" if any("kind" in variant.model_fields for variant in variants) else "name"


def _explain(model: type[Config], tree: Tree, problem: Any) -> str:  # Any: pydantic's ErrorDetails
    location, parent_model = _plain_location(model, problem["loc"])
    key = ".".join(location) or "the whole file"
    message = problem["msg"].removeprefix("Value error, ")
    match problem["type"]:
        case "value_error" if not location:  # a rule over several settings names them itself
            return message
        case "extra_forbidden":
            known = list(parent_model.model_fields) if parent_model else []
            return f"{key}: no such setting{_suggestion(key, known, '.'.join(location[:-1]))}"
        case "missing":
            return f"{key}: missing; it has no default and must be set"
        case "union_tag_not_found" | "union_tag_invalid":
            legal = (problem.get("ctx") or {}).get("expected_tags", "")
            tag = _tag_of(parent_model, location)
            return f"{key}.{tag}: got {_got(tree, (*location, tag))}, expected one of {legal}"
        case _:
            return f"{key}: got {_got(tree, location)}; {message[:1].lower()}{message[1:]}"


def _plain_location(
    model: type[Config], raw: Sequence[str | int]
) -> tuple[tuple[str, ...], type[Config] | None]:
    """pydantic's location without the union tags, and the model that holds the last key."""
    location: list[str] = []
    parent: type[Config] | None = model
    choices: list[type[Config]] = [model]
    for part in raw:
        if len(choices) > 1:  # this part is the tag of a union
            chosen = [choice for choice in choices if part in _names(choice)]
            choices = chosen or choices[:1]
            if chosen:
                continue
        parent = choices[0] if choices else None
        location.append(str(part))
        field = parent.model_fields.get(str(part)) if parent else None
        choices = _models(field.annotation) if field else []
    return tuple(location), parent


def _got(tree: object, location: Sequence[str]) -> str:
    for part in location:
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return "nothing"
    return json.dumps(tree)


def _suggestion(key: str, known: Sequence[str], parent: str) -> str:
    last = key.rsplit(".", 1)[-1]
    prefix = f"{parent}." if parent else ""
    near = difflib.get_close_matches(last, known, n=1)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    return f"; known here are {', '.join(known)}" if known else ""


def _covered(key: str, overridden: set[str]) -> bool:
    return any(key == given or key.startswith(f"{given}.") for given in overridden)
