"""KernelLayout: the axes of a kernel and of its factors, whatever was stacked where."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.layout import KernelLayout


@st.composite
def layouts(draw):
    """A layout as transforms make it: own axes, then stacked ones from the innermost out."""
    own = draw(st.permutations("io" + draw(st.text("iob", max_size=2))))
    shape = [draw(st.integers(1, 4)) for _ in own]
    stack = []
    for _ in range(draw(st.integers(0, 2))):
        axis = draw(st.integers(-len(shape) - 1, len(shape)))
        at = axis if axis >= 0 else len(shape) + 1 + axis
        shape.insert(at, draw(st.integers(1, 4)))
        stack.insert(0, axis)
    return KernelLayout(tuple(shape), "".join(own), tuple(stack))


def sliced(array, layout, index):
    """The leaf as a module sees it: one stacked axis after the other, from the outermost in."""
    for axis, i in zip(layout.stack, index, strict=True):
        array = np.take(array, i, axis=axis)
    return array


def stacked_indices(layout):
    return itertools.product(*map(range, layout.sizes("s")))


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain_delta(kernel_shape, roles, a, b):
    """`sum over rank of A B` of one slice, by loops."""
    delta = np.zeros(kernel_shape)
    for index in np.ndindex(*kernel_shape):
        at = {
            role: tuple(i for i, r in zip(index, roles, strict=True) if r == role) for role in "bio"
        }
        for r in range(a.shape[len(at["b"])]):
            delta[index] += a[(*at["b"], r, *at["i"])] * b[(*at["b"], r, *at["o"])]
    return delta


every_layout = settings(deadline=None, max_examples=30)


@every_layout
@given(layouts(), st.integers(1, 3), st.sampled_from(["a", "b", "key"]))
def test_to_leaf_and_from_leaf_invert_one_another(layout, rank, part):
    core = random((*layout.sizes("s"), *layout.core_shape(part, rank)))
    leaf = layout.to_leaf(core, part, rank)
    assert leaf.shape == layout.leaf_shape(part, rank)
    np.testing.assert_array_equal(layout.from_leaf(leaf, part, rank), core)
    np.testing.assert_array_equal(
        layout.to_leaf(layout.from_leaf(leaf, part, rank), part, rank), leaf
    )


@every_layout
@given(layouts(), st.integers(1, 3), st.sampled_from(["a", "b", "key"]))
def test_a_factor_sliced_along_the_kernels_signed_axes_is_its_slice(layout, rank, part):
    core = random((*layout.sizes("s"), *layout.core_shape(part, rank)))
    leaf = np.asarray(layout.to_leaf(core, part, rank))
    for index in stacked_indices(layout):
        slice_ = sliced(leaf, layout, index)
        assert slice_.shape == layout.slice_shape(part, rank)
        np.testing.assert_array_equal(slice_.reshape(layout.core_shape(part, rank)), core[index])


@every_layout
@given(layouts(), st.integers(1, 3))
def test_the_delta_is_the_plain_sum_in_every_slice(layout, rank):
    a, b = (random((*layout.sizes("s"), *layout.core_shape(part, rank))) for part in ("a", "b"))
    delta = np.asarray(
        layout.delta(layout.to_leaf(a, "a", rank), layout.to_leaf(b, "b", rank), rank)
    )
    assert delta.shape == layout.shape
    for index in stacked_indices(layout):
        got = sliced(delta, layout, index)
        assert got.shape == layout.own_shape
        expected = plain_delta(layout.own_shape, layout.roles, a[index], b[index])
        np.testing.assert_allclose(got, expected, 1e-5, 1e-5)


@every_layout
@given(layouts(), st.integers(1, 3), st.sampled_from(["a", "b"]))
def test_the_axes_that_a_factor_shares_have_the_kernels_sizes(layout, rank, part):
    shared, shape = layout.leaf_axes(part), layout.leaf_shape(part, rank)
    assert len(shared) == len(shape)
    rest = [n for axis, n in zip(shared, shape, strict=True) if axis is None]
    assert sorted(rest) == sorted([rank, *[1] * (len(rest) - 1)])
    here = {axis: n for axis, n in zip(shared, shape, strict=True) if axis is not None}
    assert here == {axis: layout.shape[axis] for axis in here}
    role = {"a": "i", "b": "o"}[part]
    assert set(here) == {*layout.axes("s"), *layout.axes("b"), *layout.axes(role)}


@every_layout
@given(layouts())
def test_every_axis_has_one_role(layout):
    axes = [axis for role in "siob" for axis in layout.axes(role)]
    assert sorted(axes) == list(range(len(layout.shape)))
    assert layout.count("s", "i", "o", "b") == math.prod(layout.shape)


@pytest.mark.parametrize(
    ("layout", "a", "b"),
    [
        (KernelLayout((8, 6), "io"), (2, 8), (2, 6)),
        (KernelLayout((8, 2, 3), "ioo"), (2, 8), (2, 2, 3)),
        (KernelLayout((2, 3, 8), "iio"), (2, 2, 3), (2, 8)),
        (KernelLayout((6, 8), "oi"), (2, 8), (2, 6)),
        (KernelLayout((4, 8, 6), "bio"), (4, 2, 8), (4, 2, 6)),
        (KernelLayout((5, 8, 6), "io", (0,)), (5, 2, 8), (5, 2, 6)),
        (KernelLayout((8, 5, 6), "io", (1,)), (2, 5, 8), (2, 5, 6)),
        (KernelLayout((8, 6, 5), "io", (-1,)), (2, 8, 5), (2, 6, 5)),
        (KernelLayout((8, 2, 4, 5), "ioo", (3,)), (1, 2, 8, 5), (2, 2, 4, 5)),
    ],
    ids=lambda x: f"{x.roles}{x.stack}" if isinstance(x, KernelLayout) else None,
)
def test_the_factors_are_rank_first_with_stacked_axes_where_the_kernel_has_them(layout, a, b):
    assert layout.leaf_shape("a", 2) == a
    assert layout.leaf_shape("b", 2) == b


def test_a_delta_is_computed_in_the_dtype_asked_for():
    layout = KernelLayout((8, 6), "io")
    a, b = random((2, 8)), random((2, 6), 1)
    wide = layout.delta(a, b, 2)
    assert wide.dtype == np.float32
    narrow = layout.delta(jax.numpy.asarray(a, "bfloat16"), b, 2, "bfloat16")
    assert narrow.dtype == jax.numpy.bfloat16
    np.testing.assert_allclose(wide, np.einsum("ri,ro->io", a, b), 1e-5, 1e-5)


@pytest.mark.parametrize(
    "blocks", [(True, False, True), (False, True, False), (False, False, True)]
)
def test_a_fused_kernels_left_out_blocks_have_a_delta_of_exactly_zero(blocks):
    layout = KernelLayout((5, 6), "io", blocks=blocks, block_axis=1)
    a = np.random.default_rng(0).normal(size=layout.leaf_shape("a", 2)).astype(np.float32)
    b = np.random.default_rng(1).normal(size=layout.leaf_shape("b", 2)).astype(np.float32)
    delta = np.asarray(layout.delta(jnp.asarray(a), jnp.asarray(b), 2)).reshape(5, 3, 2)
    expected, row = np.zeros((5, 3, 2), np.float32), 0
    for block, on in enumerate(blocks):
        if on:  # two rows of A and B for each adapted block, in order
            expected[:, block] = a[row : row + 2].T @ b[row : row + 2]
            row += 2
        else:
            np.testing.assert_array_equal(delta[:, block], 0)
    np.testing.assert_allclose(delta, expected, 1e-5, 1e-5)
