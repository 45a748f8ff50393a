"""The first problem that pydantic found in a config, as one line that a person can act on."""

import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from voxelbridge.core.config_fields import models_in, names_of, suggestion


def explain(
    model: type[BaseModel], tree: object, problem: Any
) -> str:  # Any: pydantic's ErrorDetails
    """`key: what is wrong` for `problem`, found when `tree` was read as a `model`."""
    location, parent_model = _plain_location(model, problem["loc"])
    key = ".".join(location) or "the whole file"
    message = problem["msg"].removeprefix("Value error, ")
    match problem["type"]:
        case "value_error" if not location:  # a rule over several settings names them itself
            return message
        case "extra_forbidden":
            known = list(parent_model.model_fields) if parent_model else []
            return f"{key}: no such setting{suggestion(key, known, '.'.join(location[:-1]))}"
        case "missing":
            return f"{key}: missing; it has no default and must be set"
        case "union_tag_not_found" | "union_tag_invalid":
            tag, known = _tag_of(parent_model, location)
            legal = (problem.get("ctx") or {}).get("expected_tags") or known
            return f"{key}.{tag}: got {_got(tree, (*location, tag))}, expected one of {legal}"
        case _:
            return f"{key}: got {_got(tree, location)}; {message[:1].lower()}{message[1:]}"


def _plain_location(
    model: type[BaseModel], raw: Sequence[str | int]
) -> tuple[tuple[str, ...], type[BaseModel] | None]:
    """pydantic's location without the union tags, and the model that holds the last key."""
    location: list[str] = []
    parent: type[BaseModel] | None = model
    choices: list[type[BaseModel]] = [model]
    for part in raw:
        if len(choices) > 1:  # this part is the tag of a union
            chosen = [choice for choice in choices if part in names_of(choice)]
            choices = chosen or choices[:1]
            if chosen:
                continue
        parent = choices[0] if choices else None
        location.append(str(part))
        field = parent.model_fields.get(str(part)) if parent else None
        choices = models_in(field.annotation) if field else []
    return tuple(location), parent


def _got(tree: object, location: Sequence[str]) -> str:
    for part in location:
        if isinstance(tree, dict) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return "nothing"
    return json.dumps(tree)


def _tag_of(parent: type[BaseModel] | None, location: Sequence[str]) -> tuple[str, str]:
    """What tells the variants at `location` apart (`name`, in a checkpoint `kind`), its values."""
    field = parent.model_fields.get(location[-1]) if parent else None
    variants = models_in(field.annotation) if field else []
    tag = "kind" if any("kind" in variant.model_fields for variant in variants) else "name"
    return tag, ", ".join(repr(name) for variant in variants for name in names_of(variant))
