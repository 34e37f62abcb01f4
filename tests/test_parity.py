"""Outputs, gradients and AdamW steps equal HF PEFT's and loralib's on the same weights.

tests/references/make_peft.py and make_loralib.py say what is stored, and where the two have nothing
to compare with.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora as jl
from tests.zoo import Conv1D

# `make test-interop` points this at a folder of numbers that torch has made just now.
STORED = Path(__file__).parent / "references"
REFERENCES = Path(os.environ.get("JAXLORA_REFERENCES", STORED))


@dataclasses.dataclass
class Layer:
    """A stored layer in Flax.

    `outputs_last`: whether torch's first axis of the weight, its outputs, is Flax's last. `fused`:
    loralib's `enable_lora`.
    """

    model: nn.Module
    outputs_last: bool = True
    fused: tuple[bool, ...] = ()


TFT, FTT = (True, False, True), (False, True, True)
# By library and layer. A fan-in/fan-out weight (in, out) stays so in a Dense, and turns elsewhere.
LAYERS = {
    "peft/linear": [Layer(nn.Dense(4))],
    "peft/embedding": [Layer(nn.Embed(7, 5), outputs_last=False)],
    "peft/conv1d": [Layer(nn.Conv(4, (3,), padding=1))],
    "peft/conv2d": [Layer(nn.Conv(4, (2, 3), strides=(2, 1), padding="VALID"))],
    "peft/conv2d_dilated": [Layer(nn.Conv(4, (2, 3), kernel_dilation=(2, 1), padding="VALID"))],
    "peft/conv3d": [Layer(nn.Conv(3, (2, 1, 2), strides=(1, 2, 1), padding="VALID"))],
    "peft/conv1d_gpt2": [Layer(nn.Dense(4), outputs_last=False), Layer(Conv1D(4))],
    "peft/conv1d_gpt2_square": [Layer(nn.Dense(6), outputs_last=False), Layer(Conv1D(6))],
    "loralib/linear": [Layer(nn.Dense(4)), Layer(Conv1D(4), outputs_last=False)],
    "loralib/linear_fan_in": [Layer(nn.Dense(4), outputs_last=False), Layer(Conv1D(4))],
    "loralib/embedding": [Layer(nn.Embed(7, 5), outputs_last=False)],
    "loralib/conv1d": [Layer(nn.Conv(4, (1,), strides=2))],
    "loralib/conv2d": [Layer(nn.Conv(4, (1, 1), padding=1))],
    "loralib/conv3d": [Layer(nn.Conv(4, (1, 1, 1)))],
    "loralib/conv2d_wide": [Layer(nn.Conv(4, (3, 3), strides=2, kernel_dilation=2, padding=0))],
    "loralib/merged_tft": [Layer(nn.Dense(12), fused=TFT)],
    "loralib/merged_ftt": [Layer(nn.Dense(12), fused=FTT)],
    "loralib/merged_tft_fan_in": [
        Layer(nn.Dense(12), outputs_last=False, fused=TFT),
        Layer(Conv1D(12), fused=TFT),
    ],
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "bias": {"bias": "lora_only"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
}
OF_THE_WEIGHT = ("pissa", "olora")


@functools.cache
def references():
    """{"<library>/<layer>/<method>": {"<what>/<leaf>": array}}."""
    out = {}
    for library in ("peft", "loralib"):
        with np.load(REFERENCES / f"{library}.npz") as stored:
            for name, array in stored.items():
                layer, method, what, leaf = name.split("/")
                case = out.setdefault(f"{library}/{layer}/{method}", {})
                case[f"{what}/{leaf}"] = array
    return out


class Case:
    """One stored layer and method, with the arrays in Flax's layouts."""

    def __init__(self, name, layer, rank=2, alpha=3.0):
        self.saved, self.layer, self.model = references()[name], layer, layer.model
        self.kernel = "embedding" if isinstance(layer.model, nn.Embed) else "kernel"
        self.x, params = self.data("x"), {self.kernel: self.weight(self.saved["base/weight"])}
        if "base/bias" in self.saved:
            params["bias"] = jnp.asarray(self.saved["base/bias"])
        self.variables = {"params": params}
        options = METHODS[name.rpartition("/")[2]]
        if layer.fused:
            options = options | {"fused": {self.kernel: layer.fused}}
        self.config = jl.LoraConfig(rank=rank, alpha=alpha, targets=self.kernel, **options)

    def init(self):
        key = jax.random.key(0)
        return jl.lora_init(key, self.model, self.variables, self.config, self.x)

    def data(self, leaf):
        """An input or output: torch's convolutions have the channels before the positions."""
        x = self.saved[f"data/{leaf}"]
        return jnp.asarray(np.moveaxis(x, 1, -1) if isinstance(self.model, nn.Conv) else x)

    def weight(self, w):
        """A base weight: torch's has (outputs, inputs, *positions)."""
        return jnp.asarray(np.moveaxis(w, (0, 1), (-1, -2)) if self.layer.outputs_last else w)

    def leaves(self, what):
        """The trained leaves at the start, their gradients ("grad"), or they after three steps."""
        blocks = max(sum(self.layer.fused), 1)
        out = {}
        for name, x in self.saved.items():
            of, leaf = name.split("/")
            if of != what:
                continue
            if leaf == "a" and x.ndim > 2:  # (rank, inputs, *positions)
                x = np.moveaxis(x, 1, -1)
            elif leaf == "a" and isinstance(self.model, nn.Conv):  # loralib's for a width of 1
                x = np.expand_dims(x, tuple(range(1, len(self.x.shape) - 1)))
            elif leaf == "b":  # (blocks * outputs, rank, *ones) to (blocks * rank, outputs)
                x = x.reshape(blocks, -1, x.shape[1]).swapaxes(1, 2)
                x = x.reshape(-1, x.shape[2])
            elif leaf == "m":
                x = x.ravel()
            key = "bias_lora_w" if leaf == "bias" else f"{self.kernel}_lora_{leaf}"
            out[key] = jnp.asarray(x)
        return out

    def started(self):
        """The adapter with the stored leaves."""
        adapter, leaves = self.init(), self.leaves("start")
        assert jax.tree.map(jnp.shape, leaves) == jax.tree.map(jnp.shape, adapter.params)
        return dataclasses.replace(adapter, params=leaves)

    def apply(self, adapter):
        return jl.lora_apply(self.model, self.variables, adapter, self.x)

    def merged(self, adapter):
        """The output of the merged model, and its kernel."""
        params = jl.merge(self.variables["params"], adapter)
        return self.model.apply({"params": params}, self.x), params[self.kernel]

    def grad(self, adapter):
        target = self.data("target")
        return jax.grad(lambda adapter: jnp.mean((self.apply(adapter) - target) ** 2))(adapter)

    def after_three_steps(self, adapter):
        tx = optax.adamw(1e-2, weight_decay=0.01)
        state = tx.init(adapter.params)
        for _ in range(3):
            updates, state = tx.update(self.grad(adapter).params, state, adapter.params)
            params = optax.apply_updates(adapter.params, updates)
            adapter = dataclasses.replace(adapter, params=params)
        return adapter


def cases(wanted):
    """A parametrization over the stored cases that are wanted, in each of their Flax layers."""
    return pytest.mark.parametrize(
        ("name", "layer"),
        [
            pytest.param(name, layer, id=f"{name}-{type(layer.model).__name__}")
            for name, saved in references().items()
            if wanted(name.rpartition("/")[2], saved)
            for layer in LAYERS[name.rpartition("/")[0]]
        ],
    )


def assert_close(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    leaves = jax.tree_util.tree_leaves_with_path(left)
    for (path, x), y in zip(leaves, jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype == jnp.float32
        np.testing.assert_allclose(x, y, 1e-5, 1e-5, err_msg=jax.tree_util.keystr(path))


with_leaves = cases(lambda method, saved: method not in OF_THE_WEIGHT and "start/a" in saved)
with_steps = cases(lambda method, saved: method not in OF_THE_WEIGHT and "after/a" in saved)
of_the_weight = cases(lambda method, saved: method in OF_THE_WEIGHT)


def test_every_stored_layer_and_method_is_compared():
    assert {name.rpartition("/")[0] for name in references()} == set(LAYERS)
    assert {name.rpartition("/")[2] for name in references()} == set(METHODS)


@with_leaves
def test_outputs_are_equal(name, layer):
    case = Case(name, layer)
    adapter = case.started()
    assert_close(case.apply(adapter), case.data("y"))
    assert_close(case.merged(adapter)[0], case.data("y"))


@with_steps
def test_gradients_are_equal(name, layer):
    case = Case(name, layer)
    assert_close(case.grad(case.started()).params, case.leaves("grad"))


@with_steps
def test_three_steps_of_adamw_are_equal(name, layer):
    case = Case(name, layer)
    adapter = case.after_three_steps(case.started())
    assert_close(adapter.params, case.leaves("after"))
    assert_close(case.apply(adapter), case.data("y_after"))


def test_loralibs_update_of_a_wide_convolution_gives_its_outputs():
    """Its factors are of another shape, so its update is given as A, and B is the identity."""
    name = "loralib/conv2d_wide"
    case = Case(f"{name}/lora", LAYERS[name][0], rank=4, alpha=4.0)
    delta = case.weight(case.saved["data/delta"])
    leaves = {"kernel_lora_a": jnp.moveaxis(delta, -1, 0), "kernel_lora_b": jnp.eye(4)}
    adapter = dataclasses.replace(case.init(), params=leaves)
    assert_close(case.apply(adapter), case.data("y"))
    y, kernel = case.merged(adapter)
    assert_close(y, case.data("y"))
    assert_close(kernel, case.variables["params"]["kernel"] + delta)


# PiSSA and OLoRA take their factors from the weight, and singular vectors have a free sign. So the
# update of the original weight is compared, which AdamW makes the same for either sign.


@of_the_weight
def test_factors_of_the_weight_start_as_the_original(name, layer):
    case = Case(name, layer)
    adapter = case.init()
    y, kernel = case.merged(adapter)
    delta = kernel - case.variables["params"][case.kernel]
    assert_close(delta, case.weight(case.saved["data/delta"]))
    assert_close(delta, jnp.zeros_like(delta))
    assert_close(y, case.data("y"))
    assert_close(case.apply(adapter), case.data("y"))


@of_the_weight
def test_three_steps_from_factors_of_the_weight_make_an_equal_update(name, layer):
    case = Case(name, layer)
    adapter = case.after_three_steps(case.init())
    y, kernel = case.merged(adapter)
    delta = kernel - case.variables["params"][case.kernel]
    assert_close(delta, case.weight(case.saved["data/delta_after"]))
    assert_close(y, case.data("y_after"))
    assert_close(case.apply(adapter), case.data("y_after"))
