"""`first_bad`: the module that first went bad, under scan, remat and jit, and where a run stops."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxlora as jl
from jaxlora import tree
from jaxlora.errors import RunError
from jaxlora.finite import Bad, first_bad
from tests import test_fit
from tests.test_fit import TX, loss_fn, train


class Block(nn.Module):
    dtype: type | None = None

    @nn.compact
    def __call__(self, x, _):
        h = nn.tanh(nn.Dense(8, name="up", dtype=self.dtype)(x))
        return x + nn.Dense(4, name="down", dtype=self.dtype)(h), None


class Layers(nn.Module):
    remat: bool = False
    jit: bool = False
    dtype: type | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first", dtype=self.dtype)(x)
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = (nn.jit(stack) if self.jit else stack)(self.dtype, name="layers")(x, None)
        return nn.Dense(3, name="last", dtype=self.dtype)(x)


X, KEY = jnp.ones((2, 4)), jax.random.key(0)


def made(**options):
    """(loss, adapter, variables) of a model."""
    model = Layers(**options)
    variables = model.init(KEY, X)
    adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), X)

    def loss(adapter, variables, batch, key):
        return jnp.mean(jl.lora_apply(model, variables, adapter, batch) ** 2)

    return loss, adapter, variables


def planted(params, path, at, value=jnp.inf):
    """Params with a value in one place of a leaf."""
    return tree.map_leaves(lambda p, x: x.at[at].set(value) if p == path else x, params)


def test_a_kernel_is_named_with_its_layer_though_the_step_was_compiled_before():
    loss, adapter, variables = made(remat=True, jit=True)
    step = jax.jit(loss)
    good = step(adapter, variables, X, KEY)
    assert first_bad(step, adapter, variables, X, KEY) is None
    for path, at, call, calls in (("last", (0, 0), 1, 1), ("layers/down", (1, 0, 0), 2, 3)):
        params = planted(variables["params"], f"{path}/kernel", at)
        bad = first_bad(step, adapter, {"params": params}, X, KEY)
        assert bad == Bad(path, True, call, calls, ("kernel",), True, 12)
    assert step(adapter, variables, X, KEY) == good
    assert step._cache_size() == 1  # type: ignore[attr-defined]


def test_a_factor_is_told_from_its_kernel():
    loss, adapter, variables = made()
    leaves = planted(adapter.params, "layers/up/kernel_lora_b", (2, 0, 0), jnp.nan)
    bad = first_bad(loss, dataclasses.replace(adapter, params=leaves), variables, X, KEY)
    assert str(bad) == "the output of layers/up, call 3 of 3 (not finite there: kernel_lora_b)"


def test_one_of_several_experts():
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    experts = nn.vmap(nn.Dense, in_axes=None, axis_size=3, **axes)(4)  # type: ignore[arg-type]
    params = planted(experts.init(KEY, X)["params"], "kernel", (1, 0, 0))
    bad = first_bad(experts.apply, {"params": params}, X)
    assert bad
    assert (bad.call, bad.calls, bad.leaves) == (2, 3, ("kernel",))


@pytest.mark.parametrize(("dtype", "most"), [(jnp.bfloat16, 3e38), (jnp.float16, 6e4)])
def test_an_overflow_is_named_where_no_number_of_its_origin_is_bad(dtype, most):
    loss, adapter, variables = made(dtype=dtype)
    params = planted(variables["params"], "last/kernel", ..., most)
    bad = first_bad(loss, adapter, {"params": params}, 4 * X, KEY)
    assert str(bad) == "the output of last (its inputs are finite)"


def test_what_is_no_module_is_the_function():
    loss, adapter, variables = made()

    def scaled(adapter, variables, batch, key):
        return loss(adapter, variables, batch["x"], key) * batch["weight"]

    bad = first_bad(scaled, adapter, variables, {"x": X, "weight": jnp.nan * X}, KEY)
    assert str(bad) == (
        "the output of scaled, after 12 outputs of modules that are finite "
        "(not finite there: batch/weight)"
    )
    bad = first_bad(loss, adapter, variables, X * jnp.nan, KEY)
    assert bad
    assert (bad.path, bad.inputs, bad.module) == ("first", False, True)


def test_a_run_that_stops_names_the_module(tmp_path, monkeypatch):
    params = planted(test_fit.VARIABLES["params"], "embed/embedding", (19, 0), jnp.nan)
    monkeypatch.setattr(test_fit, "VARIABLES", {"params": params})
    step = jl.make_train_step(loss_fn, TX, on_bad_step="stop")
    match = (
        r"of step \d+ is nan.*gradients of 4 of 4 leaves.*with the adapter after step \d+.*: the "
        r"output of embed \(not finite there: embedding\)\. Training stopped"
    )
    with pytest.raises(RunError, match=match):
        train(tmp_path / "run", step=step, loss_fn=loss_fn, evaluate=None)


def test_a_gradient_alone_is_the_backward_pass(tmp_path):
    def loss(adapter, variables, batch, key):
        leaf = adapter.params["inner"]["kernel_lora_b"]
        return loss_fn(adapter, variables, batch, key) + jnp.sqrt(jnp.sum(jnp.abs(leaf - leaf)))

    step = jl.make_train_step(loss, TX, on_bad_step="stop")
    match = (
        "1 of 4 leaves, inner/kernel_lora_b. The forward pass.*is finite: the backward pass is not"
    )
    with pytest.raises(RunError, match=match):
        train(tmp_path / "run", step=step, loss_fn=loss)


def test_where_the_search_fails_the_bad_step_is_said(tmp_path):
    def broken(*_):
        raise MemoryError("no room")

    def loss(*args):
        return loss_fn(*args) * jnp.nan

    step = jl.make_train_step(loss, TX, on_bad_step="stop")
    match = r"The loss of step 1 is nan.*not known: MemoryError: no room\. Training stopped"
    with pytest.raises(RunError, match=match):
        train(tmp_path / "run", step=step, loss_fn=broken)
