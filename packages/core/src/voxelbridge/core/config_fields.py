"""What a pydantic model says about its fields: where a dotted key leads, which variant is meant."""

import difflib
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


def locate(
    model: type[BaseModel], tree: object, parts: Sequence[str]
) -> tuple[Any, list[str], str]:  # Any: a type annotation
    """Annotation of the field at `parts` (None if there is none), known names, parent's key."""
    current: type[BaseModel] | None = model
    annotation: Any = model  # Any: annotations have no common type
    path: list[str] = []
    for part in parts:
        if current is None:
            inner = values_in(annotation)
            if inner is None:
                return None, [], ".".join(path)
            annotation, value = inner, tree.get(part) if isinstance(tree, dict) else None
            current, tree = chosen_model(annotation, value, None), value
            path.append(part)
            continue
        field = current.model_fields.get(part)
        if field is None:
            return None, list(current.model_fields), ".".join(path)
        annotation = field.annotation
        value = tree.get(part) if isinstance(tree, dict) else None
        default = field.get_default(call_default_factory=False)
        current = chosen_model(annotation, value, default)
        tree = value
        path.append(part)
    return annotation, [], ".".join(path[:-1])


def chosen_model(annotation: object, value: object, default: object) -> type[BaseModel] | None:
    """The variant in `annotation` that `value` names, or else `default`; None where there is none.

    An annotation with one model needs no name.
    """
    models = models_in(annotation)
    name = value.get("name", value.get("kind")) if isinstance(value, dict) else None
    if name is None:
        name = getattr(default, "name", getattr(default, "kind", None))
    for model in models:
        if len(models) == 1 or name in names_of(model):
            return model
    return None


def models_in(annotation: object) -> list[type[BaseModel]]:
    """The models among which a field annotated like this chooses."""
    if get_origin(annotation) is Annotated:
        return models_in(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [model for member in get_args(annotation) for model in models_in(member)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return []


def values_in(annotation: object) -> object | None:
    """The type of the values where `annotation` is a table with keys of the user's choice."""
    if get_origin(annotation) is Annotated:
        return values_in(get_args(annotation)[0])
    if get_origin(annotation) in (dict, Mapping):
        return get_args(annotation)[1]
    return None


def names_of(model: type[BaseModel]) -> tuple[object, ...]:
    """The values of `name` (or `kind`) by which a union knows `model`."""
    field = model.model_fields.get("name") or model.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def suggestion(key: str, known: Sequence[str], parent: str) -> str:
    """What to write instead of the unknown `key` in the table `parent`, behind an error's text."""
    last = key.rsplit(".", 1)[-1]
    prefix = f"{parent}." if parent else ""
    near = difflib.get_close_matches(last, known, n=1)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    return f"; known here are {', '.join(known)}" if known else ""
