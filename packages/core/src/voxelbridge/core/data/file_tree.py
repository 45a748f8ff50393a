"""The files below a folder, behind links too: the one rule wherever a tree of images is searched.

Images are often linked rather than copied, and a git-annex tree consists of links. Links to files
are read wherever they lead. A linked folder is searched as well, once, unless its files are found
anyway or it holds the searched folder itself. Hidden files and folders are passed over.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path


def walk_files(folder: Path) -> Iterator[str]:
    """Paths below `folder`, sorted within each folder; all that is no folder, links as they are.

    Nothing but links is looked at: whether a path can be read is said by `broken_link` and by
    whoever opens it.
    """
    root = folder.resolve()
    waiting, entered = [str(folder)], {root}
    while waiting:
        for where, folders, names in os.walk(waiting.pop(0)):  # does not enter linked folders
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (f"{where}/{name}" for name in sorted(names) if not name.startswith("."))
            for name in folders:
                link = Path(where) / name
                if link.is_symlink() and not _is_searched(real := link.resolve(), root, entered):
                    entered.add(real)
                    waiting.append(str(link))


def broken_link(path: Path) -> str | None:
    """Why a path is a link that leads to nothing; None for a link to something, and for no link."""
    if not path.is_symlink():
        return None
    try:
        os.stat(path)  # noqa: PTH116 - Path.stat differs between versions on link loops
    except FileNotFoundError:
        return (
            "is a link to a file that is not there; fetch the file (`git annex get`, "
            "`datalad get`) or remove the link"
        )
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "is a link that leads back to itself; remove it"
        return f"is a link that cannot be followed ({error.strerror})"
    return None


def _is_searched(real: Path, root: Path, entered: set[Path]) -> bool:
    """Whether the files of a linked folder are found elsewhere, or would hold `root` again."""
    if root.is_relative_to(real):
        return True
    for folder in entered:
        if real.is_relative_to(folder):
            below = real.relative_to(folder).parts
            return not any(part.startswith(".") for part in below)
    return False
