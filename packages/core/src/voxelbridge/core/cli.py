"""vb-core: looks into checkpoints and case stores, and at the machine."""

import json
import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from voxelbridge.core.command_line import Json, make_app, run_app
from voxelbridge.core.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:  # torch takes seconds to import, and --help must answer at once
    from voxelbridge.core.checkpoint import Checkpoint

app = make_app(
    "Checkpoints: fetch, import, inspect, verify, compare, export; case stores; the machine.",
    command="vb-core",
    package="voxelbridge-core",
)

CheckpointPath = Annotated[Path, typer.Argument(help="A checkpoint (.safetensors).")]


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
    *,
    as_json: Json = False,
) -> None:
    """Check hashes, and shapes against the architecture; exit status 1 on any problem."""
    is_store = path.is_dir()
    if is_store:
        _require_data_extra(path)
    try:
        content, problems = _check_store(path) if is_store else (_check_checkpoint(path), [])
    except (CheckpointError, DataError) as error:  # not even to be read
        if as_json:
            _tell_verified(path, [str(error)])
        raise
    if as_json:
        _tell_verified(path, problems)
    else:
        for problem in problems:
            typer.echo(problem)
    if problems:
        raise DataError(f"{path}: {len(problems)} problems in {content}; see above")
    if not as_json:
        typer.echo(f"{path}: ok, {content}")


@app.command()
def compare(
    a: CheckpointPath,
    b: Annotated[Path, typer.Argument(help="Another checkpoint.")],
    *,
    stem: Annotated[
        str | None, typer.Option(help="Whose images the stages are given; by default A's stem.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print what differs: metadata, tensors, stage outputs; exit status 0 also when they differ.

    The last line is the verdict: identical; identical weights, different metadata; same
    architecture, different weights; different architecture.
    """
    from voxelbridge.core.checkpoint import read_checkpoint
    from voxelbridge.core.compare import compare_checkpoints

    found = compare_checkpoints(read_checkpoint(a), read_checkpoint(b), stem=stem)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
        return
    for line in found.lines():
        typer.echo(line)


class ForeignOrigin(StrEnum):
    """Programs whose checkpoints can be imported; the same words as `recognise.ORIGINS`."""

    auto = "auto"
    nnunet = "nnunet"
    nnssl = "nnssl"
    multitalent = "multitalent"
    nndetection = "nndetection"
    plain = "plain"


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A .pth, .pt, .ckpt or .safetensors file.")],
    *,
    out: Annotated[Path, typer.Option("-o", "--output", help="The checkpoint to write.")],
    origin: Annotated[
        ForeignOrigin, typer.Option("--from", help="Where the file comes from.")
    ] = ForeignOrigin.auto,
    plan: Annotated[
        Path | None, typer.Option(help="adaptation_plan.json or plans.json, if not in the file.")
    ] = None,
    stem: Annotated[str | None, typer.Option(help="Which of several stems is the default.")] = None,
    arch: Annotated[
        str | None,
        typer.Option(help="For weights without a plan: a preset or a JSON file of the encoder."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn another program's weights into a checkpoint of ours, and say what they are.

    Nothing in the file is executed. nnU-Net v2, nnssl, MultiTalent, nnDetection and plain state
    dicts are recognised by what they hold.
    """
    from voxelbridge.core.checkpoint import write_checkpoint
    from voxelbridge.core.foreign.import_file import import_checkpoint, stated_architecture

    _refuse_same_file(file, out)
    imported = import_checkpoint(
        file,
        origin=origin.value,
        plan=plan,
        stem=stem,
        arch=None if arch is None else stated_architecture(arch),
    )
    metadata = write_checkpoint(out, imported.checkpoint)
    for warning in imported.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        facts = {
            "origin": imported.origin,
            "notes": list(imported.notes),
            "warnings": list(imported.warnings),
            "metadata": metadata.model_dump(mode="json", by_alias=True),
        }
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"{out}: from {imported.origin}, {_size_words(imported.checkpoint)}")
    for line in imported.lines():
        typer.echo(f"  {line}")


@app.command()
def export(
    file: CheckpointPath,
    *,
    to: Annotated[Literal["nnunet", "nnssl"], typer.Option(help="Whose layout.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The .pth file to write.")],
    stem: Annotated[str | None, typer.Option(help="Which of several stems.")] = None,
    outputs: Annotated[
        int | None, typer.Option(min=1, max=65_536, help="Channels of the new output layers.")
    ] = None,
    fresh_decoder: Annotated[
        bool,
        typer.Option("--fresh-decoder", help="Where there is no U-Net decoder, add a new one."),
    ] = False,
) -> None:
    """Write a file for nnU-Net v2 (-pretrained_weights; plans inside) or in nnssl's layout."""
    from voxelbridge.core.checkpoint import read_checkpoint
    from voxelbridge.core.foreign.export_file import export_checkpoint, write_exported

    _refuse_same_file(file, out)
    exported = export_checkpoint(
        read_checkpoint(file), to=to, stem=stem, outputs=outputs, fresh_decoder=fresh_decoder
    )
    write_exported(out, exported)
    typer.echo(f"{out}: {len(exported.content['network_weights'])} tensors in the layout of {to}")
    for note in exported.notes:
        typer.echo(f"  note: {note}")


@app.command()
def card(
    file: CheckpointPath,
    *,
    out: Annotated[Path, typer.Option("-o", "--output", help="The page, usually README.md.")],
    title: Annotated[
        str | None, typer.Option(help="Its heading; by default the file name.")
    ] = None,
) -> None:
    """Write a model card from what a checkpoint says about itself, ready for a hub."""
    from voxelbridge.core.checkpoint import read_checkpoint
    from voxelbridge.core.files import atomic_write
    from voxelbridge.core.model_card import model_card

    _refuse_same_file(file, out)
    text = model_card(read_checkpoint(file), title=title or file.stem, file_name=file.name)
    with atomic_write(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    typer.echo(f"{out}: model card of {file.name}; read it before you publish it")


@app.command()
def fetch(
    reference: Annotated[
        str,
        typer.Argument(help="hf:ORG/NAME, then @REVISION and /FILE where wanted; or file:FOLDER."),
    ],
    *,
    out: Annotated[Path, typer.Option("-o", "--output", help="The folder to copy into.")],
    offline: Annotated[
        bool, typer.Option("--offline", help="Ask no network: the hub's local cache alone.")
    ] = False,
    endpoint: Annotated[str | None, typer.Option(help="Address of a mirror of the hub.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Another folder for the hub's local cache.")
    ] = None,
    and_import: Annotated[
        bool, typer.Option("--import", help="Then import the weights (vb-core import).")
    ] = False,
) -> None:
    """Copy published weights from the Hugging Face hub, check their hashes, say how to import them.

    Needs the extra 'hub'. With several weights in a repository, name one.
    """
    from voxelbridge.core.hub import fetch as fetch_files
    from voxelbridge.core.hub import parse_reference

    fetched = fetch_files(
        parse_reference(reference), out, offline=offline, endpoint=endpoint, cache=cache
    )
    at = f" at {fetched.revision}" if fetched.revision else ""
    typer.echo(f"{fetched.weights}: fetched from {reference}{at}")
    checked = "as its origin states" if fetched.verified else "its origin states none to check"
    typer.echo(f"  SHA-256 {fetched.sha256} ({checked})")
    for name in fetched.others:
        typer.echo(f"  not taken: {name}")
    target = fetched.weights.with_suffix(".safetensors")
    if fetched.weights == target:
        typer.echo(f"look at it with: vb-core inspect {shlex.quote(str(target))}")
        return
    plan = [] if fetched.plan is None else ["--plan", str(fetched.plan)]
    arguments = [str(fetched.weights), "-o", str(target), *plan]
    if and_import:
        app(["import", *arguments], standalone_mode=False)
        return
    typer.echo(f"import it with: vb-core import {shlex.join(arguments)}")


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


def _check_checkpoint(path: Path) -> str:
    from voxelbridge.core.checkpoint import read_checkpoint

    return _size_words(read_checkpoint(path))


def _check_store(path: Path) -> tuple[str, list[str]]:
    from voxelbridge.core.data.case_store import CaseStore

    store = CaseStore.open(path)
    return f"{len(store.cases)} cases", store.verify()


def _tell_verified(path: Path, problems: list[str]) -> None:
    facts = {"path": str(path), "ok": not problems, "problems": problems}
    typer.echo(json.dumps(facts, indent=2))


def _require_data_extra(path: Path) -> None:
    try:
        import voxelbridge.core.data.case_store  # noqa: F401 - whether it can be imported
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path}: a case store needs the extra 'data' ({error.name} is missing); "
            "install voxelbridge-core[data]"
        ) from error


def _refuse_same_file(source: Path, target: Path) -> None:
    if source.exists() and target.exists() and target.samefile(source):
        raise ConfigError(f"{target}: is the checkpoint itself; write to another file")


def _metadata_json(checkpoint: "Checkpoint") -> dict[str, object]:
    return checkpoint.metadata.model_dump(mode="json", by_alias=True)


def _size_words(checkpoint: "Checkpoint") -> str:
    parts = {"encoder": 0, "decoder": 0}
    for name, tensor in checkpoint.tensors.items():
        parts[name.partition(".")[0]] += tensor.numel()
    sizes = ", ".join(f"{part} {count:,} parameters" for part, count in parts.items() if count)
    return f"{len(checkpoint.tensors)} tensors, {sizes}"
