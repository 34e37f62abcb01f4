"""Assets: download, verification, cache; most against archives made here instead of pip's."""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from jaxlora import fetch as fetching
from jaxlora.datasets import load_reviews
from jaxlora.errors import CheckpointError, ConfigError, MissingDependencyError

MEMBERS = {"pkg/weights.bin": b"weights", "pkg/LICENSE": b"free", "../evil.txt": b"evil"}
REVIEWS = (
    b"1\t2.5\tA fine film.\r\n2\t-0.5\tDull,\xc2\x85 mostly.\r\n3\t0.4\tA film.\r\n4\t0\tNo.\r\n"
)


def tarball(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(_tar_folder("folder"))
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _tar_folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def archive(path: Path, members: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def asset(sha256: str, **changes: Any) -> fetching.Asset:
    fields: dict[str, Any] = {
        "requirement": "pkg==1",
        "sha256": sha256,
        "licence": "MIT",
        "contains": "a test",
        "files": {"pkg/weights.bin": "weights.bin", "pkg/LICENSE": "LICENSE"},
    }
    return fetching.Asset(**(fields | changes))


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Serve an archive in pip's place: call with its members, get the list of commands."""

    def serve(members: dict[str, bytes], name: str = "fake", **changes: Any) -> list[list[str]]:
        path = tmp_path / "pkg-1.zip"
        sha256 = archive(path, members)
        monkeypatch.setitem(fetching.ASSETS, name, asset(**({"sha256": sha256} | changes)))
        commands = []

        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            into = Path(command[command.index("--dest") + 1])
            (into / "pkg-1.zip").write_bytes(path.read_bytes())
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(fetching.subprocess, "run", run)
        return commands

    return serve


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_fetch_extracts_the_named_members_only(served, tmp_path):
    served(MEMBERS)
    folder = fetching.fetch("fake", tmp_path / "cache")
    assert contents(folder) == {"weights.bin": b"weights", "LICENSE": b"free"}
    assert list((tmp_path / "cache").iterdir()) == [folder]
    assert not list(tmp_path.rglob("evil.txt"))


def test_fetch_downloads_once(served, tmp_path, capsys):
    commands = served(MEMBERS)
    assert fetching.fetch("fake", tmp_path / "c") == fetching.fetch("fake", tmp_path / "c")
    assert len(commands) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "jaxlora: downloading pkg==1 (a test)\n"


@pytest.mark.parametrize("from_source", [False, True])
def test_the_command(from_source, served, tmp_path):
    commands = served(MEMBERS, from_source=from_source)
    fetching.fetch("fake", tmp_path / "cache")
    [command] = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--no-cache-dir", "--require-hashes"} < set(command)
    form = "--no-binary" if from_source else "--only-binary"
    assert command[command.index(form) + 1] == "pkg"
    assert not any("index" in word or "://" in word for word in command)


def test_inner_archive(served, tmp_path):
    members = {"pkg/data.tar.gz": tarball({"in/a.txt": b"a", "/abs.txt": b"x"})}
    served(members, files={}, inner={"in/a.txt": "a.txt"}, inner_archive="pkg/data.tar.gz")
    assert contents(fetching.fetch("fake", tmp_path / "cache")) == {"a.txt": b"a"}


def test_hash_mismatch_keeps_nothing(served, tmp_path):
    served(MEMBERS, sha256="0" * 64)
    found = hashlib.sha256((tmp_path / "pkg-1.zip").read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match=f"has sha256 {found}, expected {'0' * 64}: "):
        fetching.fetch("fake", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("members", "changes"),
    [
        ({"pkg/LICENSE": b"free"}, {}),
        ({"pkg/t": b"no tar"}, {"files": {}, "inner": {"a": "a"}, "inner_archive": "pkg/t"}),
        ({"pkg/t": tarball({})}, {"files": {}, "inner": {"a": "a"}, "inner_archive": "pkg/t"}),
        (
            {"pkg/t": tarball({})},
            {"files": {}, "inner": {"folder": "a"}, "inner_archive": "pkg/t"},
        ),
    ],
    ids=["no member", "no tar", "no inner member", "a folder"],
)
def test_another_layout(members, changes, served, tmp_path):
    served(members, **changes)
    with pytest.raises(CheckpointError, match=r"pkg-1.zip of pkg==1 is not laid out as expected"):
        fetching.fetch("fake", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_download_is_no_zip(tmp_path, served, monkeypatch):
    served(MEMBERS)
    (tmp_path / "pkg-1.zip").write_bytes(b"no zip")
    sha256 = hashlib.sha256(b"no zip").hexdigest()
    monkeypatch.setitem(fetching.ASSETS, "fake", asset(sha256))
    with pytest.raises(CheckpointError, match="is not laid out as expected: File is not a zip"):
        fetching.fetch("fake", tmp_path / "cache")


def test_another_process_was_first(served, tmp_path, monkeypatch):
    served(MEMBERS)
    cache = tmp_path / "cache"
    verify = fetching._verify

    def verify_after_the_other(path: Path, asset: fetching.Asset) -> None:
        monkeypatch.setattr(fetching, "_verify", verify)
        fetching.fetch("fake", cache)  # the other one runs to its end in between
        verify(path, asset)

    monkeypatch.setattr(fetching, "_verify", verify_after_the_other)
    folder = fetching.fetch("fake", cache)
    assert contents(folder) == {"weights.bin": b"weights", "LICENSE": b"free"}
    assert list(cache.iterdir()) == [folder]


def test_a_move_that_fails_for_another_reason(tmp_path):
    (tmp_path / "files").mkdir()
    with pytest.raises(FileNotFoundError, match="none"):
        fetching._move(tmp_path / "files", tmp_path / "none" / "folder")


def test_a_file_was_removed_from_the_cache(served, tmp_path):
    served(MEMBERS)
    folder = fetching.fetch("fake", tmp_path / "cache")
    (folder / "weights.bin").unlink()
    with pytest.raises(CheckpointError, match=r"lacks weights.bin. .* delete the folder and fetch"):
        fetching.fetch("fake", tmp_path / "cache")


def test_pip_fails(served, tmp_path, monkeypatch):
    served(MEMBERS)
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution\n")
    monkeypatch.setattr(fetching.subprocess, "run", lambda *_, **__: failed)
    message = r"(?s)could not download pkg==1 \(exit status 1, 0 files\).*ERROR: No matching"
    with pytest.raises(CheckpointError, match=message):
        fetching.fetch("fake", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_pip(served, tmp_path, monkeypatch):
    served(MEMBERS)
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"needs pip, which .* does not have"):
        fetching.fetch("fake", tmp_path / "cache")


def test_unknown_asset():
    with pytest.raises(ConfigError, match="Asset is 'minilm2', expected one of minilm, smollm2"):
        fetching.fetch("minilm2")


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path))
    assert fetching.default_cache() == tmp_path
    monkeypatch.delenv("JAXLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.setattr(fetching.sys, "platform", "linux")
    assert fetching.default_cache() == tmp_path / "x" / "jaxlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetching.default_cache() == Path.home() / ".cache" / "jaxlora"
    monkeypatch.setattr(fetching.sys, "platform", "darwin")
    assert fetching.default_cache() == Path.home() / "Library" / "Caches" / "jaxlora"


# The real assets, over the network the first time.


@pytest.mark.parametrize(
    ("name", "file", "size"),
    [
        ("minilm", "model.safetensors", 90_868_376),
        ("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432),
        ("reviews", "movieReviewSnippets_GroundTruth.txt", 1_383_098),
    ],
)
def test_real_assets(name, file, size):
    folder = fetching.fetch(name)
    assert (folder / file).stat().st_size == size
    assert (folder / "LICENSE").stat().st_size > 500


@pytest.mark.parametrize(
    ("which", "total", "positive"),
    [
        ("movie", 10_072, 4_996),
        ("amazon", 2_985, 1_750),
        ("tweets", 3_432, 2_345),
        ("nyt", 2_970, 1_187),
    ],
)
def test_load_reviews(which, total, positive):
    reviews = load_reviews(which)
    assert len(reviews) == total
    assert sum(label for _, label in reviews) == positive
    assert all(text and "\t" not in text and "\r" not in text for text, _ in reviews)


def served_reviews(served: Any, text: bytes) -> None:
    served(
        {"t": tarball({"m.txt": text})},
        name="reviews",
        files={},
        inner={"m.txt": "movieReviewSnippets_GroundTruth.txt"},
        inner_archive="t",
    )


def test_reviews_are_parsed(served, tmp_path):
    served_reviews(served, REVIEWS)
    dull = "Dull,\x85 mostly."
    assert load_reviews(cache_dir=tmp_path) == [("A fine film.", 1), (dull, 0)]
    everything = [("A fine film.", 1), (dull, 0), ("A film.", 1)]
    assert load_reviews(min_score=0, cache_dir=tmp_path) == everything


@pytest.mark.parametrize("line", [b"5\tx\ttext", b"5\t1.0"])
def test_reviews_that_are_damaged(line, served, tmp_path):
    served_reviews(served, REVIEWS + line)
    with pytest.raises(CheckpointError, match=r"GroundTruth.txt, line 5: got '5\\t.*, expected"):
        load_reviews(cache_dir=tmp_path)


def test_reviews_errors():
    with pytest.raises(ConfigError, match="Reviews are 'books', expected one of movie, amazon"):
        load_reviews("books")  # pyright: ignore
    with pytest.raises(ConfigError, match="min_score is -1, expected a number of at least 0"):
        load_reviews(min_score=-1)
