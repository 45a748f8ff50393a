"""Names of cases made from paths: the same on every machine, and fit for file names."""

import hashlib
import unicodedata
from collections.abc import Sequence

MAX_BYTES = 150  # of a case's name: its files get endings, and file names may have 255


def safe_case_id(parts: Sequence[str]) -> str:
    """A case name for a path's parts, joined by "__": fit for file names on every system."""
    name = unicodedata.normalize("NFC", "__".join(parts))
    name = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in name).strip()
    name = "_" + name[1:] if name[:1] in ("-", ".") else name or "_"
    raw = name.encode("utf-8", "replace")
    if len(raw) <= MAX_BYTES:
        return name
    return f"{raw[: MAX_BYTES - 9].decode('utf-8', 'ignore')}_{short_hash(name)}"


def short_hash(text: str) -> str:
    """Eight hexadecimal digits that stand for a text in a name."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]
