"""Prediction for files, with a stand-in for the network: files, failures, resuming, memory."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from voxelbridge.core.data.image_cases import ImageCase
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.normalize import CTPercentile, ZScore
from voxelbridge.core.data.preprocess import DEFAULT_RESAMPLING
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.detect import predict_cases as module
from voxelbridge.detect.case_reading import ReadCase, read_case
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.evaluate.tables import read_cases, read_predictions
from voxelbridge.detect.plan import Plan

SCORE = 0.123456789  # as float32


class StandIn:
    """Replaces the network: `calls` are the images that it saw."""

    def __init__(self) -> None:
        self.calls: list[np.ndarray] = []
        self.settings = {"weights_sha256": ["a"]}
        self.plan = SimpleNamespace(
            channel_names=("CT",),
            class_names=("nodule",),
            spacing_mm=(2.0, 1.0, 1.0),
            normalization=(ZScore(),),
            resampling=DEFAULT_RESAMPLING,
        )

    def load(self, *_: object, **__: object) -> module.Ensemble:
        return module.Ensemble([], self.plan, self.settings)  # type: ignore[arg-type]

    def predict(self, _detectors: object, image: np.ndarray, **_options: object) -> Detections:
        self.calls.append(np.asarray(image[:]))
        box = torch.tensor([[1.0, 1.0, 1.0, 3.0, 3.0, 3.0]])
        return Detections(box, torch.tensor([SCORE]), torch.tensor([0]))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(module, "load_ensemble", stand_in.load)
    monkeypatch.setattr(module, "predict_volume", stand_in.predict)
    return stand_in


def write_images(folder: Path, names: Sequence[str], shape: tuple[int, int, int]) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    grid = Grid.from_parts(shape, (2.0, 1.0, 1.0), origin_mm=(5, -7, 11))
    for name in names:
        voxels = rng.integers(1, 500, size=(1, *shape)).astype(np.int16)
        write_image(folder / f"{name}.nii", Volume(voxels, grid))
    return folder


def left_over(out: Path) -> list[str]:
    return [path.name for path in out.iterdir() if path.name.startswith(".partial")]


def test_dicom_series_are_predicted_and_refused_ones_reported(
    tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str], stand_in: StandIn
) -> None:
    series = shared / "data" / "mr_prostate_dicom" / "adc"
    (tmp_path / "images" / "bad").mkdir(parents=True)
    (tmp_path / "images" / "good").mkdir()
    for number, path in enumerate(sorted(series.iterdir())):
        for place in ("good", "bad") if number != 9 else ("good",):
            raw = path.read_bytes()
            # another series: the last digit of its UID
            raw = raw if place == "good" else raw.replace(b"251833954", b"251833955")
            (tmp_path / "images" / place / path.name).write_bytes(raw)
    out = tmp_path / "out"
    with pytest.raises(DataError, match="1 DICOM series or files were refused; the 1 cases"):
        module.predict_cases([tmp_path], [tmp_path / "images"], out)
    assert "series bad" in capsys.readouterr().err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["cases"] == {"good": [str(tmp_path / "images" / "good")]}
    assert "gap" in manifest["refused"][0]
    assert (out / "good.json").is_file()
    assert (out / "good.png").is_file()
    assert len((out / "predictions.csv").read_text().splitlines()) == 2
    assert len(stand_in.calls) == 1


def test_broken_images_fail_alone_with_one_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stand_in: StandIn
) -> None:
    images = write_images(tmp_path / "images", ["a", "cut", "empty", "z"], (6, 20, 22))
    raw = (images / "cut.nii").read_bytes()
    (images / "cut.nii").write_bytes(raw[:-100])
    (images / "empty.nii").write_bytes(b"")
    grid = Grid.from_parts((6, 20, 22), (2.0, 1.0, 1.0))
    voxels = np.ones((1, 6, 20, 22), dtype=np.float32)
    voxels[0, 1, 2, 3] = np.nan
    write_image(images / "nan.mha", Volume(voxels, grid))
    four = bytearray(raw + raw[352:])
    four[40:42], four[48:50] = (4).to_bytes(2, "little"), (2).to_bytes(2, "little")
    (images / "movie.nii").write_bytes(four)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"4 of 6 cases failed .*the other 2 are in"):
        module.predict_cases([tmp_path], [images], out)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    for line, name, reason in zip(
        lines,
        ("cut", "empty", "movie", "nan"),
        ("truncated", "truncated", "2 frames", "1 voxels are NaN"),
        strict=True,
    ):
        assert line.startswith(f"error: case {name}: ")
        assert reason in line
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["failed"] == ["cut", "empty", "movie", "nan"]
    assert "truncated" in manifest["errors"]["cut"]
    assert manifest["finished"] is True
    assert sorted(path.name for path in out.iterdir() if path.suffix == ".png") == [
        "a.png", "z.png",
    ]  # fmt: skip
    names = read_cases(out / "cases.csv")
    assert names == ["a", "z"]
    table = read_predictions(out / "predictions.csv", names)
    assert table.scores is not None
    assert np.float32(table.scores[0]) == np.float32(SCORE)
    assert left_over(out) == []


def test_the_same_command_goes_on_and_another_is_refused(tmp_path: Path, stand_in: StandIn) -> None:
    images = write_images(tmp_path / "images", ["a", "b"], (6, 20, 22))
    out = tmp_path / "out"
    module.predict_cases([tmp_path], [images], out)
    before = (out / "predictions.csv").read_bytes()
    module.predict_cases([tmp_path], [images], out)
    assert len(stand_in.calls) == 2
    (out / "b.json").unlink()  # as if it had been killed before
    module.predict_cases([tmp_path], [images], out)
    assert len(stand_in.calls) == 3
    assert (out / "predictions.csv").read_bytes() == before
    write_images(images, ["a"], (6, 20, 23))  # another image of that name
    module.predict_cases([tmp_path], [images], out)
    assert len(stand_in.calls) == 4
    assert json.loads((out / "a.json").read_text())["shape"] == [6, 20, 23]
    with pytest.raises(ConfigError, match=r"other settings \(min_score\).*--overwrite"):
        module.predict_cases([tmp_path], [images], out, min_score=0.5)
    stand_in.settings = {"weights_sha256": ["b"]}
    with pytest.raises(ConfigError, match=r"other settings \(weights_sha256\)"):
        module.predict_cases([tmp_path], [images], out)
    module.predict_cases([tmp_path], [images], out, overwrite=True)
    assert len(stand_in.calls) == 6
    (out / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"holds a\.json but no manifest"):
        module.predict_cases([tmp_path], [images], out)
    with pytest.raises(ConfigError, match="holds the images themselves"):
        module.predict_cases([tmp_path], [images], images)


def test_channels_go_one_by_one_and_must_agree(
    tmp_path: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.plan.channel_names = ("T1", "CT")
    ct = CTPercentile(lower=0, upper=400, mean=100, std=50)
    stand_in.plan.normalization = (ZScore(nonzero_only=True), ct)
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(1)
    arrays = rng.integers(1, 500, size=(2, 6, 20, 22)).astype(np.int16)
    arrays[0, :2] = arrays[1, :, :, :3] = 0  # each channel has a border of its own
    arrays[:, 0] = 0
    grid = Grid.from_parts((6, 20, 22), (2.0, 2.0, 1.0))
    write_image(images / "a_0000.nii.gz", Volume(arrays[:1], grid))
    write_image(images / "a_0001.nii.gz", Volume(arrays[1:].astype(np.float32), grid))
    write_image(images / "b_0000.nii.gz", Volume(arrays[:1], grid))
    other = Grid.from_parts((6, 20, 22), (2.0, 2.0, 1.0), origin_mm=(9, 0, 0))
    write_image(images / "b_0001.nii.gz", Volume(arrays[1:], other))
    with pytest.raises(DataError, match="1 of 2 cases failed"):
        module.predict_cases([tmp_path], [images], tmp_path / "out", pictures=False)
    assert "b_0001.nii.gz: grid" in capsys.readouterr().err
    from voxelbridge.core.data.preprocess import crop_mapping, preprocess

    volume = Volume(arrays.astype(np.float32), grid)
    mapping = crop_mapping(volume)
    assert mapping.crop_start == (1, 0, 0)
    expected = preprocess(
        volume, mapping, spacing_mm=(2.0, 1.0, 1.0), normalization=stand_in.plan.normalization
    )
    assert np.array_equal(stand_in.calls[0], expected.image)
    (images / "b_0001.nii.gz").unlink()
    with pytest.raises(DataError, match=r"case b: channels \[0\], the model needs 2"):
        module.predict_cases([tmp_path], [images], tmp_path / "out2")


def test_the_next_case_is_prepared_while_the_network_works(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_images(tmp_path / "images", ["a", "b", "c", "d"], (6, 20, 22))
    out = tmp_path / "out"
    ahead: list[list[str]] = []

    def predict(detectors: object, image: np.ndarray, **options: object) -> Detections:
        end = time.monotonic() + 20
        waiting = ["b", "c", "d"][len(ahead) :][:1]
        while waiting and time.monotonic() < end:  # until it is there whole
            if not list(out.glob(".partial-*.channel1")) and all(
                (out / f".partial-{name}.image").exists() for name in waiting
            ):
                break
            time.sleep(0.02)
        ahead.append(sorted(path.name for path in out.glob(".partial-*.image")))
        return stand_in.predict(detectors, image, **options)

    monkeypatch.setattr(module, "predict_volume", predict)
    module.predict_cases([tmp_path], [images], out, pictures=False)
    assert ahead == [
        [".partial-a.image", ".partial-b.image"],
        [".partial-b.image", ".partial-c.image"],
        [".partial-c.image", ".partial-d.image"],
        [".partial-d.image"],
    ]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_predict_cases import StandIn
from voxelbridge.detect import predict_cases as module

stand_in = StandIn()
module.load_ensemble = stand_in.load
def predict(*arguments, **options):
    if len(stand_in.calls) == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    return stand_in.predict(*arguments, **options)
module.predict_volume = predict
module.predict_cases([Path({runs!r})], [Path({images!r})], Path({out!r}))
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_prediction_goes_on_where_it_was(tmp_path: Path, stand_in: StandIn) -> None:
    images = write_images(tmp_path / "images", ["a", "b", "c"], (6, 20, 22))
    out = tmp_path / "out"
    script = KILLED.format(
        tests=str(Path(__file__).parent), after=1, runs=str(tmp_path), images=str(images),
        out=str(out),
    )  # fmt: skip
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -9
    assert (out / "a.json").is_file()
    assert not (out / "predictions.csv").exists()
    assert json.loads((out / "manifest.json").read_text())["finished"] is False
    module.predict_cases([tmp_path], [images], out)
    assert len(stand_in.calls) == 2
    assert left_over(out) == []
    again = tmp_path / "again"
    module.predict_cases([tmp_path], [images], again)
    for name in ("predictions.csv", "cases.csv", "b.json", "a.mrk.json"):
        assert (out / name).read_bytes() == (again / name).read_bytes()


def _peak_of(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, images: Path
) -> dict[str, int]:
    """Largest anonymous memory in MiB that reading added in its process."""
    peaks: dict[str, int] = {}

    def anonymous() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssAnon:")[1].split()[0]) >> 10

    def watched(plan: Plan, folder: Path, case: ImageCase, *, picture: bool) -> ReadCase:
        import threading

        start, peak, stop = anonymous(), [0], threading.Event()

        def watch() -> None:
            while not stop.wait(0.001):
                peak[0] = max(peak[0], anonymous() - start)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            return read_case(plan, folder, case, picture=picture)
        finally:
            stop.set()
            thread.join()
            (folder / "peak.txt").write_text(str(peak[0]))

    monkeypatch.setattr(module, "read_case", watched)
    out = tmp_path / f"out-{images.name}"
    module.predict_cases([tmp_path], [images], out, pictures=False)
    peaks["child"] = int((out / "peak.txt").read_text())
    return peaks


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_reading_holds_one_channel_and_no_float_copy(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.plan.spacing_mm = (1.9, 0.9, 0.9)  # all axes are resampled
    raw = (160 * 320 * 320 * 2) >> 20  # 31 MiB; float32 after resampling is 81 MiB
    peak = 0
    for attempt in range(3):  # on a busy machine the watching thread may sleep through it
        images = write_images(tmp_path / f"images{attempt}", ["a"], (160, 320, 320))
        peak = max(peak, _peak_of(tmp_path, stand_in, monkeypatch, images)["child"])
        if peak >= raw:
            break
    assert raw <= peak < raw + 40  # slabs, and the libraries' own
