"""Files at web addresses: whole, resumed, checked, or one line that says what is missing."""

import shutil
from collections import namedtuple

import pytest
from helpers.local_hub import LocalHub

from core.config import InputError
from core.download import Download, WebFile, check_plan, fetch_web, web_size
from core.files import file_sha256

CONTENT = bytes(range(256)) * 400


@pytest.fixture
def hub():
    with LocalHub() as server:
        yield server


def web_file(hub, tmp_path, sha256: str = "") -> WebFile:
    return WebFile(
        f"{hub.url}/owner/name/resolve/main/data.npz", tmp_path / "x" / "data.npz", sha256
    )


def test_a_file_is_downloaded_once(hub, tmp_path):
    repository = hub.add("owner/name", {"data.npz": CONTENT})
    file = web_file(hub, tmp_path)
    assert web_size(file) == len(CONTENT)
    assert fetch_web(file).read_bytes() == CONTENT
    assert web_size(file) == 0
    fetch_web(file)
    assert [method for method, *_ in repository.requests] == ["HEAD", "GET"]
    assert fetch_web(file._replace(sha256=file_sha256(file.path)[:8])) == file.path


def test_a_broken_transfer_and_a_killed_one_resume(hub, tmp_path):
    repository = hub.add("owner/name", {"data.npz": CONTENT}, break_after=30_000)
    file = web_file(hub, tmp_path)
    file.path.parent.mkdir()
    part = file.path.with_name("data.npz.part")
    part.write_bytes(CONTENT[:20_000])  # what a killed process leaves
    assert web_size(file) == len(CONTENT) - 20_000
    assert fetch_web(file).read_bytes() == CONTENT
    ranges = [asked for method, _, asked in repository.requests if method == "GET"]
    assert ranges == ["bytes=20000-", "bytes=50000-"]
    assert not part.exists()


def test_other_bytes_than_published_are_refused_and_removed(hub, tmp_path):
    hub.add("owner/name", {"data.npz": CONTENT})
    file = web_file(hub, tmp_path, "0" * 8)
    with pytest.raises(InputError, match="expected 00000000; the copy was removed"):
        fetch_web(file)
    assert list(file.path.parent.glob("data.npz*")) == []


def test_what_cannot_be_downloaded_is_named_with_its_address(hub, tmp_path):
    hub.add("owner/name", {})
    file = web_file(hub, tmp_path)
    for ask in (web_size, fetch_web):
        with pytest.raises(InputError, match=r"data\.npz: not here .*404.* published at http"):
            ask(file)
    hub.stop()
    for ask in (web_size, fetch_web):
        with pytest.raises(InputError, match=r"data\.npz: not here .* published at http"):
            ask(file)


def test_a_plan_that_does_not_fit_on_its_disk_is_refused(tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")(10**9, 0, 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    half = Download("half", 6 * 10**8, tmp_path / "a", None)
    check_plan([half])
    with pytest.raises(InputError, match=r"needs 1\.20 GB, the disk has 1\.00 GB free"):
        check_plan([half, half._replace(folder=tmp_path / "b")])
    assert "half: 0.60 GB" in capsys.readouterr().out
