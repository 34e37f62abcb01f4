"""What benchmarks/hlo.py reads from compiled programs."""

import doctest

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo


def compiled(fn, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(fn).lower(*args).compile().as_text() or ""


def test_the_example_runs():
    assert doctest.testmod(hlo).failed == 0


def test_the_dots_of_a_gradient_are_counted():
    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w))

    text = compiled(jax.grad(loss, (0, 1)), (64, 32), (48, 64))
    found = hlo.dots(text)
    assert sorted((dot.shape, dot.contracted) for dot in found) in (
        [((32, 64), (48,)), ((48, 32), (64,)), ((48, 64), (32,))],
        [((48, 32), (64,)), ((48, 64), (32,)), ((64, 32), (48,))],
    )
    assert hlo.total(found) == 3 * 2 * 48 * 64 * 32
    assert {dot.dtype for dot in found} == {"f32"}


def test_a_dot_in_a_loop_counts_as_often_as_it_runs():
    def rows(w, x):
        def layer(x, w):
            inner, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)
            return inner, None

        return jax.lax.scan(layer, x, w)[0]

    found = hlo.dots(compiled(rows, (5, 64, 64), (48, 64)))
    assert sum(dot.times for dot in found) == 15
    assert hlo.total(found) == 15 * 2 * 48 * 64 * 64


def test_batch_axes_are_no_contracted_ones():
    def scores(q, k):
        return jnp.tanh(jnp.einsum("bqhd,bkhd->bhqk", q, k))

    (dot,) = hlo.dots(compiled(scores, (2, 48, 4, 16), (2, 32, 4, 16)))
    assert (dot.shape, dot.contracted) == ((2, 4, 48, 32), (16,))


def test_both_branches_of_a_conditional_count():
    def either(flag, x, w):
        return jax.lax.cond(flag[0] > 0, lambda: x @ w, lambda: jnp.tanh(x) @ (w + 1))

    found = hlo.dots(compiled(either, (1,), (48, 64), (64, 32)))
    assert [(dot.shape, dot.times) for dot in found] == [((48, 32), 1), ((48, 32), 1)]


def test_a_loop_of_unknown_length_is_an_error():
    def halved(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: jnp.tanh(x @ w), x)

    text = compiled(halved, (48, 64), (64, 64))
    with pytest.raises(ValueError, match="does not say how often it runs"):
        hlo.dots(text)


CUBLAS = """HloModule jit_f

ENTRY %main.4 (x.1: bf16[48,64], w.1: bf16[64,32]) -> bf16[48,32] {
  %x.1 = bf16[48,64]{1,0} parameter(0)
  %w.1 = bf16[64,32]{1,0} parameter(1)
  %gemm = (bf16[48,32]{1,0}, s8[4194304]{0}) custom-call(%x.1, %w.1), custom_call_target=BACK
  ROOT %out = bf16[48,32]{1,0} get-tuple-element(%gemm), index=0
}
"""
NUMBERS = (
    ', backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
)


def test_a_call_of_cublas_is_a_dot():
    text = CUBLAS.replace("BACK", '"__cublas$gemm"' + NUMBERS)
    assert hlo.dots(text) == [hlo.Dot((48, 32), (64,), "bf16", 1)]


def test_a_product_that_is_not_known_is_an_error():
    text = CUBLAS.replace("BACK", '"__other$matmul"')
    with pytest.raises(ValueError, match="gemm multiplies and does not say which axes"):
        hlo.dots(text)
    assert hlo.dots(text.replace("matmul", "topk")) == []


def test_operands_may_be_written_with_their_types():
    text = CUBLAS.replace("BACK", '"__cublas$gemm"' + NUMBERS)
    typed = text.replace("(%x.1, %w.1)", "(bf16[48,64]{1,0} %x.1, bf16[64,32]{1,0} %w.1)")
    assert hlo.dots(typed) == hlo.dots(text)


def test_a_program_alone_does_not_tell_its_source():
    one = compiled(lambda x, w: jnp.tanh(x @ w), (48, 64), (64, 32))
    other = compiled(lambda x, w: jnp.tanh(x @ w), (48, 64), (64, 32))
    third = compiled(lambda x, w: jnp.sin(x @ w), (48, 64), (64, 32))
    assert one != other
    assert hlo.program_alone(one) == hlo.program_alone(other)
    assert hlo.program_alone(third) != hlo.program_alone(other)
    assert hlo.dots(hlo.program_alone(one)) == hlo.dots(one)


def test_a_text_without_an_entry_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.dots("HloModule")
