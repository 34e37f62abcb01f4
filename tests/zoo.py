"""The table of models that the property suites run over.

Each entry is small and odd in one way: where a kernel's axes are, which transform it stands under,
or how often it is used.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxlora as jl


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    model: nn.Module
    inputs: tuple[Any, ...]
    targets: Any = "all-linear"
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    differentiable: bool = True
    wide: bool = True  # whether it runs in float64

    def variables(self) -> Any:
        made = self.model.init(jax.random.key(0), *self.inputs, **self.init_kwargs())
        # Biases and norms away from their neutral start, so that nothing cancels by accident.
        keys = iter(jax.random.split(jax.random.key(1), 1000))
        return jax.tree.map(
            lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype), made
        )

    def init_kwargs(self) -> dict[str, Any]:
        return {k: v for k, v in self.kwargs.items() if k != "mutable"}


class Mlp(nn.Module):
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.gelu(nn.Dense(12, name="up", **kinds)(x))
        x = nn.LayerNorm(name="norm", **kinds)(x)
        return nn.Dense(4, name="down", **kinds)(x)


class Block(nn.Module):
    """A residual block of a square Dense, as the body of a scan."""

    use_bias: bool = True
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(8, use_bias=self.use_bias, name="dense")(x)
        y = nn.Dropout(self.rate, deterministic=self.rate == 0)(y)
        return x + nn.tanh(y), None


class Scanned(nn.Module):
    """Eight layers of an 8-wide kernel: sizes tell nothing about the axes."""

    axis: int = 0
    remat: bool = False
    use_bias: bool = True
    rate: float = 0.0
    split_rngs: Any = dataclasses.field(default_factory=lambda: {"params": True})

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        layers = nn.scan(
            block, variable_axes={"params": self.axis}, split_rngs=self.split_rngs, length=8
        )
        x, _ = layers(self.use_bias, self.rate, name="layers")(x, None)
        return nn.Dense(3, name="head")(x)


class RematScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat_scan(nn.Dense, lengths=(2, 3))(8, name="layers")(x)


class ScannedAttention(nn.Module):
    """Kernels of three axes under a scan whose axis has no place in a factor of two."""

    axis: int = 3

    @nn.compact
    def __call__(self, x):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                q = nn.DenseGeneral((2, 4), use_bias=False, name="query")(x)
                out = nn.DenseGeneral(8, axis=(-2, -1), use_bias=False, name="out")
                return x + nn.tanh(out(q)), None

        layers = nn.scan(
            Body, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
        )
        return layers(name="layers")(x, None)[0]


class Experts(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        dense = nn.vmap(
            nn.Dense,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            in_axes=None,  # pyright: ignore[reportArgumentType]
            out_axes=0,
            axis_size=3,
        )
        return dense(5, name="experts")(x).sum(0)


class ScannedExperts(nn.Module):
    """A vmap in a scan: two stacked axes, one of them negative."""

    @nn.compact
    def __call__(self, x):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                dense = nn.vmap(
                    nn.Dense,
                    variable_axes={"params": 1},
                    split_rngs={"params": True},
                    in_axes=None,  # pyright: ignore[reportArgumentType]
                    out_axes=0,
                    axis_size=3,
                )
                return x + nn.tanh(dense(8, name="experts")(x).mean(0)), None

        layers = nn.scan(Body, variable_axes={"params": -1}, split_rngs={"params": True}, length=5)
        return layers(name="layers")(x, None)[0]


class SharedVmap(nn.Module):
    """One Dense mapped over an axis of the input: its kernel is not stacked."""

    @nn.compact
    def __call__(self, x):
        dense = nn.vmap(
            nn.Dense, variable_axes={"params": None}, split_rngs={"params": False}, in_axes=0
        )
        return dense(5, name="shared")(x)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)


class BatchedDense(nn.Module):
    """DenseGeneral with a batch axis and two contracted ones out of order."""

    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((3, 2), axis=(-1, 1), batch_dims=(0,), name="dense")(x)


class Einsums(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Einsum((8, 2, 6), "btd,dhk->bthk", name="fan_out")(x)
        x = nn.tanh(nn.Einsum((2, 6, 5), "bthk,hkd->btd", name="fan_in")(x))
        x = nn.tanh(nn.Einsum((3, 5, 4), "...d,edf->...ef", name="ellipsis")(x))
        return nn.Einsum((3, 4, 2), "bted,edf->ebtf", use_bias=False, name="batched")(x)


class CallTimeEinsum(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Einsum((8, 5), use_bias=False, name="einsum")(x, "btd,df->btf")


class TiedEmbedding(nn.Module):
    def setup(self):
        self.embed = nn.Embed(11, 6)
        self.mix = nn.Dense(6)

    def __call__(self, ids):
        return self.embed.attend(nn.tanh(self.mix(self.embed(ids))))

    def encode(self, ids):
        return nn.tanh(self.mix(self.embed(ids)))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(6, name="dense")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(2, name="head")(nn.relu(x))


class SharedTwice(nn.Module):
    """One Dense, set up once and called twice."""

    def setup(self):
        self.dense = nn.Dense(8)

    def __call__(self, x):
        return self.dense(nn.tanh(self.dense(x)))


class SubclassedDense(nn.Module):
    """A subclass whose __call__ calls super().__call__: the branch is added once."""

    @nn.compact
    def __call__(self, x):
        class Scaled(nn.Dense):
            @nn.compact
            def __call__(self, inputs):
                return 2.0 * super().__call__(inputs)

        return Scaled(5, name="scaled")(x)


class Recurrent(nn.Module):
    """GRU: each kernel is used at every step of a scan over time."""

    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.GRUCell(6), name="rnn")(x)


class Convs(nn.Module):
    """Convolutions of one to three dimensions: strides, dilation, groups, padding modes."""

    @nn.compact
    def __call__(self, x):  # (batch, 6, 6, 4)
        x = nn.Conv(6, (3, 3), strides=2, padding="CIRCULAR", name="strided")(x)
        x = nn.tanh(nn.Conv(6, (2, 3), kernel_dilation=2, feature_group_count=2, name="groups")(x))
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 1), name="transpose")(x)
        x = nn.ConvTranspose(3, (2, 2), transpose_kernel=True, name="flipped")(x)
        x = nn.tanh(nn.ConvLocal(4, (2, 2), name="local")(x))
        x = nn.Conv(5, 3, padding="CAUSAL", name="line")(x.reshape(x.shape[0], -1, 4))
        return nn.Conv(2, (2, 2, 2), name="cube")(x[:, :8].reshape(-1, 2, 2, 2, 5))


class Fused(nn.Module):
    """Kernels that hold q, k and v side by side: flat, with an axis of their own, and scanned."""

    @nn.compact
    def __call__(self, x):
        q, k, v = jnp.split(nn.Dense(12, name="c_attn")(x), 3, -1)
        x = nn.tanh(q * k + v)
        x = nn.DenseGeneral((2, 3, 2), name="axis")(x)
        x = nn.tanh(x.reshape(*x.shape[:-3], 12))[..., :8]

        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                gate, up = jnp.split(nn.Dense(16, name="gate_up")(x), 2, -1)
                return x + nn.tanh(gate * up), None

        layers = nn.scan(Body, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


class CallEinsum(nn.Module):
    """As gemma's Einsum: the kernel has a name of its own, the equation comes with the call."""

    shape: tuple[int, ...]
    weight_name: str = "w"

    @nn.compact
    def __call__(self, eqn, x):
        return jnp.einsum(
            eqn, x, self.param(self.weight_name, nn.initializers.normal(0.3), self.shape)
        )


@jl.register(CallEinsum)
def call_einsum(module, eqn, x):
    return jl.Linear(module.weight_name, eqn, x)


class SharedScope(nn.Module):
    """Several kernels in one scope, as in gemma's FeedForward."""

    def setup(self):
        self.gate_up = CallEinsum((2, 12, 8), "gating_einsum")
        self.linear = CallEinsum((12, 8), "linear_einsum")
        nn.share_scope(self, self.gate_up)
        nn.share_scope(self, self.linear)

    def __call__(self, x):
        gate, up = jnp.moveaxis(self.gate_up("...d,nhd->...nh", x), -2, 0)
        return self.linear("...h,hd->...d", nn.gelu(gate) * up)


class Conv1D(nn.Module):
    """As transformers 4's FlaxConv1D: the kernel is stored (out, in), square or not."""

    features: int

    @nn.compact
    def __call__(self, x):
        shape = (self.features, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.normal(0.3), shape)
        return x @ kernel.T + self.param("bias", nn.initializers.zeros, (self.features,))


@jl.register(Conv1D)
def conv_1d(module, x):
    return jl.Linear("kernel", "...i,oi->...o", x)


class FanInFanOut(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(Conv1D(8, name="square")(x))
        q, k, v = jnp.split(Conv1D(24, name="c_attn")(x), 3, -1)
        return Conv1D(4, name="c_proj")(q * k + v)


class ExpertParams(nn.Module):
    """Raw params of a mixture of experts, used by einsum and ragged_dot, in a scan over layers."""

    @nn.compact
    def __call__(self, x):  # (tokens, 8)
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                init = nn.initializers.normal(0.3)
                wi = self.param("wi", init, (3, 8, 6))
                wo = self.param("wo", init, (3, 6, 8))
                h = nn.tanh(jnp.einsum("td,edf->etf", x, wi))
                rows = jnp.full(3, x.shape[0], jnp.int32)
                y = jax.lax.ragged_dot(h.reshape(-1, 6), wo, rows)
                return x + y.reshape(3, *x.shape).mean(0), None

        layers = nn.scan(Body, variable_axes={"params": 1}, split_rngs={"params": True}, length=2)
        return layers(name="layers")(x, None)[0]


class Unserved(nn.Module):
    """Kernels that no rule serves: normalized on their way, and of a cell that fuses its own."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.WeightNorm(nn.Dense(6, name="dense"), name="norm")(x))
        return nn.RNN(nn.OptimizedLSTMCell(4), name="lstm")(x)


class Boxed(nn.Module):
    """Params in nn.Partitioned boxes, under a scan that names its axis."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))

        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.tanh(nn.Dense(8, kernel_init=init, name="dense")(x)), None

        layers = nn.scan(
            Body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(name="layers")(x, None)[0]


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(nn.Dense)(5, name="dense")(x)


class Looped(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.Dense(8, name="body")
        if self.is_initializing():
            return body(x)
        _, x = nn.while_loop(
            lambda module, carry: carry[0] < 3,
            lambda module, carry: (carry[0] + 1, nn.tanh(body(carry[1]))),
            self,
            (0, x),
            broadcast_variables="params",
        )
        return x


class Branched(nn.Module):
    @nn.compact
    def __call__(self, x):
        branch = nn.Dense(8, name="branch")
        if self.is_initializing():
            return branch(x)
        return nn.cond(x.sum() < 1e9, lambda module, x: branch(x), lambda module, x: x, self, x)


def _x(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(7), shape, dtype)


CASES = {
    case.name: case
    for case in (
        Case("mlp", Mlp(), (_x(5, 8),)),
        Case("mlp_no_batch", Mlp(), (_x(8),)),
        Case("scan", Scanned(), (_x(5, 8),)),
        Case("scan_axis_1", Scanned(axis=1), (_x(5, 8),)),
        Case("scan_axis_-1", Scanned(axis=-1), (_x(5, 8),)),
        Case("scan_axis_2", Scanned(axis=2, use_bias=False), (_x(5, 8),)),
        Case("scan_remat", Scanned(remat=True), (_x(5, 8),)),
        Case("remat_scan", RematScan(), (_x(5, 8),)),
        Case("scan_attention_axis_3", ScannedAttention(3), (_x(2, 5, 8),)),
        Case("scan_attention_axis_-4", ScannedAttention(-4), (_x(2, 5, 8),)),
        Case("vmap_experts", Experts(), (_x(5, 8),)),
        Case("vmap_experts_axis_-1", Experts(-1), (_x(5, 8),)),
        Case("vmap_in_scan", ScannedExperts(), (_x(5, 8),)),
        Case("vmap_shared", SharedVmap(), (_x(3, 5, 8),)),
        Case("attention", Attention(), (_x(2, 5, 8),)),
        Case("dense_general_batched", BatchedDense(), (_x(2, 3, 4, 5),)),
        Case("einsum", Einsums(), (_x(2, 5, 8),)),
        Case("einsum_call_time", CallTimeEinsum(), (_x(2, 5, 8),)),
        Case("embed_attend", TiedEmbedding(), (jnp.arange(10).reshape(2, 5),), ("embed", "mix")),
        Case("batch_norm_train", Normed(), (_x(5, 8),), kwargs={"mutable": ["batch_stats"]}),
        Case("batch_norm_eval", Normed(), (_x(5, 8),), kwargs={"train": False}),
        Case("shared_twice", SharedTwice(), (_x(5, 8),)),
        Case("subclassed", SubclassedDense(), (_x(5, 8),)),
        Case("gru", Recurrent(), (_x(2, 5, 4),), wide=False),
        Case("conv", Convs(), (_x(2, 6, 6, 4),)),
        Case(
            "fused",
            Fused(),
            (_x(2, 5, 8),),
            options={
                "fused": {
                    "c_attn": (True, False, True),
                    "axis": (False, True, True),
                    "gate_up": (False, True),
                }
            },
        ),
        Case("gemma_einsum", SharedScope(), (_x(2, 5, 8),), ("gating_einsum", "linear_einsum")),
        Case("fan_in_fan_out", FanInFanOut(), (_x(2, 5, 8),)),
        Case(
            "expert_params",
            ExpertParams(),
            (_x(5, 8),),
            ("wi", "wo"),
            options={"mode": "weights", "roles": {"w[io]": "bio"}},
        ),
        Case(
            "unserved",
            Unserved(),
            (_x(2, 5, 8),),
            ("dense", "OptimizedLSTMCell_0/.*"),
            options={"mode": "weights"},
            wide=False,
        ),
        Case("boxed", Boxed(), (_x(5, 8),)),
        Case("nn_jit", Jitted(), (_x(5, 8),)),
        Case("while", Looped(), (_x(5, 8),), differentiable=False),
        Case("cond", Branched(), (_x(5, 8),)),
    )
}

DIFFERENTIABLE = {name: case for name, case in CASES.items() if case.differentiable}
every_differentiable_model = pytest.mark.parametrize(
    "case", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE.keys()
)
every_model = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
