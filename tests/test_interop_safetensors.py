"""An adapter as one safetensors file: exact for every method and model, and checked when read."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jaxlora as jl
from jaxlora.errors import AdapterError, CheckpointError, LoraError
from jaxlora.interop import safetensors
from tests.test_properties import METHODS, REFUSED
from tests.zoo import CASES, Mlp

MODELS = ("mlp", "scan_axis_-1", "vmap_in_scan", "embed_attend", "fused", "boxed")


@functools.cache
def adapter_of(name, method):
    """The abstract base of a case, and an adapter with numbers in all of its leaves."""
    case = CASES[name]
    init = functools.partial(case.model.init, **case.init_kwargs())
    variables = jax.eval_shape(init, jax.random.key(0), *case.inputs)
    fields: dict[str, Any] = {"targets": case.targets, "rank": 2} | case.options | METHODS[method]
    biases = any("bias" in str(p) for p, _ in jax.tree_util.tree_leaves_with_path(variables))
    fields |= {} if biases else {"bias": "none"}
    spec = jl.plan(case.model, variables, jl.LoraConfig(**fields), *case.inputs, **case.kwargs).spec
    return variables["params"], filled(spec)


def filled(spec):
    draw = np.random.default_rng(0)
    shapes = spec.leaf_shapes | spec.frozen_shapes
    leaves = {
        p: jnp.asarray(draw.normal(size=s), spec.config.param_dtype) for p, s in shapes.items()
    }
    return spec.adapter(leaves)


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


PAIRS = [(name, "bias") for name in CASES if name not in MODELS]
PAIRS += [(n, m) for n in MODELS for m in METHODS if (n, m) not in REFUSED]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_every_method_comes_back_exactly(name, method, tmp_path):
    _, adapter = adapter_of(name, method)
    file = safetensors.save(tmp_path / "a.safetensors", adapter)
    found = safetensors.load(file)
    assert_equal(found, adapter)
    assert found.spec == adapter.spec
    assert hash(found.spec) == hash(adapter.spec)
    assert safetensors.save(tmp_path / "b.safetensors", found).read_bytes() == file.read_bytes()


X = jnp.ones((2, 8))


@functools.cache
def base(seed=0):
    return jax.jit(Mlp().init)(jax.random.key(seed), X)["params"]


def made(**options):
    fields: dict[str, Any] = {"rank": 2} | options
    return filled(jl.plan(Mlp(), {"params": base()}, jl.LoraConfig(**fields), X).spec)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return safetensors.save(tmp_path_factory.mktemp("kept") / "a.safetensors", made(), base())


@pytest.fixture
def saved(kept, tmp_path):
    return Path(shutil.copy(kept, tmp_path / "adapter.safetensors"))


def edited(file, tensors=lambda x: None, about=lambda x: None):
    """Changes the tensors of a file, or its JSON."""
    leaves = load_file(file)
    tensors(leaves)
    found = json.loads(raw(file)[0]["__metadata__"][safetensors.ABOUT])
    del found["sum"]
    about(found)
    save_file(leaves, file, {safetensors.ABOUT: json.dumps(found)})


def raw(file):
    """The header of a file, and the bytes after it."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"]
)
def test_every_dtype_comes_back_exactly_and_casts_on_request(dtype, tmp_path):
    with jax.enable_x64(True):
        adapter = made(param_dtype=dtype, modules_to_save="down", targets="up")
        file = safetensors.save(tmp_path / "a.safetensors", adapter)
        assert_equal(safetensors.load(file), adapter)
        assert {x.dtype for x in jax.tree.leaves(safetensors.load(file))} == {jnp.dtype(dtype)}
        cast = safetensors.load(file, dtype=jnp.float32)
    assert cast.spec.config.param_dtype == jnp.float32
    expected = jax.tree.map(lambda x: x.astype(jnp.float32), adapter.params)
    jax.tree.map(np.testing.assert_array_equal, cast.params, expected)


def test_wide_leaves_are_not_narrowed_in_silence(tmp_path):
    with jax.enable_x64(True):
        file = safetensors.save(tmp_path / "a.safetensors", made(param_dtype="float64"))
    with pytest.raises(
        CheckpointError, match=r"holds down/kernel_lora_a float64, .* Cast them, `dt"
    ):
        safetensors.load(file)
    leaves = jax.tree.leaves(safetensors.load(file, dtype=jnp.float32))
    assert {x.dtype for x in leaves} == {jnp.dtype("float32")}


def test_a_dtype_that_safetensors_has_not_is_an_error(tmp_path):
    with pytest.raises(
        CheckpointError,
        match=r"cannot hold down/kernel_lora_a float4_e2m1fn, .*, expected one of float64, ",
    ):
        safetensors.save(tmp_path / "a.safetensors", made(param_dtype="float4_e2m1fn"))
    assert not list(tmp_path.iterdir())


def test_an_orbax_checkpoint_and_a_file_are_the_same_adapter(saved, tmp_path):
    folder = jl.save_adapter(tmp_path / "folder", safetensors.load(saved), params=base())
    assert_equal(jl.load_adapter(folder, params=base()), safetensors.load(saved, base()))
    assert safetensors.is_adapter(saved)
    assert not safetensors.is_adapter(folder)


def test_leaves_are_boxed_where_the_base_is(tmp_path):
    params, adapter = adapter_of("boxed", "lora")
    file = safetensors.save(tmp_path / "a.safetensors", adapter)
    found = safetensors.load(file, params).params["layers"]["dense"]
    assert isinstance(found["kernel_lora_a"], nn.Partitioned)
    assert found["kernel_lora_a"].names == ("layers", None, "embed")


def test_a_file_that_is_there_stays_unless_asked(saved):
    other = made(rank=3)
    with pytest.raises(CheckpointError, match=r"adapter.safetensors is there already"):
        safetensors.save(saved, other)
    safetensors.save(saved, other, overwrite=True)
    assert_equal(safetensors.load(saved), other)
    assert [p.name for p in saved.parent.iterdir()] == ["adapter.safetensors"]


def test_a_save_that_fails_leaves_the_old_file_and_no_other(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        safetensors.save(saved, made(rank=3), overwrite=True)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["adapter.safetensors"]


def test_an_adapter_that_does_not_fit_is_not_saved(tmp_path):
    other = jax.eval_shape(Mlp().init, jax.random.key(0), jnp.ones((2, 6)))["params"]
    with pytest.raises(AdapterError, match=r"Param up/kernel has shape \(6, 12\), the adapter exp"):
        safetensors.save(tmp_path / "a.safetensors", made(), other)
    with pytest.raises(AdapterError, match=r"has shape \(1, 2, 12\), expected \(2, 12\)"):
        safetensors.save(tmp_path / "a.safetensors", jax.tree.map(lambda x: x[None], made()))
    assert not list(tmp_path.iterdir())


def test_all_leaves_that_do_not_fit_are_named(saved):
    def spoil(leaves):
        leaves["stray"], leaves["other"] = np.ones(2), np.ones(3)
        del leaves["up/kernel_lora_a"], leaves["up/kernel_lora_b"]
        leaves["down/kernel_lora_a"] = np.ones((3, 12))

    edited(saved, spoil)
    with pytest.raises(CheckpointError) as e:
        safetensors.load(saved)
    said = str(e.value)
    assert "lacks up/kernel_lora_a, up/kernel_lora_b, which its spec names. Nearest: " in said
    assert "leaf down/kernel_lora_a has shape (3, 12), expected (2, 12)" in said
    assert "holds leaves that its spec lacks: other, stray." in said


def test_values_that_differ_from_their_checksum_are_named(saved):
    edited(saved, lambda leaves: leaves["up/kernel_lora_a"].__imul__(2))
    with pytest.raises(CheckpointError, match=r"is damaged: leaf up/kernel_lora_a does not have"):
        safetensors.load(saved)


def test_another_base_is_an_error(saved):
    with pytest.raises(
        CheckpointError, match=r"saved for a base of the same shapes with other val"
    ):
        safetensors.load(saved, base(1))
    other = jax.eval_shape(Mlp().init, jax.random.key(0), jnp.ones((2, 6)))["params"]
    with pytest.raises(
        CheckpointError, match=r"does not fit these params. Param up/kernel has sha"
    ):
        safetensors.load(saved, other)
    assert_equal(safetensors.load(saved, base()), made())


SPOILED = {
    "newer": (lambda about: about.update(format=2), r"has format 2, this jaxlora reads up to 1"),
    "no spec": (lambda about: about.pop("spec"), r"is damaged: KeyError: 'spec'"),
    "no sums": (lambda about: about.pop("checksums"), r"is damaged: KeyError: 'checksums'"),
    "a field": (lambda about: about["spec"]["config"].update(colour="red"), r"is damaged: ConfigE"),
    "a rank": (
        lambda about: about["spec"]["sites"][0].update(rank=3),
        r"leaf down/kernel_lora_a has shape \(2, 12\), expected \(3, 12\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_spoiled_metadata_is_an_error(saved, change, message):
    edited(saved, about=change)
    with pytest.raises(CheckpointError, match=message):
        safetensors.load(saved)


def test_files_that_are_no_adapter_say_what_they_are(tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"There is no file .*model.safetensors"):
        safetensors.load(file)
    save_file({"fc.weight": np.ones(2)}, file, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"no adapter of jaxlora: .* It holds fc.weight. A fo"
    ):
        safetensors.load(file)
    assert not safetensors.is_adapter(file)
    save_file({"fc.weight": np.ones(2)}, file, {safetensors.ABOUT: "{"})
    with pytest.raises(CheckpointError, match=r"The metadata of .* are damaged"):
        safetensors.load(file)
    save_file({"fc.weight": np.ones(2)}, file, {safetensors.ABOUT: "[1]"})
    with pytest.raises(CheckpointError, match=r"is damaged: TypeError"):
        safetensors.load(file)


def test_headers_that_lie_and_files_cut_short_are_damaged(saved):
    header, data = raw(saved)
    name = next(n for n in header if n != "__metadata__")
    for change in ({"data_offsets": [0, 10**9]}, {"shape": [10**9, 10**9]}, {"dtype": "I99"}):
        text = json.dumps(header | {name: header[name] | change}).encode()
        saved.write_bytes(len(text).to_bytes(8, "little") + text + data)
        with pytest.raises(CheckpointError, match=r"is damaged or cut short \(\d+ bytes\): "):
            safetensors.load(saved)
    text = json.dumps(header).encode()
    for length in (2**40, len(text) + 10**6):
        saved.write_bytes(length.to_bytes(8, "little") + text + data)
        with pytest.raises(CheckpointError, match=r"is damaged or cut short"):
            safetensors.load(saved)
    whole = len(text).to_bytes(8, "little") + text + data
    for length in range(0, len(whole), 97):
        saved.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"is damaged or cut short"):
            safetensors.load(saved)


@settings(max_examples=200, deadline=2000, derandomize=True)
@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3)
)
def test_changed_bytes_give_the_adapter_or_a_lora_error(kept, changes, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    data = bytearray(kept.read_bytes())
    for at, byte in changes:
        data[at % len(data)] = byte
    file.write_bytes(data)
    said = str(file)
    try:
        leaves = safetensors.load(file).values()
        assert {p: x.tobytes() for p, x in leaves.items()} == {
            p: x.tobytes() for p, x in made().values().items()
        }
    except LoraError as e:
        said = str(e)
    assert str(file) in said
