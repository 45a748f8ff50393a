"""Fetching weights from a hub that runs in this process, from its cache, and from a folder."""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from voxelbridge.core import hub
from voxelbridge.core.cli import app
from voxelbridge.core.command_line import run_app
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.hub import Fetched, Reference, fetch, parse_reference

COMMIT = "c" * 40
WEIGHTS = b"weights" * 1000
PLAN = b'{"key_to_stem": "encoder.stem"}'
REPOSITORY = {
    "checkpoint_final.pth": WEIGHTS,
    "adaptation_plan.json": PLAN,
    "config.json": b"{}",
    ".gitattributes": b"*.pth lfs",
}


@dataclass
class Hub:
    """Files of the one repository MIC/ResEncL, and what was asked for."""

    files: dict[str, bytes]
    address: str = ""
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def stand_in() -> Iterator[Hub]:
    content = Hub(dict(REPOSITORY))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - theirs
            pass

        def _answer(self, *, with_body: bool) -> None:
            content.asked.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0]
            files = "/MIC/ResEncL/resolve/main/"
            path = path.replace(f"/resolve/{COMMIT}/", "/resolve/main/")
            api = "/api/models/MIC/ResEncL"
            if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                names = [{"rfilename": name} for name in content.files]
                info = {"id": "MIC/ResEncL", "sha": COMMIT, "siblings": names}
                self._send(json.dumps(info).encode(), {"Content-Type": "application/json"})
            elif path.startswith(files) and path.removeprefix(files) in content.files:
                name = path.removeprefix(files)
                body = content.files[name]
                stated = REPOSITORY.get(name, body)  # the hub states what was uploaded
                etag = (
                    hashlib.sha256(stated)
                    if name.endswith(".pth")
                    else hashlib.sha1(b"blob %d\0" % len(stated) + stated)
                )
                headers = {"ETag": f'"{etag.hexdigest()}"', "X-Repo-Commit": COMMIT}
                self._send(body if with_body else b"", headers, length=len(body))
            else:
                code = "RevisionNotFound" if path.startswith(api) else "RepoNotFound"
                self._send(b"", {"X-Error-Code": code}, status=404)

        def _send(
            self, body: bytes, headers: dict[str, str], *, status: int = 200, length: int = -1
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    content.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield content
    server.shutdown()
    thread.join()
    server.server_close()


def get(
    stand_in: Hub, folder: Path, text: str = "hf:MIC/ResEncL", *, offline: bool = False
) -> Fetched:
    pytest.importorskip("huggingface_hub")
    return fetch(
        parse_reference(text),
        folder / "out",
        offline=offline,
        endpoint=stand_in.address,
        cache=folder / "cache",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:A/b", Reference("A/b")),
        ("hf:A/b.c-1@v1.0", Reference("A/b.c-1", "v1.0")),
        ("hf:A/b@main/x/y.pth", Reference("A/b", "main", "x/y.pth")),
        ("hf:A/b/x@2.pth", Reference("A/b", None, "x@2.pth")),
        ("file:some/folder", Reference(folder=Path("some/folder"))),
    ],
)
def test_references_are_read(text: str, expected: Reference) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    "text",
    ["A/b", "hf:A", "hf:A/", "hf:/b", "hf:A/b@", "hf:../b", "hf:A/b/../c", "hf:A/b//c", "hf:A/b/",
     "hf:A/b\n", "hf:A/b/x\\..\\y", "http://x/y"],
)  # fmt: skip
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot fetch") as error:
        parse_reference(text)
    assert "\n" not in str(error.value)


def test_weights_and_plan_are_fetched_of_one_commit_and_verified(
    stand_in: Hub, tmp_path: Path
) -> None:
    fetched = get(stand_in, tmp_path)
    assert fetched.weights.read_bytes() == WEIGHTS
    assert fetched.plan is not None
    assert fetched.plan.read_bytes() == PLAN
    assert (fetched.revision, fetched.verified) == (COMMIT, True)
    assert fetched.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    record = json.loads((tmp_path / "out" / hub.RECORD).read_text())
    assert record["revision"] == COMMIT
    assert record["files"]["adaptation_plan.json"]["verified"]
    assert not any("config.json" in line for line in stand_in.asked)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"checkpoint_final.pth", "adaptation_plan.json", hub.RECORD}


def test_offline_takes_the_cache_and_asks_nobody(stand_in: Hub, tmp_path: Path) -> None:
    get(stand_in, tmp_path)
    stand_in.asked.clear()
    (tmp_path / "out" / "checkpoint_final.pth").unlink()
    fetched = get(stand_in, tmp_path, offline=True)
    assert fetched.weights.read_bytes() == WEIGHTS
    assert (fetched.revision, fetched.verified) == (COMMIT, True)
    assert stand_in.asked == []


def test_offline_without_a_cache_is_one_line(stand_in: Hub, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="hf:MIC/ResEncL: offline, and not in this machine"
    ) as error:
        get(stand_in, tmp_path, offline=True)
    assert "\n" not in str(error.value)
    assert stand_in.asked == []
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_what_the_hub_states_is_refused(stand_in: Hub, tmp_path: Path) -> None:
    stand_in.files["checkpoint_final.pth"] = WEIGHTS[:-1] + b"X"
    with pytest.raises(DataError, match="is not what the hub states"):
        get(stand_in, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hf:MIC/Other", "no such repository"),
        ("hf:MIC/ResEncL@v9", "has no revision 'v9'"),
        ("hf:MIC/ResEncL/no.pth", "holds no file 'no.pth'; it holds checkpoint_final.pth"),
    ],
)
def test_what_is_not_there_is_one_line(
    stand_in: Hub, tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(DataError, match=words) as error:
        get(stand_in, tmp_path, text)
    assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(DataError, match=r"^hf:A/b: ") as error:
        fetch(parse_reference("hf:A/b"), tmp_path / "out", endpoint="http://127.0.0.1:9",
              cache=tmp_path / "cache")  # fmt: skip
    assert "\n" not in str(error.value)


def copy_of(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def test_of_several_weights_one_must_be_named_or_be_the_final_one(tmp_path: Path) -> None:
    several = copy_of(tmp_path / "a", "fold_0/x.pth", "fold_1/x.pth", "fold_1/plans.json")
    with pytest.raises(DataError, match=r"several weights.*fold_0/x.pth, fold_1/x.pth"):
        fetch(Reference(folder=several), tmp_path / "out")
    final = copy_of(tmp_path / "b", "checkpoint_final.pth", "checkpoint_best.pth")
    fetched = fetch(Reference(folder=final), tmp_path / "out")
    assert fetched.weights.name == "checkpoint_final.pth"
    assert fetched.others == ("checkpoint_best.pth",)
    assert not fetched.verified
    with pytest.raises(DataError, match=r"holds no weights; it holds README\.md"):
        fetch(Reference(folder=copy_of(tmp_path / "c", "README.md")), tmp_path / "out")


def test_other_files_of_the_same_name_are_not_overwritten(tmp_path: Path) -> None:
    source = copy_of(tmp_path / "a", "x.pth", "README.md")
    out = copy_of(tmp_path / "out", "x.pth")
    (out / "README.md").write_text("mine")
    with pytest.raises(DataError, match=r"README.md: is there already, with other content"):
        fetch(Reference(folder=source), out)
    assert (out / "README.md").read_text() == "mine"


def test_the_command_says_how_to_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copy_of(tmp_path / "a b", "checkpoint_final.pth", "adaptation_plan.json")
    out = tmp_path / "o"
    with pytest.raises(SystemExit) as end:
        run_app(app, ["fetch", f"file:{source}", "-o", str(out)])
    assert not end.value.code
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"import it with: vb-core import {out}/checkpoint_final.pth "
        f"-o {out}/checkpoint_final.safetensors --plan {out}/adaptation_plan.json"
    )


def test_a_missing_extra_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"install voxelbridge-core\[hub\]"):
        fetch(parse_reference("hf:A/b"), tmp_path)
