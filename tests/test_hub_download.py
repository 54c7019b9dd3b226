"""Checkpoints from a Hub, over HTTP: a real server on this machine, and the command as a user types it.

The server speaks as much of the Hub's API as huggingface_hub asks for, which finds it by HF_ENDPOINT. That and other
variables are read once by a process: most tests set what huggingface_hub made of them instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from transformers import LlamaConfig

from evo.merge_file import merge
from search_spaces.layout import Role
from search_spaces.recipe import Recipe, Rule, Source
from tests.commands import invoke, mergefront
from tests.conftest import VOCABULARY, make_checkpoint
from tests.test_export import hashes

RULES = (Rule("linear", {"a": 0.3}, roles=(Role.ATTENTION, Role.FFN)),)
SHARD = "model-00001-of-00002.safetensors"
UNWANTED = ("pytorch_model.bin", "model.pt", "consolidated.safetensors", "original/model.safetensors")
_PATH = re.compile(
    r"/(api/models/)?(?P<id>[\w-]+/[\w-]+)/(?P<what>revision|tree|resolve)/(?P<at>[^/]+)(/(?P<file>.*))?"
)


def commit_of(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """What a Hub has, what is wrong with it, and what it has been asked for."""

    daemon_threads = True

    def __init__(self, repos: dict[str, dict[str, Path]]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos = repos
        """Id -> branch or tag -> files."""
        self.gated: set[str] = set()
        self.faults: dict[str, str] = {}
        """File -> how sending it fails."""
        self.sent: list[tuple[str, str | None]] = []
        """Every file whose content was asked for, and the range of bytes."""
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """To one request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        match = _PATH.fullmatch(urlsplit(self.path).path)
        if match is None or match["id"] not in self.server.repos:
            return self._refuse(404, "RepoNotFound")
        named = self.server.repos[match["id"]]
        folder = (named | {commit_of(folder): folder for folder in named.values()}).get(unquote(match["at"]))
        if folder is None:
            return self._refuse(404, "RevisionNotFound")
        files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        if match["what"] == "revision":
            found = {"id": match["id"], "sha": commit_of(folder), "siblings": [{"rfilename": name} for name in files]}
            return self._send_json(found)
        if match["what"] == "tree":
            about = {name: {"size": len(data), "oid": hashlib.sha1(data).hexdigest()} for name, data in files.items()}
            return self._send_json([{"type": "file", "path": name, **known} for name, known in about.items()])
        if match["id"] in self.server.gated:  # what there is can be seen, as on the Hub
            return self._refuse(401, "GatedRepo")
        return self._send_file(unquote(match["file"]), files[unquote(match["file"])], commit_of(folder))

    do_HEAD = do_GET

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b'{"error": "words of the server"}', {"X-Error-Code": code})

    def _send_json(self, data: object) -> None:
        self._send(200, json.dumps(data).encode(), {})

    def _send_file(self, name: str, data: bytes, commit: str) -> None:
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
        part = self.headers["Range"]
        start = int(part.removeprefix("bytes=").removesuffix("-")) if part else 0
        headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if part else {}
        self.server.sent += [(name, part)] if self.command == "GET" else []
        fault = self.server.faults.get(name) if self.command == "GET" else None
        if fault == "truncated":  # and the length is of what is left: nothing but the HEAD before shows it
            data = data[: len(data) // 2]
        self._send(206 if part else 200, data[start:], headers, cut=fault in ("interrupted", "reset"))
        if fault == "interrupted":
            del self.server.faults[name]
        if fault == "reset":  # a close without lingering is one
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) * 3 // 4] if cut else body)
        self.close_connection |= cut

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three checkpoints as people publish them, with files that a merge has no use for."""
    top = tmp_path_factory.mktemp("published")
    for seed, name in enumerate(["base", "a", "b"]):
        make_checkpoint(top / name, "llama", seed, shard="40KB")
        (top / name / "original").mkdir()
        for file in UNWANTED:
            (top / name / file).write_bytes(b"not for us")
    return {name: top / name for name in ("base", "a", "b")}


@pytest.fixture(scope="module")
def local(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Donor -> hashes of its merge with the base, from the folders themselves."""
    top = tmp_path_factory.mktemp("local")
    for name in ("a", "b"):
        merge(write_recipe(top / f"{name}.yaml", folders["base"], folders[name]), top / name)
    return {name: hashes(top / name) for name in ("a", "b")}


@pytest.fixture
def hub(folders: dict[str, Path]) -> Iterator[Hub]:
    donor = {"main": folders["a"], "v2.0": folders["b"], "refs/pr/1": folders["base"]}
    with Hub({"org/base": {"main": folders["base"]}, "org/donor": donor}) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def write_recipe(path: Path, base: object, donor: object) -> Path:
    path.write_text(Recipe({"base": Source(str(base)), "a": Source(str(donor))}, "base", "a", RULES).to_yaml())
    return path


def in_a_process(hub: Hub, recipe: Path, **variables: str) -> CompletedProcess[str]:
    """`mergefront merge`, with a cache of its own and without what the tests' environment says of the Hub."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(recipe.parent / "home"), **variables}
    return mergefront("merge", recipe, "--out", recipe.parent / "out", env=env)


def run(url: str, recipe: Path) -> CompletedProcess[str]:
    """The same within this process."""
    proxies = {name: None for name in os.environ if "proxy" in name.lower()}
    said = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(recipe.parent / "home" / "hub"),
        "HF_HUB_OFFLINE": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in said.items():
            patch.setattr(constants, name, value)
        close_session()  # which holds to the proxies
        return invoke("merge", recipe, "--out", recipe.parent / "out", env=proxies)


def refused(result: CompletedProcess[str], recipe: Path) -> str:
    """The one line of an error; nothing was written."""
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert not [path for path in recipe.parent.iterdir() if path.name not in (recipe.name, "home")]
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert result.stderr.endswith(f"{line}\n") and str(recipe) in line
    return line


def test_ids_are_downloaded_and_the_commit_is_kept(hub, folders, local, tmp_path):
    result = in_a_process(hub, write_recipe(tmp_path / "recipe.yaml", "org/base", "org/donor"))
    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    assert hashes(out) == local["a"] != local["b"]
    sent = [name for name, _ in hub.sent]
    assert sent.count(SHARD) == 2 and sent.count("tokenizer.json") == 2 and not set(UNWANTED) & set(sent)
    written = Recipe.from_yaml((out / "recipe.yaml").read_text())
    for source, name, folder in (("base", "org/base", "base"), ("a", "org/donor", "a")):
        assert (written.sources[source].path, written.sources[source].revision) == (name, commit_of(folders[folder]))
        for file in ("README.md", "mergekit.yaml"):
            assert f"{name}@{commit_of(folders[folder])}" in (out / file).read_text()
    # The export's recipe holds to its commits, on a machine that has nothing yet, after the branch has moved on.
    hub.repos["org/donor"] = {"main": folders["b"], "old": folders["a"]}
    (tmp_path / "later").mkdir()
    result = run(hub.url, (out / "recipe.yaml").rename(tmp_path / "later" / "recipe.yaml"))
    assert result.returncode == 0, result.stderr
    assert hashes(tmp_path / "later" / "out") == local["a"] and len(hub.sent) == 2 * len(sent)


def test_a_branch_or_tag_is_what_is_merged(hub, local, tmp_path):
    result = run(hub.url, write_recipe(tmp_path / "recipe.yaml", "org/donor@refs/pr/1", "org/donor@v2.0"))
    assert result.returncode == 0, result.stderr
    assert hashes(tmp_path / "out") == local["b"]


@pytest.mark.parametrize(
    ("donor", "expected"),
    [
        ("org/missing", "org/missing: it is not there, or private. Check the id; for a private"),
        ("org/donor@v3", "org/donor@v3: org/donor is there, but not that revision. Expected a branch, a tag or"),
        ("org/gated", "org/gated: access to it is gated. Ask for access on its page there, then log in: hf auth"),
    ],
)
def test_what_the_hub_refuses(hub, folders, tmp_path, donor, expected):
    hub.repos["org/gated"], hub.gated = hub.repos["org/donor"], {"org/gated"}
    recipe = write_recipe(tmp_path / "recipe.yaml", folders["base"], donor)
    assert f"the Hub does not give {expected}" in refused(run(hub.url, recipe), recipe)


def test_a_hub_that_is_down(folders, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", folders["base"], "org/donor@v2.0")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        line = refused(run(url, recipe), recipe)
    assert f"the Hub at {url} cannot be reached" in line and "refused" in line
    assert line.endswith("hf download org/donor --revision v2.0")


def test_a_broken_download_is_not_merged_and_not_kept(hub, local, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", "org/base", "org/donor")
    for fault, expected in (("truncated", "should be of size"), ("reset", "Connection reset by peer")):
        hub.faults[SHARD] = fault
        line = refused(run(hub.url, recipe), recipe)
        assert expected in line and line.endswith("Whole files that have arrived are kept: try again for the others")
    offline = in_a_process(hub, recipe, HF_HUB_OFFLINE="1")
    assert "org/base has not been downloaded, or not all of it" in refused(offline, recipe)
    hub.faults.clear()
    result = run(hub.url, recipe)
    assert result.returncode == 0, result.stderr
    assert hashes(tmp_path / "out") == local["a"]
    assert [name for name, _ in hub.sent].count("config.json") == 2  # once of each


def test_an_interrupted_download_goes_on_where_it_was(hub, tmp_path):
    """In a file of 15 MB: huggingface_hub writes pieces of 10 MiB, and what it has not written it asks for again."""
    size = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(VOCABULARY), **size)
    big = {name: make_checkpoint(tmp_path / name, config, seed, shard="1GB") for seed, name in enumerate(["base", "a"])}
    hub.repos = {f"org/{name}": {"main": folder} for name, folder in big.items()}
    merge(write_recipe(tmp_path / "local.yaml", big["base"], big["a"]), tmp_path / "local")
    hub.faults["model.safetensors"] = "interrupted"
    result = run(hub.url, write_recipe(tmp_path / "recipe.yaml", "org/base", "org/a"))
    assert result.returncode == 0, result.stderr
    assert hashes(tmp_path / "out") == hashes(tmp_path / "local")
    assert [part for name, part in hub.sent if name == "model.safetensors"] == [None, f"bytes={10 * 2**20}-", None]
