"""A detector's network as an exported torch program and as an ONNX file, for other runtimes.

Exported is the network alone: a normalised patch in, raw outputs out. Cutting the volume into
patches, normalising, decoding, suppressing and merging stay with the caller; what that takes is in
the file's metadata (see docs/export.md). The patch has a fixed size, the weights are float32, and
deformable attention goes through torch's grid_sample (ONNX GridSample on volumes: opset 20).
"""

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import assert_never

import torch
from torch import Tensor, nn

from voxelbridge.core.errors import ConfigError, VoxelbridgeError
from voxelbridge.core.files import atomic_write
from voxelbridge.detect.build import Detector
from voxelbridge.detect.deform_transformer import DeformableAttention
from voxelbridge.detect.deformable_detr import DeformableDETR
from voxelbridge.detect.retina_unet import RetinaUNet

SCHEMA = 1  # of the metadata
PREFIX = "voxelbridge."  # of the metadata's keys
OPSET = 20  # the first in which GridSample takes volumes
INPUT = "image"
TOLERANCE = 1e-3  # between torch and another runtime, relative to the largest output


def export_onnx(
    detector: Detector,
    path: Path,
    *,
    patch_size: Sequence[int],
    in_channels: int,
    batch_size: int = 1,
    metadata: Mapping[str, object] | None = None,
    check: bool = False,
) -> dict[str, float]:
    """Writes the network to `path`; with `check` the differences to onnxruntime, else {}.

    Input `image` (batch_size, in_channels, *patch_size) float32. Outputs of Retina U-Net: `logits`
    (B, N, K), `deltas` (B, N, 6), `anchors` (N, 6) in voxel edges of the patch; of Deformable DETR:
    `boxes` (B, Q, 6) as centre and size z y x in parts of the patch, `logits` (B, Q, K).
    `metadata` values are written as JSON under `voxelbridge.<name>`. The file appears whole or,
    when something fails or the check finds more than 1e-3, not at all. Raises ConfigError where
    the libraries of the extra `export` (or, to check, onnxruntime) are missing.
    """
    _require("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    image = _example(patch_size, in_channels, batch_size)
    program = export_program(
        detector, patch_size=patch_size, in_channels=in_channels, batch_size=batch_size
    )
    names = output_names(detector)
    facts = {"schema": SCHEMA, **_description(detector, patch_size), **(metadata or {})}
    with atomic_write(path) as temporary:
        _write(program, temporary, names, facts)
        return _compare(detector, temporary, image, names) if check else {}


def export_program(
    detector: Detector, *, patch_size: Sequence[int], in_channels: int, batch_size: int = 1
) -> torch.export.ExportedProgram:
    """The network as torch.export gives it, on the CPU in float32; `detector` stays as it is.

    Outputs are those of `export_onnx`, as a tuple. A patch that the encoder cannot take is a
    ValueError.
    """
    network = _outputs_of(_plain_copy(detector)).eval()
    image = _example(patch_size, in_channels, batch_size)
    with torch.no_grad(), _quiet():
        return torch.export.export(network, (image,))


def output_names(detector: Detector) -> tuple[str, ...]:
    """Names of the outputs, in order."""
    match detector:
        case RetinaUNet():
            return ("logits", "deltas", "anchors")
        case DeformableDETR():
            return ("boxes", "logits")
        case _:
            assert_never(detector)


class _RetinaOutputs(nn.Module):
    def __init__(self, detector: RetinaUNet) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        output = self.detector(image, segment=False)
        return output.logits, output.deltas, output.anchors.boxes()


class _DETROutputs(nn.Module):
    def __init__(self, detector: DeformableDETR) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        answer = self.detector(image).blocks[-1]
        return answer.boxes, answer.logits


def _outputs_of(detector: Detector) -> nn.Module:
    match detector:
        case RetinaUNet():
            return _RetinaOutputs(detector)
        case DeformableDETR():
            return _DETROutputs(detector)
        case _:
            assert_never(detector)


def _plain_copy(detector: Detector) -> Detector:
    """A copy on the CPU in float32, dense memory layout, attention by torch's own operators."""
    plain = copy.deepcopy(detector).cpu().float()
    for module in plain.modules():
        if isinstance(module, DeformableAttention):
            module.backend = "torch"
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.data = parameter.data.contiguous()
    return plain


def _example(patch_size: Sequence[int], in_channels: int, batch_size: int) -> Tensor:
    shape = (batch_size, in_channels, *patch_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _description(detector: Detector, patch_size: Sequence[int]) -> dict[str, object]:
    common: dict[str, object] = {"patch_size": list(patch_size), "axes": "z y x"}
    match detector:
        case RetinaUNet():
            return common | {
                "detector": "retina_unet",
                "outputs": {
                    "logits": "(B, N, K): sigmoid gives the probability of each class",
                    "deltas": "(B, N, 6): dz dy dx ds_z ds_y ds_x; centre = anchor centre + d * "
                    "anchor size, size = anchor size * exp(min(ds, log(1000 / 16)))",
                    "anchors": "(N, 6): z0 y0 x0 z1 y1 x1, voxel edges of the patch",
                },
            }
        case DeformableDETR():
            return common | {
                "detector": "deformable_detr",
                "outputs": {
                    "boxes": "(B, Q, 6): cz cy cx sz sy sx as parts of the patch",
                    "logits": "(B, Q, K): sigmoid gives the probability of each class",
                },
            }
        case _:
            assert_never(detector)


def _write(
    program: torch.export.ExportedProgram,
    path: Path,
    names: Sequence[str],
    facts: Mapping[str, object],
) -> None:
    import onnx

    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(names),
            external_data=False,
            verbose=False,
        )
    assert exported is not None
    model = exported.model_proto
    # The exporter notes the lines of source of every node, with the paths of this machine.
    for entry in (*model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del entry.metadata_props[:]
    for entry in (*model.graph.node, *model.graph.input, *model.graph.output):
        entry.doc_string = ""
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    onnx.helper.set_model_props(
        model, {f"{PREFIX}{name}": json.dumps(value) for name, value in facts.items()}
    )
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


@torch.no_grad()
def _compare(
    detector: Detector, path: Path, image: Tensor, names: Sequence[str]
) -> dict[str, float]:
    """Largest differences per output between torch and onnxruntime, relative to the outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(array) for array in session.run(list(names), {INPUT: image.numpy()})]
    expected = _outputs_of(_plain_copy(detector)).eval()(image)
    if isinstance(detector, DeformableDETR):
        found, expected = _paired(found, expected), list(expected)
    differences = {
        name: float((a - b).abs().max() / b.abs().max().clamp(min=1))
        for name, a, b in zip(names, found, expected, strict=True)
    }
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= TOLERANCE:  # NaN too
        raise VoxelbridgeError(
            f"export: onnxruntime's {worst} differ by {differences[worst]:.2g} from torch's, "
            f"at most {TOLERANCE:g} are allowed; nothing was written"
        )
    return differences


def _paired(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[Tensor]:
    """`found` in the order of `expected`: queries whose proposals score alike may change places."""
    rows = torch.cat(list(expected), dim=2)
    distance = torch.cdist(rows, torch.cat(list(found), dim=2), p=torch.inf)
    nearest = distance.argmin(dim=2)[..., None]  # (B, Q, 1)
    return [tensor.gather(1, nearest.expand(-1, -1, tensor.shape[2])) for tensor in found]


def _require(*modules: str) -> None:
    import importlib.util

    for module in modules:
        if importlib.util.find_spec(module) is None:
            extra = "voxelbridge-detect[export]" if module != "onnxruntime" else "onnxruntime"
            raise ConfigError(f"export: {module} is not installed; install {extra}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what the exporter says about its own insides."""
    folding = logging.getLogger("onnxscript.optimizer._constant_folding")
    level = folding.level
    folding.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        folding.setLevel(level)
