"""Downloads and uploads, for real through huggingface_hub, against a hub on loopback."""

import os
import subprocess
import sys
import time

import pytest
from helpers.local_hub import LocalHub
from helpers.paths import ROOT
from huggingface_hub import ModelCard, constants

from core.config import InputError
from core.hub import (
    HubFile,
    NotOnHubError,
    check_space,
    download_size,
    fetch,
    parse_hub_id,
    push_to_hub,
)
from core.weights import find_weights

CONTENT = bytes(range(256)) * 400
FILE = HubFile("owner/name", "model.pt")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with LocalHub() as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def test_hub_ids_are_read_with_file_and_revision():
    assert parse_hub_id("a/b") == HubFile("a/b", "", None)
    assert parse_hub_id("a/b/c/d.pt@v1") == HubFile("a/b", "c/d.pt", "v1")
    for wrong in ("file.pt", "../up/x", "/abs/x", "a//b"):
        assert parse_hub_id(wrong) is None


def test_a_file_is_downloaded_once_and_then_read_from_the_cache(hub):
    repository = hub.add("owner/name", {"model.pt": CONTENT})
    assert download_size(FILE) == len(CONTENT)
    assert fetch(FILE).read_bytes() == CONTENT
    fetch(FILE)
    assert [method for method, *_ in repository.requests].count("GET") == 1
    assert download_size(FILE) == 0


def test_a_broken_transfer_resumes_where_it_stopped(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    repository = hub.add("owner/name", {"model.pt": CONTENT}, break_after=30_000)
    assert fetch(FILE).read_bytes() == CONTENT
    ranges = [asked for method, _, asked in repository.requests if method == "GET"]
    assert len(ranges) == 2
    assert ranges[0] == ""
    start = int(ranges[1].removeprefix("bytes=").split("-")[0])
    assert 0 < start <= 30_000


def test_other_bytes_than_announced_are_refused_and_removed(hub):
    repository = hub.add("owner/name", {"model.pt": CONTENT}, corrupt=True)
    with pytest.raises(InputError, match=r"model\.pt: downloaded with sha256"):
        fetch(FILE)
    repository.corrupt = False
    assert fetch(FILE).read_bytes() == CONTENT


def test_a_file_with_another_sha256_than_registered_is_refused(hub):
    hub.add("owner/name", {"model.pt": CONTENT})
    with pytest.raises(InputError, match="expected 000000000000"):
        fetch(FILE._replace(sha256="0" * 64))


def test_what_is_missing_is_named(hub):
    hub.add("owner/name", {"model.pt": CONTENT})
    with pytest.raises(NotOnHubError, match=r"owner/name/other\.pt: no such file"):
        fetch(FILE._replace(filename="other.pt"))
    with pytest.raises(NotOnHubError, match="no such file or revision"):
        fetch(FILE._replace(revision="v9"))
    with pytest.raises(InputError, match=r"owner/nothing.*no such repository"):
        fetch(FILE._replace(repository="owner/nothing"))


def test_a_gated_repository_says_what_to_do(hub):
    hub.add("owner/name", {"model.pt": CONTENT}, gated=True)
    with pytest.raises(InputError, match="gated: accept its conditions"):
        fetch(FILE)


def test_without_network_the_cache_serves_and_what_it_lacks_is_one_line(hub, monkeypatch):
    hub.add("owner/name", {"model.pt": CONTENT, "other.pt": CONTENT})
    fetch(FILE)
    hub.stop()
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between huggingface_hub's retries
    assert fetch(FILE).read_bytes() == CONTENT
    with pytest.raises(InputError, match=r"other\.pt: neither a local path .* published at"):
        fetch(FILE._replace(filename="other.pt"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(FILE).read_bytes() == CONTENT


def test_a_pattern_must_match_one_file(hub):
    hub.add("owner/name", {"imagenet_a.ckpt": CONTENT, "x_1.pt": b"1", "x_2.pt": b"2"})
    assert fetch(HubFile("owner/name", "imagenet_*.ckpt")).name == "imagenet_a.ckpt"
    with pytest.raises(NotOnHubError, match="2 files match"):
        fetch(HubFile("owner/name", "x_*.pt"))


def test_a_revision_is_downloaded(hub):
    repository = hub.add("owner/name", {"model.pt": CONTENT})
    repository.branches["v1"] = {"model.pt": CONTENT[::-1]}
    assert find_weights("owner/name/model.pt@v1", "").read_bytes() == CONTENT[::-1]
    assert find_weights("owner/name/model.pt", "", revision="v1").read_bytes() == CONTENT[::-1]


def test_too_little_space_is_noticed_before(tmp_path):
    check_space(tmp_path / "not" / "yet", 1, "the download")
    with pytest.raises(InputError, match=r"the download needs 1000000000\.00 GB"):
        check_space(tmp_path / "not" / "yet", 10**18, "the download")


def test_files_are_uploaded_as_one_commit_to_a_branch(hub, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(CONTENT)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (tmp_path / "secret.txt").write_text("not this one")
    files = ["model.safetensors", "README.md"]
    url = push_to_hub(tmp_path, "owner/mine", files, "Upload", revision="v1")
    stored = hub.repositories["owner/mine"]
    assert set(stored.branches["v1"]) == set(files)
    assert stored.branches["v1"]["model.safetensors"] == CONTENT
    assert url.startswith(hub.url)
    ModelCard.load(tmp_path / "README.md").validate()
    with pytest.raises(InputError, match=r"has no missing\.txt"):
        push_to_hub(tmp_path, "owner/mine", ["missing.txt"])


def test_a_command_honours_the_hub_environment(hub, tmp_path):
    hub.add("owner/name", {"model.pt": CONTENT})
    program = "from core.hub import *; print(fetch(HubFile('owner/name', 'model.pt')))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **hub.environment(tmp_path / "other")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "other") in done.stdout
