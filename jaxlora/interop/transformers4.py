"""The Flax models of transformers 4: their own call and `generate`, with an adapter.

A `FlaxPreTrainedModel` holds its Linen module and its params. What it takes and returns is its own
affair, so it is called as it is, with the adapter's factors among its params and the branch in its
layers: outputs, caches and generation are theirs. `jaxlora.plan`, `lora_init`, `lora_apply` and
`merge` come here when they get such a model. Version 4.57 is the last that has them; it needs an
environment of its own, since the rest of jaxlora's Hugging Face support needs transformers 5.
"""

import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora import layers, tree
from jaxlora.adapter import Adapter
from jaxlora.apply import lora_apply as linen_apply
from jaxlora.config import LoraConfig
from jaxlora.errors import ModelError
from jaxlora.init import init_leaves
from jaxlora.layers import Linear
from jaxlora.merge import merge as merge_params
from jaxlora.plan import Plan
from jaxlora.plan import plan as linen_plan


class _Called(nn.Module):
    """A call of the model with given params, where jaxlora expects a Linen module's `apply`."""

    call: Callable[..., Any]

    @nn.nowrap
    def apply(
        self, variables: Any, *args: Any, rngs: Any = None, mutable: Any = False, **kwargs: Any
    ) -> Any:
        out = self.call(*args, params=variables["params"], **kwargs)
        return out if mutable is False else (out, {})


def plan(model: Any, config: LoraConfig, *args: Any, **kwargs: Any) -> Plan:
    """Finds what a config adapts in a Flax model of transformers 4.

    A table that is tied to the output head, such as `wte` of GPT-2, is read there past its layer:
    it is adapted under `mode="weights"`, or left out.

    Args:
      model: a `FlaxPreTrainedModel`.
      config: what to adapt.
      *args: example inputs of the model's call, only traced.
      **kwargs: keyword arguments of the call, such as `decoder_input_ids`.

    Returns:
      The plan.

    Raises:
      TargetError: a pattern that matches nothing, or a layer that cannot be adapted.
      ModelError: this is no such model, it holds no params, or it rejects the inputs.
    """
    params = _params(model)
    return linen_plan(_Called(model.__call__), {"params": params}, config, *args, **kwargs)


def lora_init(key: jax.Array, model: Any, config: LoraConfig, *args: Any, **kwargs: Any) -> Adapter:
    """Makes a fresh adapter for a Flax model of transformers 4: as `jaxlora.lora_init`.

    Args:
      key: a PRNG key.
      model: a `FlaxPreTrainedModel`. It is read, never changed.
      config: what to adapt and how.
      *args: example inputs of the model's call, only traced.
      **kwargs: keyword arguments of the call.

    Returns:
      The adapter.

    Raises:
      LoraError: as `plan`.
    """
    spec = plan(model, config, *args, **kwargs).spec
    return init_leaves(key, _params(model), spec)


def lora_apply(model: Any, adapter: Adapter, *args: Any, params: Any = None, **kwargs: Any) -> Any:
    """`model(…)` with the adapter's update in each adapted layer.

    Args:
      model: a `FlaxPreTrainedModel`.
      adapter: from `lora_init` or `load_adapter`. Differentiate with respect to it.
      *args: the model's inputs.
      params: the base; `model.params` by default. Give it where a jitted function is to take it as
        an argument.
      **kwargs: keyword arguments of the call. Adapter dropout is active exactly when `dropout_rng`
        is given and `train=True`.

    Returns:
      What the model returns, `.logits` and all.

    Raises:
      AdapterError: the adapter does not fit the params, or no adapted layer was run.
      ModelError: this is no such model.
    """
    return _run(model, "__call__", adapter, args, params, kwargs)


def generate(
    model: Any, adapter: Adapter, input_ids: Any, *, params: Any = None, **kwargs: Any
) -> Any:
    """`model.generate(…)` with an adapter: greedy, sampled or beams, with the model's own cache.

    Args:
      model: a `FlaxPreTrainedModel` that generates.
      adapter: the adapter.
      input_ids: the prompts.
      params: the base; `model.params` by default.
      **kwargs: keyword arguments of `generate`.

    Returns:
      What `model.generate` returns, `.sequences` and all.

    Raises:
      AdapterError: the adapter does not fit the params, or no adapted layer was run.
      ModelError: this is no such model.
    """
    return _run(model, "generate", adapter, (input_ids,), params, kwargs)


def merge(model: Any, adapter: Adapter, **options: Any) -> tree.Tree:
    """Folds an adapter into the model's params: as `jaxlora.merge`.

    Args:
      model: a `FlaxPreTrainedModel`; it is not changed.
      adapter: the adapter.
      **options: `dtype` and `donate`, as for `jaxlora.merge`.

    Returns:
      The params: `model(…, params=merged)`, or `model.params = merged` and `save_pretrained`.

    Raises:
      AdapterError: as `jaxlora.merge`.
    """
    return merge_params(_params(model), adapter, **options)


def _run(model: Any, method: str, adapter: Adapter, args: Any, params: Any, kwargs: Any) -> Any:
    base = _params(model)
    variables = {"params": base if params is None else params}
    rng = kwargs.get("dropout_rng") if kwargs.get("train") else None
    rngs = None if rng is None else {"dropout": rng}
    return linen_apply(
        _Called(getattr(model, method)), variables, adapter, *args, rngs=rngs, **kwargs
    )


def _params(model: Any) -> tree.Tree:
    """The model's params. The rule of a layer of its own is registered on the way."""
    base = next((c for c in type(model).__mro__ if c.__name__ == "FlaxPreTrainedModel"), None)
    if base is None:
        raise ModelError(
            f"The model is a {type(model).__name__}, expected a FlaxPreTrainedModel of "
            "transformers 4. Models of transformers 5 have no Flax; those of jaxlora.models do."
        )
    gpt2 = sys.modules.get("transformers.models.gpt2.modeling_flax_gpt2")
    if gpt2 is not None:
        layers.register(gpt2.FlaxConv1D)(_conv_1d)
    try:
        return model.params
    except ValueError as e:  # made with _do_init=False
        raise ModelError(
            f"This {type(model).__name__} holds no params (`_do_init=False`), expected a model "
            "that does. Set `model.params` first."
        ) from e


def _conv_1d(module: Any, inputs: jax.Array) -> Linear:
    """GPT-2's layer, whose kernel is stored (out, in)."""
    x = jnp.asarray(inputs, module.dtype)
    return Linear("kernel", "...i,oi->...o", x, precision=module.precision)
