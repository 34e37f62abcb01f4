"""Checkpoints: only the adapter's leaves, exact, whole or not there, and checked on the way in."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora as jl
from jaxlora.errors import AdapterError, CheckpointError
from tests import zoo

X = jnp.ones((2, 8))
MODEL = zoo.Mlp()


def variables_of(seed=0, x=X):
    return jax.jit(MODEL.init)(jax.random.key(seed), x)


@pytest.fixture(scope="module")
def variables():
    return variables_of()


def made(variables, rank=2, **config):
    config = jl.LoraConfig(rank=rank, **config)
    adapter = jl.lora_init(jax.random.key(1), MODEL, variables, config, X)

    def moved(x):
        return x + jnp.sin(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype)

    return jax.tree.map(moved, adapter)


@pytest.fixture(scope="module")
def adapter(variables):
    return made(variables)


@pytest.fixture(scope="module")
def kept(adapter, variables, tmp_path_factory):
    return jl.save_adapter(
        tmp_path_factory.mktemp("kept") / "adapter", adapter, params=variables["params"]
    )


@pytest.fixture
def saved(kept, tmp_path):
    """A saved adapter in a folder of the test's own, to damage."""
    return Path(shutil.copytree(kept, tmp_path / "adapter"))


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def edited(folder, change):
    """Changes the JSON of a saved adapter."""
    file = folder / "adapter" / "metadata"
    about = json.loads(file.read_text())
    del about["sum"]
    change(about)
    file.write_text(json.dumps(about))


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_a_checkpoint_holds_the_adapters_leaves_and_nothing_of_the_base(tmp_path):
    x = jnp.ones((2, 512))
    params = {"params": {"kernel": jnp.ones((512, 512)), "bias": jnp.zeros(512)}}
    model = nn.Dense(512)
    config = jl.LoraConfig(rank=2)
    adapter = jl.lora_init(jax.random.key(1), model, params, config, x)
    path = jl.save_adapter(tmp_path / "adapter", adapter, params=params["params"])
    size = sum(p.stat().st_size for p in files_of(path))
    leaves = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter))
    assert leaves == 8192
    assert leaves / 2 < size < leaves + 30_000 < params["params"]["kernel"].nbytes / 20


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_leaves_come_back_exactly(variables, dtype, tmp_path):
    adapter = made(variables, param_dtype=dtype, modules_to_save="down")
    path = jl.save_adapter(tmp_path / "adapter", adapter)
    loaded = jl.load_adapter(path)
    assert_equal(loaded, adapter)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}


def test_a_relative_path_works_and_the_absolute_one_is_returned(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = jl.save_adapter("runs/one", adapter)
    assert path == tmp_path / "runs" / "one"
    assert_equal(jl.load_adapter("runs/one"), adapter)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["one"]


def test_saving_where_something_is_needs_overwrite(saved, adapter, variables):
    with pytest.raises(CheckpointError, match=r"adapter is there already, expected a new path"):
        jl.save_adapter(saved, adapter)
    other = made(variables, rank=3)
    jl.save_adapter(saved, other, overwrite=True)
    assert_equal(jl.load_adapter(saved), other)
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_overwrite_makes_a_new_folder_too(adapter, tmp_path):
    path = jl.save_adapter(tmp_path / "new", adapter, overwrite=True)
    assert_equal(jl.load_adapter(path), adapter)


def test_what_is_no_adapter_is_never_overwritten(adapter, tmp_path):
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for overwrite, message in ((True, r"is there and is no adapter"), (False, r"there already")):
        with pytest.raises(CheckpointError, match=message):
            jl.save_adapter(folder, adapter, overwrite=overwrite)
    with pytest.raises(CheckpointError, match=r"is there and is no adapter"):
        jl.save_adapter(folder / "thesis.txt", adapter, overwrite=True)
    assert (folder / "thesis.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_an_adapter_that_does_not_fit_is_not_saved(adapter, tmp_path):
    other = variables_of(x=jnp.ones((2, 6)))["params"]
    with pytest.raises(AdapterError, match=r"Param up/kernel has shape \(6, 12\), the adapter exp"):
        jl.save_adapter(tmp_path / "adapter", adapter, params=other)
    stacked = jax.tree.map(lambda x: x[None], adapter)
    with pytest.raises(AdapterError, match=r"has shape \(1, 2, 12\), expected \(2, 12\)"):
        jl.save_adapter(tmp_path / "adapter", stacked)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_an_error_with_the_nearest(saved):
    with pytest.raises(
        CheckpointError, match=r"There is no folder .*adaptor, expected an adapter. Nearest: adap"
    ):
        jl.load_adapter(saved.with_name("adaptor"))


def test_a_folder_that_is_no_adapter_is_an_error_with_what_it_holds(tmp_path):
    (tmp_path / "model.bin").write_text("x")
    with pytest.raises(
        CheckpointError, match=r"is no adapter: it holds model.bin, expected 'params' and 'adapter'"
    ):
        jl.load_adapter(tmp_path)


DAMAGED = """
import json, pathlib, sys
import jax, numpy as np
import jaxlora as jl
from jaxlora.errors import CheckpointError

folder = pathlib.Path(sys.argv[1])
intact = jl.load_adapter(folder)
found = {}


def attempt(file, damage, data):
    whole = file.read_bytes()
    file.unlink()
    if data is not None:
        file.write_bytes(data)
    try:
        loaded = jl.load_adapter(folder)
        assert jax.tree.structure(loaded) == jax.tree.structure(intact)
        jax.tree.map(np.testing.assert_array_equal, loaded, intact)
        result = "the same"
    except CheckpointError:
        result = "CheckpointError"
    except Exception as e:
        result = type(e).__name__
    file.write_bytes(whole)
    found.setdefault(str(file.relative_to(folder)), {})[damage] = result


for file in sorted(p for p in folder.rglob("*") if p.is_file()):
    whole = file.read_bytes()
    attempt(file, "missing", None)
    for length in {0, len(whole) // 2, len(whole) - 1}:
        attempt(file, f"cut at {length}", whole[:length])
    for at in range(0, len(whole), 20) if file.parent.name == "d" else ():
        attempt(file, f"flip at {at}", whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
assert jax.tree.structure(jl.load_adapter(folder)) == jax.tree.structure(intact)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def damaged(kept, tmp_path_factory):
    """{file: {damage: what came of loading}}, from a process of its own: Orbax prints there."""
    folder = tmp_path_factory.mktemp("damaged") / "adapter"
    shutil.copytree(kept, folder)
    command = [sys.executable, "-c", DAMAGED, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_whatever_file_is_damaged_loading_is_exact_or_a_checkpoint_error(damaged):
    results = {result for results in damaged.values() for result in results.values()}
    assert results == {"the same", "CheckpointError"}


def test_a_truncated_or_missing_file_that_is_read_is_an_error(damaged):
    read = [f for f in damaged if f in ("adapter/metadata", "params/_METADATA")]
    read += [f for f in damaged if f == "params/manifest.ocdbt" or f.startswith("params/d/")]
    assert len(read) >= 4
    for file in read:
        cut = {d: r for d, r in damaged[file].items() if not d.startswith("flip")}
        assert len(cut) == 4
        assert set(cut.values()) == {"CheckpointError"}, file


def test_a_flipped_bit_in_the_data_is_an_error(damaged):
    data = [results for file, results in damaged.items() if file.startswith("params/d/")]
    flips = [r for results in data for d, r in results.items() if d.startswith("flip")]
    assert flips.count("CheckpointError") > 0.9 * len(flips) > 10


def test_a_value_that_differs_from_its_checksum_is_named(saved):
    def change(about):
        about["checksums"]["up/kernel_lora_a"] ^= 1

    edited(saved, change)
    with pytest.raises(
        CheckpointError, match=r"is damaged: leaf up/kernel_lora_a does not have the checksum"
    ):
        jl.load_adapter(saved)


def test_a_missing_leaf_is_named(saved):
    def change(about):
        site = about["spec"]["sites"][0]
        about["spec"]["sites"].append(site | {"path": "upper/kernel"})

    edited(saved, change)
    with pytest.raises(
        CheckpointError,
        match=r"lacks upper/kernel_lora_a, upper/kernel_lora_b, which its spec names. Nearest: up/",
    ):
        jl.load_adapter(saved)


def test_an_extra_leaf_is_named(saved):
    edited(saved, lambda about: about["spec"]["sites"].pop(0))
    with pytest.raises(
        CheckpointError,
        match=r"holds leaves that its spec lacks: down/kernel_lora_a, down/kernel_lora_b",
    ):
        jl.load_adapter(saved)


def test_a_wrong_shape_is_named(saved):
    edited(saved, lambda about: about["spec"]["sites"][0].update(rank=3))
    with pytest.raises(
        CheckpointError, match=r"leaf down/kernel_lora_a has shape \(2, 12\), expected \(3, 12\)"
    ):
        jl.load_adapter(saved)


SPOILED = {
    "no spec": lambda about: about.pop("spec"),
    "no config": lambda about: about["spec"].pop("config"),
    "an unknown config field": lambda about: about["spec"]["config"].update(colour="red"),
    "an invalid config": lambda about: about["spec"]["config"].update(rank=0),
    "sites of another type": lambda about: about["spec"].update(sites=3),
    "an unknown site field": lambda about: about["spec"]["sites"][0].update(colour="red"),
    "a layout that makes no sense": lambda about: about["spec"]["sites"][0]["layout"].update(
        stack=[9]
    ),
    "format as text": lambda about: about.update(format="1"),
    "no format": lambda about: about.pop("format"),
    "checksums as a list": lambda about: about.update(checksums=[]),
}


@pytest.mark.parametrize("change", SPOILED.values(), ids=SPOILED.keys())
def test_spoiled_metadata_is_an_error_that_names_the_file(saved, change):
    edited(saved, change)
    with pytest.raises(CheckpointError, match=r"adapter/metadata is damaged: \w+: "):
        jl.load_adapter(saved)


def test_a_newer_format_is_an_error_that_says_so(saved):
    edited(saved, lambda about: about.update(format=2))
    with pytest.raises(
        CheckpointError, match=r"has format 2, this jaxlora reads up to 1. Upgrade jaxlora"
    ):
        jl.load_adapter(saved)


def test_a_base_of_other_shapes_or_names_is_an_error(saved, variables):
    other = variables_of(x=jnp.ones((2, 6)))["params"]
    with pytest.raises(
        CheckpointError,
        match=r"does not fit these params. Param up/kernel has shape \(6, 12\), the adapter exp",
    ):
        jl.load_adapter(saved, params=other)
    lacking = {k: v for k, v in variables["params"].items() if k != "up"}
    with pytest.raises(CheckpointError, match=r"does not fit .*have no leaf up/kernel"):
        jl.load_adapter(saved, params=lacking)


def test_a_base_that_differs_beside_the_adapted_leaves_is_an_error(saved, variables, adapter):
    more = {**variables["params"], "extra": {"kernel": jnp.ones((3, 3))}}
    with pytest.raises(
        CheckpointError,
        match=r"saved for a base of 6 leaves and 184 parameters, these params have 7 and 193",
    ):
        jl.load_adapter(saved, params=more)
    assert_equal(jl.load_adapter(saved), adapter)


def test_a_base_of_other_values_is_an_error_that_names_the_leaves(saved, variables, adapter):
    with pytest.raises(
        CheckpointError, match=r"same shapes with other values in .*down/kernel.*up/kernel"
    ):
        jl.load_adapter(saved, params=variables_of(seed=1)["params"])
    merged = jl.merge(variables["params"], adapter)
    with pytest.raises(CheckpointError, match=r"with other values in .*not merged or fine-tuned"):
        jl.load_adapter(saved, params=merged)


def test_the_same_base_in_another_dtype_passes(saved, variables, adapter):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])
    assert_equal(jl.load_adapter(saved, params=narrow), adapter)
    abstract = jax.eval_shape(lambda: variables["params"])
    assert_equal(jl.load_adapter(saved, params=abstract), adapter)


def test_the_fingerprint_ignores_heads_that_the_adapter_replaces(variables, tmp_path):
    adapter = made(variables, targets="up", modules_to_save="down")
    path = jl.save_adapter(tmp_path / "adapter", adapter, params=variables["params"])
    fresh = {**variables["params"], "down": variables_of(seed=1)["params"]["down"]}
    assert_equal(jl.load_adapter(path, params=fresh), adapter)
    other = {**variables["params"], "up": variables_of(seed=1)["params"]["up"]}
    with pytest.raises(CheckpointError, match=r"with other values in up/kernel"):
        jl.load_adapter(path, params=other)


def test_an_adapter_saved_without_its_base_loads_onto_any_of_its_shape(adapter, tmp_path):
    path = jl.save_adapter(tmp_path / "adapter", adapter)
    loaded = jl.load_adapter(path, params=variables_of(seed=1)["params"])
    assert_equal(loaded, adapter)


KILLED = """
import os, pathlib, shutil, signal, sys
import jax, jax.numpy as jnp, flax.linen as nn
import jaxlora as jl

model, x = nn.Dense(3), jnp.ones((2, 4))
variables = model.init(jax.random.key(0), x)
adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), x)
path = pathlib.Path(sys.argv[1]) / "adapter"
overwrite = sys.argv[2] == "overwrite"
if overwrite:
    jl.save_adapter(path, adapter)


def die(*args, **kwargs):
    print("killed", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


os.rename = os.replace = shutil.move = pathlib.Path.rename = pathlib.Path.replace = die
jl.save_adapter(path, jax.tree.map(lambda leaf: leaf + 1, adapter), overwrite=overwrite)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_save_that_is_killed_leaves_nothing_half_written_under_the_final_name(tmp_path):
    runs = {}
    for mode in ("new", "overwrite"):
        (tmp_path / mode).mkdir()
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / mode), mode]
        runs[mode] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for run in runs.values():
        assert run.communicate()[0] == "killed\n"
        assert run.returncode == -signal.SIGKILL
    # It had written something, under another name.
    assert list((tmp_path / "new").iterdir())
    assert not (tmp_path / "new" / "adapter").exists()
    with pytest.raises(CheckpointError, match=r"There is no folder"):
        jl.load_adapter(tmp_path / "new" / "adapter")
    left = jl.load_adapter(tmp_path / "overwrite" / "adapter")
    np.testing.assert_array_equal(left.params["kernel_lora_b"], np.zeros((2, 3)))
    # What is left does not stand in the way of another attempt.
    for mode in runs:
        path = jl.save_adapter(tmp_path / mode / "adapter", left, overwrite=mode == "overwrite")
        assert_equal(jl.load_adapter(path), left)


def test_saving_and_loading_say_nothing(adapter, variables, tmp_path, capfd):
    path = jl.save_adapter(tmp_path / "adapter", adapter, params=variables["params"])
    jl.save_adapter(path, adapter, overwrite=True)
    jl.load_adapter(path, params=variables["params"])
    assert capfd.readouterr() == ("", "")
