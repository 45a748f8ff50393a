"""Sizes, lists and normalisations in words, for messages that people read."""

from collections.abc import Mapping, Sequence

from pydantic import JsonValue


def by_axis(values: Sequence[float]) -> str:
    """`160 x 160 x 160`; six digits of a figure."""
    return " x ".join(f"{value:g}" for value in values)


def listed(values: Sequence[object]) -> str:
    """`8, 16, 32`; triples in it as `1x2x2`."""
    return ", ".join(
        "x".join(str(part) for part in value) if isinstance(value, tuple) else str(value)
        for value in values
    )


def scheme_words(scheme: Mapping[str, JsonValue]) -> str:
    """A normalisation with its figures: `zscore (nonzero_only no)`."""
    figures = [f"{key} {_figure(value)}" for key, value in scheme.items() if key != "name"]
    name = str(scheme.get("name", "an unnamed scheme"))
    return f"{name} ({', '.join(figures)})" if figures else name


def _figure(value: JsonValue) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
