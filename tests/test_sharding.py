"""Shardings of an adapter, from those of the kernels, on a mesh of one device."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import jaxlora as jl
from jaxlora import tree
from jaxlora.tasks.mesh import mesh_sizes
from tests.zoo import CASES

MESH = AbstractMesh((2, 2), ("fsdp", "tensor"))


def spec_of(name, **options):
    case = CASES[name]
    targets = {"targets": case.targets} | case.options | options
    config = jl.LoraConfig(rank=2, **targets)
    variables = case.variables()
    return variables, jl.plan(case.model, variables, config, *case.inputs, **case.kwargs)


def specs(adapter):
    return {p: x.spec for p, x in tree.flat(adapter.params).items()}


def test_a_factor_lies_as_its_kernel_does():
    variables, plan = spec_of("mlp", dora=True)
    base = jax.tree.map(lambda _: P(), variables["params"])
    base["up"]["kernel"] = P("fsdp", "tensor")
    found = specs(jl.adapter_shardings(plan, base, MESH))
    assert found["up/kernel_lora_a"] == P(None, "fsdp")
    assert found["up/kernel_lora_b"] == P(None, "tensor")
    assert found["up/kernel_lora_m"] == P("tensor")
    assert found["down/kernel_lora_a"] == P(None, None)


def test_a_stacked_axis_stays_where_it_is():
    variables, plan = spec_of("scan_axis_1")
    site = plan.spec.sites[0]
    base = jax.tree.map(lambda x: P(*[None] * (x.ndim - 1), "tensor"), variables["params"])
    mesh = AbstractMesh((site.layout.shape[-1],), ("tensor",))
    found = specs(jl.adapter_shardings(plan.spec, base, mesh))
    for part in ("a", "b"):
        path = f"{site.path}_lora_{part}"
        axes = site.layout.leaf_axes(part)
        last = len(site.layout.shape) - 1
        assert found[path] == P(*["tensor" if axis == last else None for axis in axes])


def test_a_leaf_trained_in_full_lies_as_the_base_and_odd_sizes_are_whole():
    variables, plan = spec_of("mlp", modules_to_save="norm", bias="lora_only")
    base = jax.tree.map(lambda _: P("tensor"), variables["params"])
    found = specs(jl.adapter_shardings(plan, base, MESH))
    assert found["norm/scale_lora_w"] == P("tensor")
    odd = AbstractMesh((5,), ("tensor",))
    assert specs(jl.adapter_shardings(plan, base, odd))["norm/scale_lora_w"] == P(None)


def test_boxes_and_logical_names_give_the_specs():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"))
            return nn.Dense(8, kernel_init=init, name="up")(x)

    x = jnp.ones((2, 4))
    variables = jax.eval_shape(Boxed().init, jax.random.key(0), x)
    plan = jl.plan(Boxed(), variables, jl.LoraConfig(rank=2), x)
    rules = (("embed", None), ("mlp", ("fsdp", "tensor")))
    found = specs(jl.adapter_shardings(plan, variables["params"], MESH, rules=rules))
    assert found["up/kernel_lora_b"] == P(None, ("fsdp", "tensor"))
    with nn.logical_axis_rules(rules):
        assert specs(jl.adapter_shardings(plan, variables["params"], MESH)) == found
    with pytest.raises(jl.LoraError, match=r"up/kernel is sharded over embed.*Pass `rules`"):
        jl.adapter_shardings(plan, variables["params"], MESH)


def test_a_base_without_the_kernel_is_an_error():
    _, plan = spec_of("mlp")
    with pytest.raises(jl.LoraError, match="no sharding of down/kernel"):
        jl.adapter_shardings(plan, {"up": {"kernel": P()}}, MESH)


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        optax.MultiSteps(optax.adam(1e-3), 2),
        optax.sgd(optax.linear_schedule(1.0, 0.0, 5), momentum=0.9),
    ],
    ids=["adamw", "multi_steps", "sgd"],
)
def test_the_state_of_an_optimizer_lies_as_the_leaves(tx):
    variables, plan = spec_of("mlp")
    base = jax.tree.map(lambda _: P(), variables["params"])
    base["up"]["kernel"] = P(None, "tensor")
    state = jl.state_shardings(tx, jl.adapter_shardings(plan, base, MESH))
    abstract = jax.eval_shape(tx.init, plan.spec.abstract().params)
    flat, _ = jax.tree_util.tree_flatten_with_path(state.opt_state)
    wanted, _ = jax.tree_util.tree_flatten_with_path(abstract)
    assert [p for p, _ in flat] == [p for p, _ in wanted]
    for (path, found), (_, leaf) in zip(flat, wanted, strict=True):
        in_up = "['up']['kernel_lora_b']" in jax.tree_util.keystr(path)
        assert found.spec == (P(None, "tensor") if in_up else P(*[None] * leaf.ndim)), path


def test_rows_over_an_axis_that_is_not_there_is_an_error():
    mesh = jax.make_mesh((1,), ("data",))
    expected = pytest.raises(jl.LoraError, match="lie over batch, expected axes of the mesh: data")
    with expected, jl.rows_over(mesh, "batch"):
        pass


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tensors=2", "an axis 'tensors', expected data, fsdp, tensor. Nearest: tensor"),
        ("data=2,data=2", "each axis once"),
        ("fsdp=0", "each axis once with its size"),
    ],
)
def test_a_mesh_that_cannot_be_read_says_why(text, said):
    with pytest.raises(jl.LoraError, match=said):
        mesh_sizes(text)
