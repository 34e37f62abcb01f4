"""The registry: a user's own modules, and what cannot be reached."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora as jl
from jaxlora import layers
from jaxlora.errors import LoraError, TargetError


@pytest.fixture(autouse=True)
def _registry_as_before(monkeypatch):
    monkeypatch.setattr(layers, "_RULES", dict(layers._RULES))


class Grouped(nn.Module):
    """A kernel stored as (out, group, in), one matrix for each group of the input."""

    features: int

    @nn.compact
    def __call__(self, x, scale=1.0):
        shape = (self.features, *x.shape[-2:])
        weight = self.param("weight", nn.initializers.normal(), shape)
        bias = self.param("bias", nn.initializers.normal(), (self.features,))
        return jnp.einsum("...gi,ogi->...go", scale * x, weight) + bias

    @nn.compact
    def backward(self, y):
        shape = (self.features, 3, 4)
        return jnp.einsum("bgo,ogi->bgi", y, self.param("weight", nn.initializers.normal(), shape))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        grouped = Grouped(5, name="grouped")
        return nn.Dense(2, name="head")(grouped.backward(nn.tanh(grouped(x, scale=0.5))))


def plain(model, params, x) -> Any:
    return model.apply({"params": params}, x)


def registered():
    @jl.register(Grouped)
    def grouped(module, x, scale=1.0):
        return jl.Linear("weight", "...gi,ogi->...go", scale * x)

    @jl.register(Grouped, method="backward")
    def backward(module, y):
        return jl.Linear("weight", "bgo,ogi->bgi", y, roles="obi")


def made(key=0):
    model, x = Model(), jax.random.normal(jax.random.key(9), (2, 3, 4))
    variables = model.init(jax.random.key(key), x)
    config = jl.LoraConfig(rank=2, targets=["grouped", "head"])
    adapter = jl.lora_init(jax.random.key(1), model, variables, config, x)
    moved = jax.tree.map(lambda p: p + 0.3 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), adapter)
    return model, x, variables, moved


def test_a_users_module_is_planned_with_the_roles_of_its_equation():
    registered()
    _, _, _, adapter = made()
    site = adapter.spec.sites[0]
    assert (site.path, site.kind, site.layout.roles) == ("grouped/weight", "Grouped", "obi")
    assert site.leaf_shapes(site.trained) == {
        "grouped/weight_lora_a": (3, 2, 4),
        "grouped/weight_lora_b": (3, 2, 5),
    }


def test_a_users_module_runs_as_its_merged_weights_in_both_of_its_methods():
    registered()
    model, x, variables, adapter = made()
    got = jl.lora_apply(model, variables, adapter, x)
    merged = jl.merge(variables["params"], adapter)
    np.testing.assert_allclose(got, plain(model, merged, x), 1e-5, 1e-5)
    assert np.abs(got - model.apply(variables, x)).max() > 1e-2
    a, b = (np.asarray(adapter.params["grouped"][f"weight_lora_{part}"]) for part in "ab")
    delta = adapter.spec.sites[0].scaling * np.einsum("gri,gro->ogi", a, b)
    weight = variables["params"]["grouped"]["weight"]
    np.testing.assert_allclose(merged["grouped"]["weight"], weight + delta, 1e-5, 1e-5)


def test_gradients_through_a_users_module_are_those_of_its_merged_weights():
    registered()
    model, x, variables, adapter = made()

    def through_apply(adapter):
        return jnp.sum(jnp.sin(jl.lora_apply(model, variables, adapter, x)))

    def through_merge(adapter):
        merged = jl.merge(variables["params"], adapter)
        return jnp.sum(jnp.sin(plain(model, merged, x)))

    got, expected = jax.grad(through_apply)(adapter), jax.grad(through_merge)(adapter)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, 1e-5, 1e-5), got, expected)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(got))


def test_a_module_that_is_not_registered_is_reported_with_what_there_is():
    with pytest.raises(
        TargetError,
        match=r"grouped/weight is a target, but Grouped is no layer that can be adapted. There is: "
        r".*Dense, DenseGeneral, Einsum, Embed.*register a rule",
    ):
        made()


def test_a_subclass_that_replaces_the_arithmetic_is_reported_as_unreachable():
    class Cosine(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))
            return inputs @ (kernel / jnp.linalg.norm(kernel, axis=0))

    model, x = Cosine(3), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(TargetError, match=r"kernel is a target, but Cosine is no layer that can"):
        jl.plan(model, variables, jl.LoraConfig(), x)


def test_a_subclass_that_inherits_the_arithmetic_is_served():
    class Named(nn.Dense):
        pass

    model, x = Named(3), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    planned = jl.plan(model, variables, jl.LoraConfig(rank=1), x)
    assert [(site.path, site.kind) for site in planned.sites] == [("kernel", "Named")]


@pytest.mark.parametrize("equation", ["...i,io", "...i->...o", "...i,...io->...o", "a,b,c->abc"])
def test_an_equation_that_is_no_product_of_input_and_kernel_is_an_error(equation):
    @jl.register(Grouped)
    def grouped(module, x, scale=1.0):
        return jl.Linear("weight", equation, x)

    linear = grouped(None, jnp.ones((2, 3)))
    with pytest.raises(LoraError, match=r"of weight cannot be adapted, expected the form"):
        linear.letters()
    with pytest.raises(LoraError, match=r"of weight cannot be adapted, expected the form"):
        linear.kernel_roles()
    with pytest.raises(LoraError, match=r"cannot be adapted"):
        made()


def test_registering_a_method_that_the_class_lacks_is_an_error():
    with pytest.raises(LoraError, match=r"Grouped defines no method 'attend'"):
        jl.register(Grouped, method="attend")


def test_registering_an_inherited_method_is_an_error():
    class Named(nn.Dense):
        pass

    with pytest.raises(LoraError, match=r"Named defines no method '__call__', so no rule"):
        jl.register(Named)


@pytest.mark.parametrize(
    ("equation", "shape", "letters", "roles"),
    [
        ("...i,io->...o", (2, 3, 4), ("abi", "io", "abo"), "io"),
        ("btd,dhk->bthk", (2, 3, 4), ("btd", "dhk", "bthk"), "ioo"),
        ("bte d, e d f -> b t e f", (2, 3, 4, 5), ("bted", "edf", "btef"), "bio"),
        ("bi,oi->bo", (2, 4), ("bi", "oi", "bo"), "oi"),
    ],
)
def test_an_equation_tells_the_letters_and_the_roles(equation, shape, letters, roles):
    linear = jl.Linear("kernel", equation, jnp.ones(shape))
    assert linear.letters() == letters
    assert linear.kernel_roles() == roles
    assert not linear.lookup


def test_an_input_of_integers_is_a_lookup_without_the_indexed_letter():
    linear = jl.Linear("embedding", "...v,vd->...d", jnp.ones((2, 3), jnp.int32))
    assert linear.lookup
    assert linear.letters() == ("ab", "vd", "abd")
    assert linear.kernel_roles() == "io"


def test_a_table_of_one_row_answers_with_it_whatever_the_index():
    model, ids = nn.Embed(1, 4), jnp.array([0, 3, -1])
    variables = model.init(jax.random.key(0), ids)
    config = jl.LoraConfig(rank=2, targets="embedding")
    adapter = jl.lora_init(jax.random.key(1), model, variables, config, ids)
    adapter = jax.tree.map(lambda p: p + 0.5, adapter)
    got = jl.lora_apply(model, variables, adapter, ids)
    merged = jl.merge(variables["params"], adapter)
    np.testing.assert_allclose(got, plain(model, merged, ids), 1e-5, 1e-5)
    assert np.abs(got - model.apply(variables, ids)).min() > 1e-2
