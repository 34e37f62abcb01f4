"""Algebra on adapters: everything is compared as the full updates of the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora as jl
from jaxlora import algebra, tree
from tests.test_properties import apply, assert_close, fresh, trained
from tests.zoo import CASES

NAMES = ["mlp", "scan_axis_-1", "vmap_in_scan", "dense_general_batched", "fused", "conv", "boxed"]
some_models = pytest.mark.parametrize("name", NAMES)


def two(name):
    _, adapter = fresh(CASES[name])
    return trained(adapter), trained(adapter, 0.2)


def assert_same_delta(adapter, expected):
    found = algebra.delta(adapter)
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        assert_close(found[path], x, name=path)


@some_models
def test_delta_is_what_merge_adds(name):
    variables, _ = fresh(CASES[name])
    adapter, _ = two(name)
    zeros = jax.tree.map(jnp.zeros_like, variables["params"])
    merged = dict(tree.items(jl.merge(zeros, adapter)))
    assert_same_delta(adapter, {p: tree.unboxed(merged[p]) for p in algebra.delta(adapter)})


@some_models
def test_add_is_exact_and_runs(name):
    left, right = two(name)
    total = algebra.add(left, right)
    expected = {p: x + algebra.delta(right)[p] for p, x in algebra.delta(left).items()}
    assert_same_delta(total, expected)
    variables, _ = fresh(CASES[name])
    merged = jl.merge(variables["params"], total)
    once = jl.merge(jl.merge(variables["params"], left), right)
    jax.tree.map(assert_close, merged, once)
    assert np.isfinite(apply(CASES[name], variables, total)).all()


def test_add_takes_sites_that_only_one_adapter_has():
    case = CASES["mlp"]
    variables = case.variables()
    up, down = (
        trained(
            jl.lora_init(
                jax.random.key(0), case.model, variables, jl.LoraConfig(targets=name), *case.inputs
            )
        )
        for name in ("up", "down")
    )
    assert_same_delta(algebra.add(up, down), algebra.delta(up) | algebra.delta(down))


@some_models
def test_scale_and_interpolate(name):
    left, right = two(name)
    dl, dr = algebra.delta(left), algebra.delta(right)
    assert_same_delta(algebra.scale(left, -0.5), {p: -0.5 * x for p, x in dl.items()})
    mixed = algebra.interpolate(left, right, 0.25)
    assert_same_delta(mixed, {p: 0.75 * x + 0.25 * dr[p] for p, x in dl.items()})


@some_models
def test_truncating_to_the_full_rank_changes_nothing(name):
    adapter, _ = two(name)
    assert_same_delta(algebra.truncate(adapter, rank=99), algebra.delta(adapter))
    assert_same_delta(algebra.truncate(adapter, energy=1.0), algebra.delta(adapter))


def test_truncating_is_the_best_approximation():
    left, right = two("mlp")
    total = algebra.add(left, right)
    short = algebra.truncate(total, rank=3)
    for path, full in algebra.delta(total).items():
        u, s, vt = np.linalg.svd(np.asarray(full, np.float64), full_matrices=False)
        assert_close(algebra.delta(short)[path], u[:, :3] * s[:3] @ vt[:3], name=path)
        assert_close(algebra.singular_values(total)[path].ravel(), s[:4], name=path)
    assert {site.rank for site in short.spec.sites} == {3}


def test_energy_finds_the_rank_that_is_used():
    adapter, _ = two("mlp")
    doubled = algebra.add(adapter, adapter)  # rank 4 on paper, 2 in truth
    found = algebra.truncate(doubled, energy=0.999999)
    assert {site.rank for site in found.spec.sites} == {2}
    assert_same_delta(found, algebra.delta(doubled))


def test_a_sum_saves_and_loads(tmp_path):
    total = algebra.add(*two("fused"))
    jl.save_adapter(tmp_path / "sum", total)
    loaded = jl.load_adapter(tmp_path / "sum")
    assert loaded.spec == total.spec
    jax.tree.map(np.testing.assert_array_equal, loaded, total)


@pytest.mark.parametrize("operation", [algebra.add, lambda a: algebra.scale(a, 2.0)])
@pytest.mark.parametrize("options", [{"dora": True}, {"bias": "all"}])
def test_what_is_no_update_is_refused(operation, options):
    _, adapter = fresh(CASES["mlp"], **options)
    with pytest.raises(jl.LoraError, match="takes updates of kernels only"):
        operation(adapter)


def test_adapters_of_different_bases_do_not_add():
    with pytest.raises(jl.LoraError, match="expected adapters of one base"):
        algebra.add(two("vmap_experts")[0], two("vmap_experts_axis_-1")[0])
    with pytest.raises(jl.LoraError, match="got no adapters"):
        algebra.add()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one of them"),
        ({"rank": 1, "energy": 0.5}, "expected one of them"),
        ({"rank": 0}, "at least 1"),
        ({"energy": 1.5}, r"a share in \(0, 1\]"),
    ],
)
def test_truncate_says_what_it_wants(options, message):
    with pytest.raises(jl.LoraError, match=message):
        algebra.truncate(two("mlp")[0], **options)


@pytest.mark.parametrize("name", NAMES)
def test_an_update_is_extracted_from_merged_params(name):
    variables, fresh_one = fresh(CASES[name])
    adapter, _ = two(name)
    merged = jl.merge(variables["params"], adapter)
    found = algebra.approximate(fresh_one, variables["params"], merged)
    assert_same_delta(found, algebra.delta(adapter))


def test_loftq_starts_nearer_to_the_original_than_the_quantized_base():
    variables, adapter = fresh(CASES["mlp"])
    params = variables["params"]
    quantized = jl.quantize(params, adapter.spec, "int4")
    start = algebra.approximate(adapter, quantized, params)
    zero = jax.tree.map(jnp.zeros_like, adapter)
    for layer in ("up", "down"):
        far, near = (
            np.linalg.norm(jl.merge(quantized, x)[layer]["kernel"] - params[layer]["kernel"])
            for x in (zero, start)
        )
        assert near < 0.9 * far


def test_starting_factors_make_an_ordinary_lora_of_twice_the_rank(tmp_path):
    case = CASES["mlp"]
    variables, adapter = fresh(case, init="pissa")
    adapter = trained(adapter)
    plain = algebra.ordinary(adapter)
    assert {site.rank for site in plain.spec.sites} == {4}
    assert not plain.frozen
    assert_close(apply(case, variables, plain), apply(case, variables, adapter))
    jl.save_adapter(tmp_path / "plain", plain, params=variables["params"])
    assert jl.load_adapter(tmp_path / "plain", params=variables["params"]).spec == plain.spec
    scaled = algebra.scale(adapter, 0.5)
    assert_same_delta(scaled, {p: 0.5 * x for p, x in algebra.delta(adapter).items()})
    with pytest.raises(jl.LoraError, match="approximate sets both factors"):
        algebra.approximate(adapter, variables["params"], variables["params"])
