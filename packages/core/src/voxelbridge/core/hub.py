"""Fetching published weights: one repository of the Hugging Face hub, or a folder that copies it.

Nothing that is fetched is opened here but for its hash; `voxelbridge.core.foreign.import_file`
reads it. Needs the extra `hub`; a folder (`file:`) needs nothing.
"""

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType

from voxelbridge.core.errors import ConfigError, DataError, VoxelbridgeError
from voxelbridge.core.files import atomic_write, sha256_of, write_json

RECORD = "fetched.json"
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".model", ".bin")
# What tells how the weights were made; fetched with them where it lies beside them.
COMPANIONS = ("adaptation_plan.json", "plans.json", "dataset.json", "README.md", "LICENSE")
PREFERRED = "checkpoint_final.pth"  # nnU-Net's and nnssl's name for the finished training
_PART = r"[A-Za-z0-9][\w.-]*"
_REFERENCE = re.compile(
    rf"hf:(?P<repository>{_PART}/{_PART})(?:@(?P<revision>{_PART}))?(?:/(?P<file>.+))?",
    re.ASCII,
)
_LEGAL = "hf:ORG/NAME[@REVISION][/FILE] or file:FOLDER"
_SHOWN = 10  # files named in an error


@dataclass(frozen=True)
class Reference:
    """What to fetch. One of `repository` and `folder` is given."""

    repository: str | None = None
    revision: str | None = None
    file: str | None = None
    folder: Path | None = None

    def __str__(self) -> str:
        if self.folder is not None:
            return f"file:{self.folder}"
        return f"hf:{self.repository}{f'@{self.revision}' if self.revision else ''}"


@dataclass(frozen=True)
class Fetched:
    """Where the files lie now, and what they are copies of."""

    weights: Path
    companions: tuple[Path, ...]
    revision: str | None  # the hub's commit
    sha256: str  # of the weights
    verified: bool  # against what the origin states
    others: tuple[str, ...]  # weights in the repository that were not taken

    @property
    def plan(self) -> Path | None:
        """The adaptation plan beside the weights."""
        return next((p for p in self.companions if p.name == "adaptation_plan.json"), None)


def parse_reference(text: str) -> Reference:
    """`text` as a reference; ConfigError with the legal forms otherwise.

    A revision is a branch, tag or commit; one with slashes cannot be told from a file and must be
    given as a commit.
    """
    if text.startswith("file:"):
        return Reference(folder=Path(text.removeprefix("file:")))
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise ConfigError(f"cannot fetch {text!r}; expected {_LEGAL}")
    file = match["file"]
    if file is not None and not _is_plain_path(file):
        raise ConfigError(f"cannot fetch {text!r}: {file!r} is no path inside a repository")
    return Reference(match["repository"], match["revision"], file)


def fetch(
    reference: Reference,
    folder: Path,
    *,
    offline: bool = False,
    endpoint: str | None = None,
    cache: Path | None = None,
) -> Fetched:
    """Copies the weights and what lies beside them into `folder`, and checks their hashes.

    Which weights: the file that is named, else the only one, else `checkpoint_final.pth`; with
    several others an error lists them. `offline` reads the local cache of the hub alone. `endpoint`
    is the address of a mirror, `cache` another folder for the cache; None: the hub's own. Writes
    `fetched.json` (reference, commit, hashes). Nothing is left in `folder` when a hash is wrong.
    """
    source: _Source
    if reference.folder is not None:
        source = _FolderSource(reference)
    else:
        source = _HubSource(reference, offline=offline, endpoint=endpoint, cache=cache)
    names = [name for name in source.names() if _is_plain_path(name)]
    chosen = _choose(reference, names)
    parent = PurePosixPath(chosen).parent
    beside = [str(parent / name) for name in COMPANIONS if str(parent / name) in names]
    found = {name: source.path(name) for name in (chosen, *beside)}
    hashes = {name: _checked_hash(reference, name, path) for name, path in found.items()}
    copies = {name: folder / PurePosixPath(name).name for name in found}
    for name, copy in copies.items():
        if copy.exists() and not (copy.is_file() and sha256_of(copy) == hashes[name][0]):
            raise DataError(f"{copy}: is there already, with other content; take another folder")
    for name, path in found.items():
        _copy(path, copies[name], expected=hashes[name][0])
    write_json(
        folder / RECORD,
        {
            "schema": 1,
            "reference": str(reference),
            "revision": source.revision,
            "files": {
                name: {"sha256": digest, "verified": verified}
                for name, (digest, verified) in hashes.items()
            },
        },
    )
    return Fetched(
        weights=copies[chosen],
        companions=tuple(copies[name] for name in beside),
        revision=source.revision,
        sha256=hashes[chosen][0],
        verified=hashes[chosen][1],
        others=tuple(name for name in _weights(names) if name != chosen),
    )


class _FolderSource:
    """A folder that holds the files of a repository; `snapshots` of a hub cache work too."""

    def __init__(self, reference: Reference) -> None:
        assert reference.folder is not None
        self._folder = reference.folder
        self.revision: str | None = None
        if not self._folder.is_dir():
            raise DataError(f"{self._folder}: is no folder; expected a copy of a repository")

    def names(self) -> list[str]:
        return _files_below(self._folder)

    def path(self, name: str) -> Path:
        return self._folder / name


class _HubSource:
    """A repository of the hub, or (offline) what its cache on this machine holds of it."""

    def __init__(
        self, reference: Reference, *, offline: bool, endpoint: str | None, cache: Path | None
    ) -> None:
        assert reference.repository is not None
        self._reference = reference
        self._repository = reference.repository
        self._offline = offline
        self._endpoint = endpoint
        self._cache = cache
        self._hub = _import_hub()
        self._snapshot: Path | None = None
        self.revision: str | None = None

    def names(self) -> list[str]:
        if self._offline:
            self._snapshot = self._cached()
            self.revision = self._snapshot.name
            return _files_below(self._snapshot)
        with _one_line_errors(self._reference, self._hub):
            info = self._hub.HfApi(endpoint=self._endpoint).repo_info(
                self._repository, revision=self._reference.revision, timeout=30
            )
            return [sibling.rfilename for sibling in info.siblings or ()]

    def path(self, name: str) -> Path:
        if self._snapshot is not None:
            return self._snapshot / name
        # The first file by branch or tag, so that the cache learns what these stand for; the others
        # by the commit it came from, so that all are of one state of the repository.
        with _one_line_errors(self._reference, self._hub):
            path = Path(
                self._hub.hf_hub_download(
                    self._repository,
                    name,
                    revision=self.revision or self._reference.revision,
                    cache_dir=self._cache,
                    endpoint=self._endpoint,
                )
            )
        self.revision = path.parents[name.count("/")].name
        return path

    def _cached(self) -> Path:
        """The folder of the cache that holds the revision asked for (none asked for: main)."""
        wanted = self._reference.revision or "main"
        try:
            found = self._hub.scan_cache_dir(self._cache)
        except self._hub.errors.CacheNotFound:
            repositories = []
        else:
            repositories = [r for r in found.repos if r.repo_id == self._repository]
        for revision in (revision for r in repositories for revision in r.revisions):
            if wanted in revision.refs or wanted == revision.commit_hash:
                return Path(revision.snapshot_path)
        raise DataError(
            f"{self._reference}: offline, and not in this machine's cache; fetch it once with a "
            "network"
        )


_Source = _FolderSource | _HubSource


def _import_hub() -> ModuleType:
    try:
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"hf: needs the extra 'hub' ({error.name} is missing); install voxelbridge-core[hub]"
        ) from error
    huggingface_hub.utils.logging.set_verbosity_error()  # its advice is not ours to print
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


@contextmanager
def _one_line_errors(reference: Reference, hub: ModuleType) -> Iterator[None]:
    errors = hub.errors
    try:
        yield
    except VoxelbridgeError:
        raise
    except (errors.GatedRepoError, errors.DisabledRepoError) as error:
        raise DataError(
            f"{reference}: access is restricted; accept its terms on the hub and log in with "
            "`hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"{reference}: no such repository, or it is private (log in with `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"{reference}: has no revision {reference.revision!r}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise DataError(
            f"{reference}: the hub cannot be reached; without a network, --offline takes what the "
            "cache holds"
        ) from error
    except errors.EntryNotFoundError as error:
        raise DataError(f"{reference}: a file is missing ({_first_line(error)})") from error
    except Exception as error:  # of its HTTP library, which is another one in other versions
        raise DataError(f"{reference}: cannot be fetched ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def _choose(reference: Reference, names: Sequence[str]) -> str:
    if reference.file is not None:
        if reference.file in names:
            return reference.file
        raise DataError(
            f"{reference}: holds no file {reference.file!r}; {_listed(_weights(names))}"
        )
    weights = _weights(names)
    if len(weights) == 1:
        return weights[0]
    if weights.count(PREFERRED):
        return PREFERRED
    preferred = [name for name in weights if PurePosixPath(name).name == PREFERRED]
    if len(preferred) == 1:
        return preferred[0]
    if not weights:
        raise DataError(f"{reference}: holds no weights; {_listed(names)}")
    raise DataError(f"{reference}: holds several weights, name one; {_listed(weights)}")


def _weights(names: Sequence[str]) -> list[str]:
    return sorted(name for name in names if PurePosixPath(name).suffix in WEIGHT_SUFFIXES)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) or "no files"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"it holds {shown}{more}"


def _checked_hash(reference: Reference, name: str, path: Path) -> tuple[str, bool]:
    """SHA-256, and whether the origin states a hash, which then agrees.

    The hub's cache calls each file by what the hub states: the SHA-256 of a large file, git's blob
    hash of a small one.
    """
    if not path.is_file():
        raise DataError(f"{reference}: {name} is no file")
    digest = sha256_of(path)
    stated = path.resolve().name if path.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{64}", stated):
        got = digest
    elif re.fullmatch(r"[0-9a-f]{40}", stated):
        got = _git_blob_hash(path)
    else:
        return digest, False
    if got != stated:
        raise DataError(
            f"{reference}: {name} is not what the hub states (hash {got}, expected {stated}); "
            f"delete {path.resolve()} and fetch it again"
        )
    return digest, True


def _git_blob_hash(path: Path) -> str:
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _copy(source: Path, target: Path, *, expected: str) -> None:
    digest = hashlib.sha256()
    with atomic_write(target) as temporary:
        with source.open("rb") as stream, temporary.open("wb") as out:
            while block := stream.read(1 << 20):
                digest.update(block)
                out.write(block)
        if digest.hexdigest() != expected:
            raise DataError(f"{source}: changed while it was copied; fetch it again")


def _files_below(folder: Path) -> list[str]:
    return sorted(
        str(PurePosixPath(path.relative_to(folder)))
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    )


def _is_plain_path(name: str) -> bool:
    parts = name.split("/")
    return "\\" not in name and "\0" not in name and not {"", ".", ".."} & set(parts)
