"""job.json: a task with everything that the process which does it must know."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from voxelbridge.core.config import Config, validate
from voxelbridge.core.files import read_json, write_json
from voxelbridge.core.train.distributed import DeviceChoice
from voxelbridge.detect.study.inputs import Input
from voxelbridge.detect.study.jobs import Job
from voxelbridge.detect.study.markers import JOB_FILE, job_folder
from voxelbridge.detect.study.tasks import Task


class InputPath(Config):
    """An `Input` as JSON."""

    kind: Literal["file", "raw-train", "raw-test", "raw", "store"]
    path: str


class JobFile(Config):
    """Content of the file."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    id: str
    study: str  # folder
    task: Task
    after: tuple[str, ...]
    inputs: tuple[InputPath, ...]
    device: DeviceChoice
    workers: int
    threads: int | None  # of torch; None: as many as there are cores

    @property
    def sources(self) -> tuple[Input, ...]:
        """The inputs as `describe_input` takes them."""
        return tuple(Input(item.kind, Path(item.path)) for item in self.inputs)


def write_job(
    study: Path, job: Job, *, device: DeviceChoice, workers: int, threads: int | None
) -> Path:
    """Writes the file of a job; returns the job's folder."""
    folder = job_folder(study, job.id)
    content = JobFile(
        schema=1,
        id=job.id,
        study=str(study),
        task=job.task,
        after=job.after,
        inputs=tuple(InputPath(kind=item.kind, path=str(item.path)) for item in job.inputs),
        device=device,
        workers=workers,
        threads=threads,
    )
    write_json(folder / JOB_FILE, content.model_dump(mode="json", by_alias=True))
    return folder


def read_job(folder: Path) -> JobFile:
    """The file in a job's folder."""
    path = folder / JOB_FILE
    return validate(JobFile, read_json(path), where=str(path))
