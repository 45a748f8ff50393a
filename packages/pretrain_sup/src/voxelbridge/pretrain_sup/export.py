"""Stems, trunk and decoder of a run as one canonical checkpoint; the heads stay behind."""

from pathlib import Path

from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.checkpoint import (
    Checkpoint,
    CheckpointMetadata,
    Source,
    Stem,
    collect_tensors,
    write_checkpoint,
)
from voxelbridge.core.config import config_hash
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.files import read_json
from voxelbridge.pretrain_sup.label_space import LabelSpace
from voxelbridge.pretrain_sup.plan import StorePlan
from voxelbridge.pretrain_sup.weights import TrainedNetwork, saved_network

FINAL_CHECKPOINT = "final.safetensors"
METHOD = "multitalent"
CITATIONS = (
    "Ulrich et al., MultiTalent: A Multi-dataset Approach to Medical Image Segmentation, "
    "MICCAI 2023 (arXiv 2303.14444)",
    "The Missing Piece: A Case for Pre-Training in 3D Medical Object Detection (arXiv 2509.15947)",
)


def export(
    run: Path, output: Path, *, default_stem: str | None = None, license_name: str | None = None
) -> CheckpointMetadata:
    """Writes the weights of the run's saved state, finished or not, to `output`.

    `default_stem`: the data set whose stem is taken where nobody names one; None: that with the
    most training cases. `license_name`: an SPDX identifier. `source.steps` in the metadata says how
    far the weights were trained.
    """
    trained, steps = saved_network(run)
    return write_pretrained(
        output, trained, steps=steps, data_sha256=read_json(run / "data.json")["store_sha256"],
        default_stem=default_stem, license_name=license_name,
    )  # fmt: skip


def write_pretrained(
    output: Path,
    trained: TrainedNetwork,
    *,
    steps: int,
    data_sha256: str,
    default_stem: str | None = None,
    license_name: str | None = None,
) -> CheckpointMetadata:
    """Writes all stems by name, the trunk and the decoder of `trained` with complete metadata.

    Nothing about patients goes into the file: data sets by name, the data by their hash.
    """
    network, space, plan, config = trained
    stems = _stems(space, plan)
    default = _default_stem(space, default_stem)
    metadata = CheckpointMetadata(
        method=METHOD,
        arch=ENCODER_PRESETS[config.encoder],
        decoder=config.decoder,
        stems=stems,
        default_stem=default,
        patch_size=config.patch_size,
        spacing_mm=plan.spacing_mm,
        normalization=stems[default].normalization,
        init=config.init,
        source=Source(
            datasets=tuple(dataset.name for dataset in space.datasets),
            steps=steps,
            config_hash=config_hash(config),
            data_sha256=data_sha256,
        ),
        citations=CITATIONS,
        license=license_name,
    )
    tensors = collect_tensors(network.encoder, network.decoder)
    return write_checkpoint(output, Checkpoint(metadata, tensors))


def _stems(space: LabelSpace, plan: StorePlan) -> dict[str, Stem]:
    stems = {}
    for dataset in space.datasets:
        of_dataset = plan.datasets[dataset.name]
        stems[dataset.name] = Stem(
            channels=len(dataset.channels),
            modality=of_dataset.modality,
            dataset=dataset.name,
            normalization=tuple(
                scheme.model_dump(mode="json") for scheme in of_dataset.normalization
            ),
        )
    return stems


def _default_stem(space: LabelSpace, wanted: str | None) -> str:
    names = [dataset.name for dataset in space.datasets]
    if wanted is None:
        return max(space.datasets, key=lambda dataset: dataset.num_cases).name
    if wanted not in names:
        raise ConfigError(f"--default-stem {wanted}: no such stem; there are {', '.join(names)}")
    return wanted
