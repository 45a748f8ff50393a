"""`vb-detect export`: the network of a run as an ONNX file that explains itself."""

from pathlib import Path

from voxelbridge.detect.export_onnx import export_onnx
from voxelbridge.detect.train import load_run
from voxelbridge.detect.weights import Which


def export_run(run: Path, path: Path, *, check: bool, weights: Which = "last") -> str:
    """Writes the network of `run` to `path` and says what is in it.

    The metadata hold what a caller needs to feed it: classes, channels, spacing, resampling and
    normalisation. Raises what `load_run` and `export_onnx` raise.
    """
    detector, config, plan = load_run(run, weights=weights)
    facts = plan.model_dump(mode="json")
    metadata = {
        name: facts[name]
        for name in ("class_names", "channel_names", "spacing_mm", "resampling", "normalization")
    }
    differences = export_onnx(
        detector,
        path,
        patch_size=config.patch_size,
        in_channels=len(plan.channel_names),
        metadata=metadata,
        check=check,
    )
    patch = " x ".join(str(edge) for edge in config.patch_size)
    lines = [f"written to {path}: one patch of {patch} voxels (z y x), float32"]
    if check:
        shown = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        lines.append(f"checked with onnxruntime, relative differences: {shown}")
    return "\n".join(lines)
