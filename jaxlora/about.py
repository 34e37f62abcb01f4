"""What a saved adapter says of itself, whatever the files are: spec, checksums, fingerprint."""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlora import tree
from jaxlora.adapter import Adapter, SavedLeaf, Site, Spec, check_base
from jaxlora.config import LoraConfig
from jaxlora.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DamageError,
    listing,
    nearest,
)
from jaxlora.layout import KernelLayout

FORMAT = 1
"""The version of what is said. A reader refuses newer ones."""

SUM = "sum"
"""The name of the checksum of all that is said."""

_SAMPLES = 1024  # elements of each base leaf that go into its fingerprint


def describe(adapter: Adapter, params: tree.Tree | None, packages: tuple[str, ...]) -> Any:
    """What is saved beside an adapter's leaves, as JSON types.

    Args:
      adapter: the adapter.
      params: the base, whose fingerprint is taken, or None.
      packages: those whose versions are noted.
    """
    about = {
        "format": FORMAT,
        "versions": {name: version(name) for name in packages},
        "spec": {
            "config": adapter.spec.config.to_dict(),
            "sites": [dataclasses.asdict(site) for site in adapter.spec.sites],
            "saved": [dataclasses.asdict(leaf) for leaf in adapter.spec.saved],
        },
        "checksums": {path: checksum(x) for path, x in adapter.values().items()},
        "base": None if params is None else _fingerprint(params, adapter.spec),
    }
    return about | {SUM: text_sum(about)}


def text_sum(about: Mapping[str, Any]) -> int:
    """The crc32 of JSON types, whatever was written beside them under `SUM`."""
    told = {name: value for name, value in about.items() if name != SUM}
    return zlib.crc32(json.dumps(told, sort_keys=True).encode())


def check_format(about: Any, where: Path) -> None:
    """Raises CheckpointError if what `describe` gave is of a newer format, or not of its form."""
    try:
        found = about["format"]
        if not isinstance(found, int) or not isinstance(about["checksums"], dict):
            raise TypeError("format or checksums have the wrong type")
    except (KeyError, TypeError) as e:
        raise damaged(where, e) from e
    if found > FORMAT:
        raise CheckpointError(
            f"{where} has format {found}, this jaxlora reads up to {FORMAT}. Upgrade jaxlora."
        )
    check_text(about, where)


def check_text(about: Mapping[str, Any], where: Path) -> None:
    """Raises DamageError if JSON types are not those that their checksum was taken of."""
    if SUM in about and about[SUM] != text_sum(about):
        raise DamageError(
            f"{where} is damaged: it does not have the checksum that was saved with it. Go back to "
            "an earlier checkpoint."
        )


def spec_of(about: Mapping[str, Any], where: Path) -> Spec:
    """The spec in what `describe` gave.

    Raises:
      CheckpointError: it makes no sense.
    """
    try:
        fields = about["spec"]
        sites = []
        for site in fields["sites"]:
            layout: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in site["layout"].items()
            }
            sites.append(Site(**(site | {"layout": KernelLayout(**layout)})))
        saved = [
            SavedLeaf(leaf["path"], tuple(leaf["shape"]), tuple(leaf["rows"]), leaf["axis"])
            for leaf in fields["saved"]
        ]
        spec = Spec(LoraConfig.from_dict(fields["config"]), tuple(sites), tuple(saved))
        spec.leaf_shapes  # noqa: B018  the layouts must make sense
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ConfigError) as e:
        raise damaged(where, e) from e
    return spec


def check_stored(where: Path, shapes: Mapping[str, tuple[int, ...]], spec: Spec) -> None:
    """Raises CheckpointError unless the leaves that are stored are those of the spec.

    Args:
      where: the file or folder.
      shapes: {path: shape} of what is stored.
      spec: the spec; every leaf that is missing, too many or of another shape is named.
    """
    expected = spec.leaf_shapes | spec.frozen_shapes
    said = []
    if missing := [path for path in expected if path not in shapes]:
        near = listing(nearest(missing[0], shapes)) or "there are no leaves"
        said.append(f"lacks {listing(missing, 20)}, which its spec names. Nearest: {near}.")
    wrong = [
        f"leaf {path} has shape {shapes[path]}, expected {shape}"
        for path, shape in expected.items()
        if shapes.get(path, shape) != shape
    ]
    if wrong:
        said.append(f"does not fit its spec: {listing(wrong, 20)}.")
    if extra := sorted(set(shapes) - set(expected)):
        said.append(f"holds leaves that its spec lacks: {listing(extra, 20)}.")
    if said:
        raise CheckpointError(f"{where} {' It '.join(said)}")


def check_sums(where: Path, leaves: Mapping[str, Any], checksums: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a leaf has another checksum than was saved with it."""
    for path, x in leaves.items():
        if checksums.get(path) != checksum(x):
            raise DamageError(
                f"{where} is damaged: leaf {path} does not have the checksum that was saved with "
                "it. Go back to an earlier checkpoint."
            )


def check_same_base(params: tree.Tree, spec: Spec, saved: Any, where: Path) -> None:
    """Raises CheckpointError unless the params are the base that an adapter was saved with.

    Args:
      params: the params.
      spec: the adapter's spec.
      saved: the fingerprint that was saved, or None: then only what is adapted is checked.
      where: the file or folder.
    """
    try:
        check_base(params, spec)
    except AdapterError as e:
        raise CheckpointError(f"{where} does not fit these params. {e}") from e
    if saved is None:
        return
    now = _fingerprint(params, spec)
    if now["structure"] != saved["structure"]:
        raise CheckpointError(
            f"{where} was saved for a base of {saved['leaves']} leaves and "
            f"{saved['size']:,} parameters, these params have {now['leaves']} and "
            f"{now['size']:,}, or other names or shapes. The adapted leaves would fit: "
            "load without `params` if this is what you want."
        )
    other = [p for p, digest in now["content"].items() if saved["content"].get(p, digest) != digest]
    if now["dtypes"] == saved["dtypes"] and other:
        raise CheckpointError(
            f"{where} was saved for a base of the same shapes with other values in "
            f"{listing(other)}. Expected the pretrained params that it was trained on, not merged "
            "or fine-tuned ones; load without `params` if this is what you want."
        )


def _fingerprint(params: tree.Tree, spec: Spec) -> dict[str, Any]:
    """What tells a base from another: names and shapes, dtypes, and a sample of the values.

    Leaves that the adapter replaces are left out of the sample: a fresh head differs each time.
    """
    replaced = {leaf.path for leaf in spec.saved}
    content, dtypes, shapes = {}, {}, {}
    for path, leaf in tree.items(params):
        x = jax.tree.leaves(leaf)[0]  # of a quantized kernel, the codes: nothing is dequantized
        shapes[path], dtypes[path] = tree.aval(leaf), str(x.dtype)
        concrete = isinstance(x, np.ndarray) or (
            isinstance(x, jax.Array) and x.is_fully_addressable
        )
        if concrete and path not in replaced:
            content[path] = checksum(x.ravel()[:: max(1, x.size // _SAMPLES)])
    return {
        "structure": _digest((path, x.shape) for path, x in shapes.items()),
        "dtypes": _digest(dtypes.items()),
        "content": content,
        "leaves": len(shapes),
        "size": tree.size(shapes),
    }


def _digest(rows: Any) -> str:
    return hashlib.sha256(repr(sorted(rows)).encode()).hexdigest()


def checksum(x: Any) -> int:
    """The crc32 of an array's bytes."""
    whole = np.ascontiguousarray(jax.device_get(x)).reshape(-1)
    return zlib.crc32(whole.view(np.uint8).data)  # in place: a copy takes four times as long


def damaged(where: Path, e: Exception) -> DamageError:
    """The error about a checkpoint that cannot be read."""
    said = str(e).strip().split("\n")[0][:300]
    return DamageError(
        f"{where} is damaged: {type(e).__name__}: {said}. Go back to an earlier checkpoint."
    )
