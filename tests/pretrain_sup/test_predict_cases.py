"""Label maps of files: their grid and orientation, what is chosen, what is kept, what fails."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - the name everybody uses
from PIL import Image

from voxelbridge.core.command_line import run_app
from voxelbridge.core.data.image_io import read_image, write_image
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import CheckpointError, ConfigError, DataError
from voxelbridge.pretrain_sup.cli import app
from voxelbridge.pretrain_sup.config import MultiTalentConfig
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels, Target
from voxelbridge.pretrain_sup.label_space import Head, LabelSpace, build_label_space
from voxelbridge.pretrain_sup.predict_cases import (
    Choice,
    PredictionRequest,
    choose,
    predict_cases,
    written_names,
)

WriteRun = Callable[..., MultiTalentConfig]

SPACING = (0.9, 1.1, 1.3)  # of the stored grid
# Above its mean the first channel is "bright" (id 5); organs' second part is never anything.
BRIGHT = DatasetLabels("bright", ("CT",), (Target("bright", (5,)), Target("never", (9,))), None, 3)
PAIR = DatasetLabels(
    "pair", ("T1", "T2"), (Target("whole", (1, 2)), Target("core", (2,))), None, 3, regions=True
)
OTHER = DatasetLabels("other", ("CT",), (Target("dark", (4,)),), None, 3)
OUTPUTS = {
    "bright.0": ([0.0, 50.0], [0.0, 0.0]),
    "bright.1": ([0.0, 0.0], [0.0, -50.0]),
    "pair": ([50.0, 50.0], [50.0, -50.0]),  # 1 above -1, 2 above 1 deviation
    "other": ([0.0, -50.0], [0.0, 0.0]),
}


def space_of(*datasets: DatasetLabels) -> LabelSpace:
    whole = build_label_space(datasets or (BRIGHT, PAIR, OTHER), layout="per_dataset")
    split = tuple(
        Head(f"bright.{n}", "bright", (target,), False) for n, target in enumerate(BRIGHT.targets)
    )
    heads = (*split, *(head for head in whole.heads if head.dataset != "bright"))
    return LabelSpace("per_dataset", whole.datasets, heads)


@pytest.fixture
def run(tmp_path: Path, write_rigged_run: WriteRun) -> Path:
    write_rigged_run(tmp_path / "run", space_of(), OUTPUTS, spacing=SPACING)
    return tmp_path / "run"


def directions(letters: str) -> np.ndarray:
    """Columns: where the file's axes z, y, x (named first to last x, y, z) lead, in LPS."""
    towards = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0)}
    towards |= {"S": (0, 0, 1), "I": (0, 0, -1)}
    x, y, z = (towards[letter] for letter in letters)
    return np.array([z, y, x], dtype=float).T


def write_oriented(path: Path, letters: str, *, seed: int = 0) -> np.ndarray:
    """Noise that has the run's spacing and fills one window, file axes x, y, z to `letters`."""
    lengths = {"L": 32, "R": 32, "P": 24, "A": 24, "S": 16, "I": 16}
    shape = tuple(lengths[letter] for letter in reversed(letters))
    spacing = {letter: SPACING[n] for n, pair in enumerate(("SI", "PA", "LR")) for letter in pair}
    steps = [spacing[letter] for letter in reversed(letters)]
    rng = np.random.default_rng(seed)
    values = rng.normal(40, 12, size=shape).astype(np.float32)
    grid = Grid.from_parts(
        shape, steps, directions=directions(letters), origin_mm=(-31.5, 12.25, 700.0)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Volume(values[None], grid))
    return values


@pytest.mark.parametrize("letters", ["LPS", "RAS", "PIR", "SAL", "IRP"])
def test_labels_lie_on_the_voxels_of_the_file_in_any_orientation(
    run: Path, tmp_path: Path, letters: str
) -> None:
    source = tmp_path / "images" / "a_0000.nii.gz"
    values = write_oriented(source, letters)
    request = PredictionRequest(dataset="bright", mirror=letters == "RAS", pictures=False)
    assert predict_cases(run, [tmp_path / "images"], tmp_path / "out", request=request) == 1
    image, labels = (sitk.ReadImage(str(p)) for p in (source, tmp_path / "out" / "a.nii.gz"))
    assert labels.GetSize() == image.GetSize()
    np.testing.assert_allclose(labels.GetSpacing(), image.GetSpacing())
    np.testing.assert_allclose(labels.GetOrigin(), image.GetOrigin())
    np.testing.assert_allclose(labels.GetDirection(), image.GetDirection())
    found = sitk.GetArrayFromImage(labels)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.where(values > values.mean(), 5, 0))


def test_volume_of_another_spacing_with_an_empty_border_is_labelled_in_its_own_grid(
    run: Path, tmp_path: Path
) -> None:
    z, y, x = np.meshgrid(*(np.arange(n) + 0.5 for n in (10, 40, 44)), indexing="ij")
    values = np.zeros((10, 40, 44), np.float32)
    inside = (slice(1, 9), slice(3, 27), slice(4, 36))  # 24 mm x 12 mm x 16 mm
    ball = ((z - 5) * 3.0) ** 2 + ((y - 15) * 0.5) ** 2 + ((x - 20) * 0.5) ** 2 < 25
    values[inside] = np.where(ball, 100.0, 10.0)[inside]
    grid = Grid.from_parts(values.shape, (3.0, 0.5, 0.5), origin_mm=(5, 6, 7))
    (tmp_path / "images").mkdir()
    write_image(tmp_path / "images" / "ball.mha", Volume(values[None], grid))
    request = PredictionRequest(dataset="bright", mirror=False)
    predict_cases(run, [tmp_path / "images"], tmp_path / "out", request=request)
    labels = read_image(tmp_path / "out" / "ball.nii.gz")
    assert labels.grid.agrees_with(grid, tolerance=1e-4)
    found = labels.array[0] == 5
    outside = np.ones(values.shape, bool)
    outside[inside] = False
    assert not found[outside].any()
    dice = 2 * (found & ball).sum() / (found.sum() + ball.sum())
    assert dice > 0.9
    with Image.open(tmp_path / "out" / "ball.png") as picture:
        assert min(picture.size) > 200


def test_channel_files_choose_their_data_set_and_regions_are_painted(
    run: Path, tmp_path: Path
) -> None:
    values = write_oriented(tmp_path / "images" / "a_0000.nii.gz", "LPS")
    write_oriented(tmp_path / "images" / "a_0001.nii.gz", "LPS", seed=1)
    predict_cases(run, [tmp_path / "images"], tmp_path / "out")
    found = read_image(tmp_path / "out" / "a.nii.gz").array[0]
    scored = (values - values.mean()) / values.std()
    expected = np.where(scored > 1, 2, np.where(scored > -1, 1, 0))
    near = np.minimum(abs(scored - 1), abs(scored + 1)) < 1e-3
    np.testing.assert_array_equal(found[~near], expected[~near])
    told = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert told["dataset"] == told["stem"] == "pair"
    assert told["labels"] == {"1": "whole", "2": "core"}
    assert told["mirror_axes"] == [0, 1, 2]
    assert list(told["cases"]) == ["a"]


def test_another_stem_and_single_heads_are_used_as_asked(run: Path, tmp_path: Path) -> None:
    values = write_oriented(tmp_path / "images" / "a.nii.gz", "RAS")
    request = PredictionRequest(heads=("other",), stem="bright", mirror=False)
    predict_cases(run, [tmp_path / "images" / "a.nii.gz"], tmp_path / "out", request=request)
    found = read_image(tmp_path / "out" / "a.nii.gz").array[0]
    np.testing.assert_array_equal(found, np.where(values < values.mean(), 4, 0))


def test_a_failing_case_is_named_and_the_others_are_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "c"):
        write_oriented(tmp_path / "images" / f"{name}.nii.gz", "LPS")
    (tmp_path / "images" / "b.nii.gz").write_bytes(b"no image")
    holed = write_oriented(tmp_path / "images" / "d.nii.gz", "LPS")
    holed[3, 4, 5] = np.nan
    grid = Grid.from_parts(holed.shape, (1.0, 1.0, 1.0))
    write_image(tmp_path / "images" / "d.nii.gz", Volume(holed[None], grid))
    request = PredictionRequest(dataset="bright", mirror=False, pictures=False)
    with pytest.raises(DataError, match=r"2 of 4 cases failed \(b, d\); the other 2 are in"):
        predict_cases(run, [tmp_path / "images"], tmp_path / "out", request=request)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith("error: case b: ")
    assert errors[1].startswith("error: case d: 1 voxels are NaN")
    written = sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz"))
    assert written == ["a.nii.gz", "c.nii.gz"]
    told = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert told["failed"] == ["b", "d"]
    assert sorted(told["cases"]) == ["a", "c"]


def test_what_is_there_is_kept_unless_overwritten(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    write_oriented(images / "a.nii.gz", "LPS")
    request = PredictionRequest(dataset="bright", mirror=False, pictures=False)
    assert predict_cases(run, [images], out, request=request) == 1
    before = (out / "a.nii.gz").stat().st_mtime_ns
    write_oriented(images / "b.nii.gz", "LPS")
    assert predict_cases(run, [images], out, request=request) == 1
    assert "note: 1 of 2 cases are in" in capsys.readouterr().out
    assert (out / "a.nii.gz").stat().st_mtime_ns == before
    told = json.loads((out / "predictions.json").read_text())
    assert sorted(told["cases"]) == ["a", "b"]
    other = PredictionRequest(dataset="other", mirror=False, pictures=False)
    with pytest.raises(ConfigError, match=r"other settings \(dataset, heads, stem, labels\)"):
        predict_cases(run, [images], out, request=other)
    again = PredictionRequest(dataset="other", mirror=False, pictures=False, overwrite=True)
    assert predict_cases(run, [images], out, request=again) == 2
    assert set(np.unique(read_image(out / "a.nii.gz").array)) == {0, 4}
    (images / "b.nii.gz").unlink()  # its prediction stays in the folder
    back = PredictionRequest(dataset="bright", mirror=False, overwrite=True)
    with pytest.raises(ConfigError, match=r"take another folder$"):
        predict_cases(run, [images], out, request=back)


def test_foreign_label_maps_and_the_images_themselves_are_never_overwritten(
    run: Path, tmp_path: Path
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    write_oriented(images / "a.nii.gz", "LPS")
    content = (images / "a.nii.gz").read_bytes()
    request = PredictionRequest(dataset="bright", overwrite=True)
    for given in (images, images / "a.nii.gz"):
        with pytest.raises(ConfigError, match="the images themselves"):
            predict_cases(run, [given], images, request=request)
    assert (images / "a.nii.gz").read_bytes() == content
    out.mkdir()
    (out / "a.nii.gz").write_bytes(b"drawn by hand")
    with pytest.raises(ConfigError, match=r"no predictions\.json"):
        predict_cases(run, [images], out, request=PredictionRequest(dataset="bright"))
    assert (out / "a.nii.gz").read_bytes() == b"drawn by hand"


@pytest.mark.parametrize(
    ("request_", "channels", "chosen"),
    [
        (PredictionRequest(), 2, Choice("pair", ("pair",), "pair")),
        (
            PredictionRequest(dataset="bright"),
            1,
            Choice("bright", ("bright.0", "bright.1"), "bright"),
        ),
        (PredictionRequest(heads=("bright.1",)), 1, Choice("bright", ("bright.1",), "bright")),
        (PredictionRequest(stem="other"), 1, Choice("other", ("other",), "other")),
        (
            PredictionRequest(dataset="other", stem="pair"), 2, Choice("other", ("other",), "pair")
        ),
    ],
)  # fmt: skip
def test_data_set_heads_and_stem_are_chosen(
    request_: PredictionRequest, channels: int, chosen: Choice
) -> None:
    assert choose(space_of(), request_, num_channels=channels) == chosen


@pytest.mark.parametrize(
    ("request_", "channels", "message"),
    [
        (PredictionRequest(), 1, r"2 data sets .* bright \(CT\), other \(CT\); choose with --dat"),
        (PredictionRequest(), 3, r"3 channels; .*bright \(CT\), pair \(T1, T2\), other \(CT\)"),
        (PredictionRequest(dataset="x"), 1, "--dataset x: the run has bright, pair, other"),
        (PredictionRequest(heads=("x",)), 1, "--head x: the run has bright.0, bright.1, pair, oth"),
        (PredictionRequest(stem="x"), 1, "--stem x: the run has bright"),
        (PredictionRequest(heads=("bright.0", "other")), 1, "one data set at a time"),
        (PredictionRequest(heads=("other",), dataset="pair"), 1, "other is not the --dataset pair"),
    ],
)
def test_a_choice_that_is_left_or_not_legal_is_listed(
    request_: PredictionRequest, channels: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(space_of(), request_, num_channels=channels)


def test_written_ids_have_the_names_of_their_targets() -> None:
    space = space_of()
    assert written_names(space.heads_of("bright"), overlapping=False) == {5: "bright", 9: "never"}
    assert written_names(space.heads_of("pair"), overlapping=True) == {1: "whole", 2: "core"}
    (joint,) = build_label_space([BRIGHT], layout="joint").heads
    assert written_names([joint], overlapping=False) == {5: "bright", 9: "never"}
    targets = (Target("a", (1, 2), 3), Target("b", (2,), 3))
    assert written_names([Head("h", "d", targets, True)], overlapping=True) == {3: "a, b"}


def test_wrong_number_of_channels_and_unfinished_runs_are_refused(
    run: Path, tmp_path: Path
) -> None:
    write_oriented(tmp_path / "images" / "a_0000.nii.gz", "LPS")
    with pytest.raises(DataError, match="the model needs 2"):
        predict_cases(
            run, [tmp_path / "images"], tmp_path / "out", request=PredictionRequest(dataset="pair")
        )
    (run / "checkpoints" / "network.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has not finished"):
        predict_cases(run, [tmp_path / "images"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_commands_predict_evaluate_and_show_what_a_run_learnt(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out, json_file = tmp_path / "raw", tmp_path / "out", tmp_path / "metrics.json"
    for name in ("a", "b"):
        values = write_oriented(raw / "imagesTr" / f"{name}_0000.nii.gz", "RAS", seed=len(name))
        grid = read_image(raw / "imagesTr" / f"{name}_0000.nii.gz").grid
        (raw / "labelsTr").mkdir(exist_ok=True)
        labels = np.where(values > values.mean(), 5, 0).astype(np.uint8)
        write_image(raw / "labelsTr" / f"{name}.nii.gz", Volume(labels[None], grid))
    write_oriented(raw / "imagesTs" / "c_0000.nii.gz", "RAS")
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "bright": 5, "never": 9},
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    words = ["predict", str(run), "--images", str(raw / "imagesTr"), "--out", str(out)]
    assert call(*words, "--no-mirror", "--device", "cpu") == 2
    assert "choose with --dataset NAME" in capsys.readouterr().err
    assert call(*words, "--dataset", "bright", "--no-mirror", "--device", "cpu") == 0
    assert f"{out}: 2 cases predicted" in capsys.readouterr().out
    words = ["evaluate", "--labels", str(raw), "--predictions", str(out), "--workers", "0"]
    table = str(tmp_path / "rows.csv")
    assert call(*words, "--output", str(json_file), "--csv", table) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["bright", "2", "0", "0", "1.000", "0.00", "0.00"] in [line.split() for line in lines]
    assert "raw: 2 cases" in lines
    assert json.loads(json_file.read_text())["mean"]["dice"] == 1.0
    assert (tmp_path / "rows.csv").read_text().startswith("case_id,target,")
    assert call(*words, "--output", str(json_file), "--run", str(run)) == 0
    assert "bright: 2 cases" in capsys.readouterr().out
    page = tmp_path / "report.html"
    words = ["report", str(run), "-o", str(page), "--predictions", str(out)]
    assert call(*words, "--metrics", str(json_file)) == 0
    assert page.read_text().count("data:image/png;base64,") == 2


def call(*arguments: str) -> int:
    try:
        run_app(app, arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0
