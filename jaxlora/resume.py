"""The state of a training run beside its adapter: what is needed to go on as if never stopped.

A checkpoint of `save_state` is one of `save_adapter` with two more Orbax items: `state`, the
optimizer's leaves, the step and the key, and `run`, JSON with what the loop keeps. `load_adapter`
reads it as well.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxlora import hosts, tree
from jaxlora.about import SUM, check_text, checksum, damaged, text_sum
from jaxlora.checkpoint import load_adapter, recover, restored, save_adapter, stored_leaves
from jaxlora.errors import CheckpointError, listing
from jaxlora.train import TrainState

_STATE, _RUN = "state", "run"


def save_state(
    path: str | os.PathLike[str],
    state: TrainState,
    about: Mapping[str, Any] | None = None,
    *,
    params: tree.Tree | None = None,
    overwrite: bool = True,
) -> Path:
    """Writes adapter, optimizer state, step and key as one Orbax checkpoint, whole or not at all.

    Args:
      path: the folder to make.
      state: the state; the base is not in it.
      about: what else the run needs, as JSON types: the place in the data, the best score.
      params: the base; its fingerprint is stored.
      overwrite: replace a checkpoint that is there; it stays until the new one is whole.

    Returns:
      The absolute path.

    Raises:
      CheckpointError: something else is at `path`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl, optax, tempfile
      >>> model, x, tx = nn.Dense(3), jnp.ones((2, 4)), optax.adam(1e-3)
      >>> variables = model.init(jax.random.key(0), x)
      >>> adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), x)
      >>> state = jl.TrainState.create(adapter, tx, jax.random.key(2))
      >>> path = save_state(tempfile.mkdtemp() + "/last", state, {"epoch": 1})
      >>> load_state(path, state)[1]
      {'epoch': 1}
    """
    leaves = hosts.on_host(_leaves(state))
    run: dict[str, Any] = {
        "about": dict(about or {}),
        "key": str(jax.random.key_impl(state.key)),
        "checksums": {name: checksum(x) for name, x in leaves.items()},
    }
    run[SUM] = text_sum(run)
    items = {
        _STATE: ocp.args.StandardSave(tree.nested(leaves)),
        _RUN: ocp.args.JsonSave(run),
    }
    with hosts.together():
        if hosts.is_writer():
            recover(path, tidy=True)
    return save_adapter(path, state.adapter, params=params, overwrite=overwrite, items=items)


def load_state(
    path: str | os.PathLike[str], like: TrainState, *, params: tree.Tree | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """Reads what `save_state` wrote; every leaf is checked, and exact.

    Args:
      path: the folder.
      like: a state of the same adapter and optimizer, such as a fresh one.
      params: the base, checked as in `load_adapter`.

    Returns:
      The state and `about`.

    Raises:
      CheckpointError: no such checkpoint, a damaged one, or one of another adapter or optimizer.
        The message names the leaf.
    """
    final = Path(path).absolute()
    recover(final)
    adapter = load_adapter(final, params=params)
    if adapter.spec != like.adapter.spec:
        raise CheckpointError(
            f"{final} holds an adapter of another config, expected that of the state to fill. "
            "Resume with the settings that the run was started with."
        )
    run = _read_run(final)
    wanted = _leaves(like)
    stored = stored_leaves(final, _STATE)
    _check_stored(final, stored, wanted)
    leaves = restored(final, _STATE, stored, run["checksums"])
    names, structure = _names(like.opt_state)
    try:
        key = jax.random.wrap_key_data(leaves["key"], impl=run["key"])
    except (KeyError, ValueError, TypeError) as e:
        raise damaged(final / _RUN, e) from e
    return dataclasses.replace(
        like,
        step=leaves["step"],
        adapter=adapter,
        opt_state=jax.tree.unflatten(structure, [leaves[name] for name in names]),
        key=key,
    ), run["about"]


def _leaves(state: TrainState) -> dict[str, Any]:
    """{name: array} of all but the adapter."""
    names, _ = _names(state.opt_state)
    leaves = dict(zip(names, jax.tree.leaves(state.opt_state), strict=True))
    return leaves | {"step": state.step, "key": jax.random.key_data(state.key)}


def _names(opt_state: Any) -> tuple[list[str], Any]:
    paths, structure = jax.tree_util.tree_flatten_with_path(opt_state)
    keystr = jax.tree_util.keystr
    return [f"opt_state/{keystr(p, simple=True, separator='/')}" for p, _ in paths], structure


def _read_run(folder: Path) -> dict[str, Any]:
    file = folder / _RUN / "metadata"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} holds an adapter without the state of its run, so it cannot be resumed. "
            "Expected a checkpoint of `save_state`."
        )
    try:
        run = json.loads(file.read_text())
        if not {"about", "key", "checksums"} <= set(run):
            raise KeyError("about, key or checksums")
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as e:
        raise damaged(file, e) from e
    check_text(run, file)
    return run


def _check_stored(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    missing, extra = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
    if missing or extra:
        raise CheckpointError(
            f"{folder} is of another optimizer: it lacks {listing(missing) or 'nothing'} and has "
            f"{listing(extra) or 'nothing'} besides. Resume with the settings of its run."
        )
    for name, leaf in wanted.items():
        if name == "key":  # it comes back as the kind that it was saved as
            continue
        found, expected = stored[name], jnp.asarray(leaf)
        if tuple(found.shape) != expected.shape or found.dtype != expected.dtype:
            raise CheckpointError(
                f"{folder}: {name} is {found.dtype}{tuple(found.shape)}, expected "
                f"{expected.dtype}{expected.shape}. Resume with the settings of its run."
            )
