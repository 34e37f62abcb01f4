"""LoRA-only Orbax checkpoints: a few MB, whole or not there.

A checkpoint is a folder with two Orbax items: `params`, the adapter's leaves, and `adapter`, JSON
with the spec, the versions, a checksum of each leaf and the fingerprint of the base. Orbax
writes under a temporary name and renames at the end, so a save that is killed leaves no folder
under the final name.
"""

import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from jaxlora import hosts, tree
from jaxlora.about import (
    check_format,
    check_same_base,
    check_stored,
    check_sums,
    damaged,
    describe,
    spec_of,
)
from jaxlora.adapter import Adapter, boxed_like, check_base, check_leaves
from jaxlora.errors import CheckpointError, listing, nearest

_LEAVES, _ABOUT = "params", "adapter"


def save_adapter(
    path: str | os.PathLike[str],
    adapter: Adapter,
    *,
    params: tree.Tree | None = None,
    overwrite: bool = False,
    items: Mapping[str, Any] | None = None,
) -> Path:
    """Writes an adapter's leaves and its spec as an Orbax checkpoint.

    With several processes all call it, and the first writes, to a folder that all see.

    Args:
      path: the folder to make; relative paths work.
      adapter: the adapter.
      params: the base. Its fingerprint is stored, so that loading onto another one is an error.
      overwrite: replace an adapter that is there. It stays until the new one is whole.
      items: further Orbax items (`orbax.checkpoint.args`) to keep in the folder, such as an
        optimizer's state; `load_adapter` passes them over.

    Returns:
      The absolute path.

    Raises:
      CheckpointError: something is there already, or what is there is no adapter.
      AdapterError: the leaves are not those of the spec, or do not fit `params`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl, tempfile
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), x)
      >>> path = jl.save_adapter(tempfile.mkdtemp() + "/adapter", adapter)
      >>> jl.load_adapter(path).spec == adapter.spec
      True
    """
    final = Path(path).absolute()
    adapter = hosts.on_host(adapter)
    with hosts.together():
        check_leaves(adapter)
        if params is not None:
            check_base(params, adapter.spec)
        if hosts.is_writer():
            _save(final, adapter, params, overwrite, items or {})
    return final


def load_adapter(path: str | os.PathLike[str], *, params: tree.Tree | None = None) -> Adapter:
    """Reads an adapter that `save_adapter` wrote; every leaf is checked, and exact.

    Args:
      path: the folder; relative paths work.
      params: the base that it will be used on. Its shapes are checked, and its fingerprint if one
        was saved: the same weights in another dtype pass, other weights do not. Leaves come back
        boxed (`nn.Partitioned`) where the base's are.

    Returns:
      The adapter, on the default device.

    Raises:
      CheckpointError: no adapter at `path`, one that is damaged, of a newer format, or made for
        another base. The message names the leaf.
    """
    final = Path(path).absolute()
    about = _read_about(final)
    spec = spec_of(about, _about_file(final))
    stored = stored_leaves(final)
    check_stored(final, {p: tuple(x.shape) for p, x in stored.items()}, spec)
    if params is not None:
        check_same_base(params, spec, about.get("base"), final)
    leaves = restored(final, _LEAVES, stored, about["checksums"])
    if params is not None:
        base = tree.flat(params)
        leaves = {p: boxed_like(base, spec, p, x) for p, x in leaves.items()}
    return spec.adapter(leaves)


def restored(
    folder: Path, item: str, stored: Mapping[str, Any], checksums: Mapping[str, Any]
) -> dict[str, Any]:
    """The leaves of one Orbax item of a checkpoint, exact.

    Args:
      folder: the checkpoint.
      item: the item's name.
      stored: {path: what has the leaf's shape and dtype}.
      checksums: those that were saved with the leaves.

    Raises:
      CheckpointError: a file cannot be read, or a leaf has another checksum.
    """
    store, leaves = _store(folder / item), {}
    try:
        for path in stored:
            leaves[path] = jnp.asarray(_opened(store, path.replace("/", ".")).read().result())
    except Exception as e:
        raise damaged(folder, e) from e
    check_sums(folder, leaves, checksums)
    return leaves


def recover(path: str | os.PathLike[str], *, tidy: bool = False) -> None:
    """Finishes a `save_adapter(overwrite=True)` that was killed between its two renames.

    Does nothing if there is an adapter at `path`, or no such left-over beside it.

    Args:
      path: the adapter's folder.
      tidy: take the left-overs away as well. Only for the one process that writes there: another's
        may be a save that is under way.
    """
    final = Path(path).absolute()
    for aside in sorted(final.parent.glob(f"{glob.escape(final.name)}.replaced-*")):
        for whole in (aside / "new", aside / "old"):
            if not final.exists() and _is_adapter(whole):
                with contextlib.suppress(FileNotFoundError):  # its writer was faster
                    os.rename(whole, final)
        if tidy and final.exists():
            shutil.rmtree(aside)


def _save(
    final: Path,
    adapter: Adapter,
    params: tree.Tree | None,
    overwrite: bool,
    items: Mapping[str, Any],
) -> None:
    if final.exists() and not overwrite:
        raise CheckpointError(
            f"{final} is there already, expected a new path. `overwrite=True` replaces an adapter."
        )
    if final.exists() and not _is_adapter(final):
        raise CheckpointError(
            f"{final} is there and is no adapter, so it is not overwritten. Choose another path."
        )
    about = describe(adapter, params, ("jax", "flax", "orbax-checkpoint"))
    everything = {
        _LEAVES: ocp.args.StandardSave(tree.nested(adapter.values())),
        _ABOUT: ocp.args.JsonSave(about),
    } | dict(items)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():
            _replace(final, everything)
        else:
            _write(final, everything)
    except Exception as e:  # a full disk, a folder that is read-only, another writer
        said = str(e).strip().split("\n")[0].partition(" [tensorstore_spec")[0]
        said = said if len(said) < 300 else f"{said[:100]} … {said[-200:]}"  # why is at the end
        raise CheckpointError(
            f"{final} could not be saved: {type(e).__name__}: {said}. What was there before is as "
            "it was. Expected a folder with room, that this process alone writes to."
        ) from e


def _replace(final: Path, items: Mapping[str, Any]) -> None:
    """Writes beside what is there, and takes its place when it is whole."""
    aside = Path(tempfile.mkdtemp(dir=final.parent, prefix=f"{final.name}.replaced-"))
    try:
        _write(aside / "new", items)
        os.rename(final, aside / "old")
        os.rename(aside / "new", final)
    finally:
        if not final.exists() and (aside / "old").exists():
            os.rename(aside / "old", final)
        shutil.rmtree(aside, ignore_errors=True)


def _write(final: Path, items: Mapping[str, Any]) -> None:
    with _orbax() as checkpointer:
        checkpointer.save(final, args=ocp.args.Composite(**items))


def _orbax() -> ocp.Checkpointer:
    """Orbax for this process alone: it waits for no other."""
    if hosts.alone():
        return ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    here = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
    )
    composite = ocp.CompositeOptions(multiprocessing_options=options)
    handler = ocp.CompositeCheckpointHandler(composite_options=composite)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _about_file(folder: Path) -> Path:
    return folder / _ABOUT / "metadata"


def _is_adapter(folder: Path) -> bool:
    return _about_file(folder).is_file() and (folder / _LEAVES).is_dir()


def _read_about(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        here = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = listing(nearest(folder.name, here)) or "nothing"
        raise CheckpointError(f"There is no folder {folder}, expected an adapter. Nearest: {near}.")
    if not _is_adapter(folder):
        raise CheckpointError(
            f"{folder} is no adapter: it holds {listing(sorted(p.name for p in folder.iterdir()))}"
            f", expected '{_LEAVES}' and '{_ABOUT}' as `save_adapter` writes them."
        )
    try:
        about = json.loads(_about_file(folder).read_text())
    except (ValueError, RecursionError, OSError) as e:
        raise damaged(_about_file(folder), e) from e
    check_format(about, _about_file(folder))
    return about


def stored_leaves(folder: Path, item: str = _LEAVES) -> dict[str, Any]:
    """{path: array metadata} of one item of a checkpoint, without reading an array.

    Raises:
      DamageError: it cannot be read, or holds what is no array.
    """
    store = _store(folder / item)
    try:
        # One after the other: Orbax opens and reads them all at once, and where one is damaged the
        # others come back to an event loop that is closed by then, each with a traceback.
        for key in ts.KvStore.open(store).result().list().result():
            if key.endswith(b"/.zarray"):
                _opened(store, key.decode().removesuffix("/.zarray"))
        found = ocp.StandardCheckpointHandler().metadata(epath.Path(folder / item)).tree
    except Exception as e:
        raise damaged(folder, e) from e
    leaves = tree.flat(found)
    if bare := [path for path, x in leaves.items() if not hasattr(x, "shape")]:
        raise damaged(folder, TypeError(f"{listing(bare)} is no array"))
    return leaves


def _store(item: Path) -> dict[str, Any]:
    """How TensorStore, on which Orbax is built, finds an item's arrays."""
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}


def _opened(store: Mapping[str, Any], name: str) -> Any:
    return ts.open({"driver": "zarr", "kvstore": {**store, "path": name}}).result()
