"""vb-core: looks into checkpoints and case stores, and at the machine."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from voxelbridge.core.command_line import make_app, run_app
from voxelbridge.core.errors import DataError

if TYPE_CHECKING:  # torch takes seconds to import, and --help must answer at once
    from voxelbridge.core.checkpoint import Checkpoint

app = make_app("Checkpoints and case stores: inspect, verify, compare; and a look at the machine.")

CheckpointPath = Annotated[Path, typer.Argument(help="A checkpoint (.safetensors).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def main() -> None:
    """Entry point of the command `vb-core`."""
    run_app(app)


@app.command()
def inspect(file: CheckpointPath, *, as_json: Json = False) -> None:
    """Print what a checkpoint says about itself, after checking every byte of it."""
    from voxelbridge.core.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(file)
    facts = _metadata_json(checkpoint)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"{file}: {_size_words(checkpoint)}")
    for key, value in facts.items():
        if key == "citations":
            continue
        typer.echo(f"  {key:<16} {value if isinstance(value, str) else json.dumps(value)}")
    for citation in checkpoint.metadata.citations:
        typer.echo(f"  please cite      {citation}")


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A checkpoint (.safetensors) or a case store.")],
) -> None:
    """Check hashes, and shapes against the architecture; exit status 1 on any problem."""
    if path.is_dir():
        _verify_store(path)
        return
    from voxelbridge.core.checkpoint import read_checkpoint

    typer.echo(f"{path}: ok, {_size_words(read_checkpoint(path))}")


@app.command()
def compare(
    a: CheckpointPath,
    b: Annotated[Path, typer.Argument(help="Another checkpoint.")],
    *,
    as_json: Json = False,
) -> None:
    """Print what differs between two checkpoints; exit status 0 also when they differ."""
    from voxelbridge.core.checkpoint import read_checkpoint
    from voxelbridge.core.config import differing_keys

    first, second = read_checkpoint(a), read_checkpoint(b)
    metadata = [
        line
        for line in differing_keys(first.metadata, second.metadata)
        if not line.startswith(("tensors_sha256:", "metadata_sha256:"))
    ]
    tensors = _tensor_differences(first, second)
    if as_json:
        same = not metadata and not tensors
        typer.echo(json.dumps({"same": same, "metadata": metadata, "tensors": tensors}, indent=2))
        return
    typer.echo(f"metadata: {len(metadata)} differences")
    for line in metadata:
        typer.echo(f"  {line}")
    count = len(first.tensors.keys() | second.tensors.keys())
    typer.echo(f"tensors: {len(tensors)} of {count} differ")
    for name, difference in tensors.items():
        typer.echo(f"  {name}: {difference}")


@app.command()
def overlap(
    store_a: Annotated[Path, typer.Argument(help="A case store, such as one for pre-training.")],
    store_b: Annotated[Path, typer.Argument(help="Another, such as one to measure on.")],
    *,
    as_json: Json = False,
) -> None:
    """List the cases that two stores share (leakage); exit status 1 if there are any.

    Data sets that are known to share scans are named in a warning, even where no case shows it.
    """
    _require_data_extra(store_a)
    from voxelbridge.core.data.overlap import compare_stores

    found = compare_stores(store_a, store_b)
    count = len(found.overlaps)
    if as_json:
        typer.echo(json.dumps(found.as_json(store_a, store_b), indent=2))
    else:
        for line in found.lines(store_a, store_b):
            typer.echo(line)
    if count:
        raise DataError(
            f"{store_a} and {store_b} share {count} pair{'s' * (count != 1)} of cases; leave them "
            "out of one of the stores"
        )


@app.command()
def doctor(*, as_json: Json = False) -> None:
    """Print versions, GPU, free disk and shared memory, threads and a one-line verdict."""
    from voxelbridge.core.doctor import examine

    found = examine()
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
        return
    for name, version in found.versions.items():
        typer.echo(f"  {name:<26} {version or 'not installed'}")
    typer.echo(f"  {'python':<26} {found.python} on {found.system}")
    for gpu in found.gpus:
        words = f"{gpu.name}, {gpu.memory_gib} GiB, capability {gpu.capability}, CUDA {found.cuda}"
        typer.echo(f"  {'GPU':<26} {words}")
    typer.echo(f"  {'CPU threads':<26} {found.cpu_threads} (torch uses {found.torch_threads})")
    typer.echo(f"  {'memory':<26} {found.memory_gib} GiB")
    typer.echo(f"  {'free disk here':<26} {found.free_disk_gib} GiB")
    if found.free_shared_memory_gib is not None:
        typer.echo(f"  {'free shared memory':<26} {found.free_shared_memory_gib} GiB")
    typer.echo(found.verdict)


def _verify_store(path: Path) -> None:
    _require_data_extra(path)
    from voxelbridge.core.data.case_store import CaseStore

    store = CaseStore.open(path)
    problems = store.verify()
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise DataError(f"{path}: {len(problems)} problems in {len(store.cases)} cases; see above")
    typer.echo(f"{path}: ok, {len(store.cases)} cases")


def _require_data_extra(path: Path) -> None:
    try:
        import voxelbridge.core.data.case_store  # noqa: F401 - whether it can be imported
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path}: a case store needs the extra 'data' ({error.name} is missing); "
            "install voxelbridge-core[data]"
        ) from error


def _metadata_json(checkpoint: "Checkpoint") -> dict[str, object]:
    return checkpoint.metadata.model_dump(mode="json", by_alias=True)


def _size_words(checkpoint: "Checkpoint") -> str:
    parts = {"encoder": 0, "decoder": 0}
    for name, tensor in checkpoint.tensors.items():
        parts[name.partition(".")[0]] += tensor.numel()
    sizes = ", ".join(f"{part} {count:,} parameters" for part, count in parts.items() if count)
    return f"{len(checkpoint.tensors)} tensors, {sizes}"


def _tensor_differences(first: "Checkpoint", second: "Checkpoint") -> dict[str, str]:
    differences: dict[str, str] = {}
    for name in sorted(first.tensors.keys() | second.tensors.keys()):
        a, b = first.tensors.get(name), second.tensors.get(name)
        if a is None or b is None:
            differences[name] = "only in the second" if a is None else "only in the first"
        elif a.shape != b.shape:
            differences[name] = f"shape {tuple(a.shape)} and {tuple(b.shape)}"
        elif a.dtype != b.dtype or not a.equal(b):
            largest = float((a.float() - b.float()).abs().max())
            differences[name] = f"largest difference {largest:.3g}"
    return differences
