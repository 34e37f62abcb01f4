"""Factors' gradients are the same whichever way the axes of the tokens are taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.backend import traced_for
from jaxlora.errors import ConfigError
from jaxlora.tokens import product, token_axes

SHAPES = {  # the number of batch axes that x and the factors share, the shape of x
    "vector": (0, (6,)),
    "tokens": (0, (5, 6)),
    "sequences": (0, (2, 5, 6)),
    "images": (0, (2, 3, 4, 6)),
    "experts": (1, (3, 2, 5, 6)),
}


def cube(f):
    return lambda *args: jnp.sum(f(*args) ** 3)


def close(found, expected):
    np.testing.assert_allclose(found, expected, 1e-4, 1e-4 + 1e-7 * np.abs(expected).max())


TRANSFORMS = {
    "value": lambda f: f,
    "grad": lambda f: jax.grad(cube(f), (0, 1, 2)),
    "grad of factors": lambda f: jax.grad(cube(f), (1, 2)),
    "jvp": lambda f: lambda *args: jax.jvp(f, args, args),
    "vmap": lambda f: jax.vmap(lambda x, a, b: f(x, 2 * a, b)),
    "vmap of grad": lambda f: jax.vmap(jax.grad(cube(f), (0, 1, 2))),
    "hessian-vector": lambda f: lambda *args: jax.jvp(jax.grad(cube(f), (0, 1, 2)), args, args),
    "grad of grad": lambda f: jax.grad(
        lambda *args: sum(jnp.sum(g**2) for g in jax.grad(cube(f), (0, 1, 2))(*args)), (0, 1, 2)
    ),
    "remat": lambda f: jax.grad(cube(jax.checkpoint(f)), (0, 1, 2)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", SHAPES)
def test_values_and_derivatives_are_those_of_einsum(case, transform):
    batch, shape = SHAPES[case]
    own = "E" * batch

    def plain(x, a, b):
        low = jnp.einsum(f"{own}...i,{own}ri->{own}...r", x, a)
        return jnp.einsum(f"{own}...r,{own}ro->{own}...o", low, b)

    def ours(x, a, b):
        return product(batch, "ro", None, product(batch, "ri", None, x, a), b)

    lead = (2,) if transform.startswith("vmap") else ()
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (shape, (*shape[:batch], 2, 6), (*shape[:batch], 2, 7))
    args = [jax.random.normal(k, (*lead, *s)) for k, s in zip(keys, shapes, strict=True)]
    expected = TRANSFORMS[transform](plain)(*args)
    for way in ("plain", "flat", "apart"):
        with token_axes(way):
            found = jax.jit(TRANSFORMS[transform](lambda *args: ours(*args)))(*args)
        jax.tree.map(close, found, expected)


def primitives(way, shape=(4, 16, 6)):
    with token_axes(way):
        jaxpr = jax.make_jaxpr(jax.grad(lambda a: product(0, "ri", None, jnp.ones(shape), a).sum()))
        return str(jaxpr(jnp.ones((2, 6))))


def test_apart_keeps_the_first_axis_and_flat_does_not():
    assert "4,2,6" in primitives("apart").replace(" ", "")
    assert "64,6" in primitives("flat").replace(" ", "")
    assert "reshape" not in primitives("plain")
    assert primitives("auto") == primitives("flat")  # the tests have one device


def test_only_a_cpu_wants_the_axes_of_tokens_in_another_order():
    with traced_for("tpu"):
        assert primitives("auto") == primitives("plain")


def test_another_word_is_an_error():
    with (
        pytest.raises(ConfigError, match=r"token_axes is 'flatten', expected 'auto', 'plain'"),
        token_axes("flatten"),
    ):
        pass
