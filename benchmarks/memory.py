"""Bytes and parameters of training: LoRA against full fine-tuning, by abstract compilation.

    python -m benchmarks.memory [--models roberta-base gpt2-medium llama-7b gpt3-175b]

No array is made: the training step is compiled for shapes alone, and XLA says what it holds at its
peak. It compiles for CPU, which computes bfloat16 products in float32, so the peaks of the large
models are above a GPU's; what is held between steps is the same everywhere.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxlora as jl
from benchmarks import results
from benchmarks.measuring import progress
from jaxlora import models

Step = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its batch and what is adapted.

    Attributes:
      config: of the model.
      head: its class.
      batch, seq: the shape of the tokens.
      lora: what the paper or common practice trains.
      half: whether LoRA's base is bfloat16. Full fine-tuning is then shown twice: with float32
        params, gradients and moments, and with all of them in bfloat16.
    """

    config: Any
    head: Callable[[Any], nn.Module]
    batch: int
    seq: int
    lora: jl.LoraConfig
    half: bool = False


FUSED = {"c_attn": (True, False, True)}
CASES = {
    "roberta-base": Case(
        models.RobertaConfig(scan_layers=True, max_position_embeddings=514, type_vocab_size=1),
        models.RobertaForSequenceClassification,
        16,
        512,
        jl.LoraConfig(rank=8, targets="query|value", modules_to_save="classifier"),
    ),
    "gpt2-medium": Case(
        models.GPT2Config(scan_layers=True, n_embd=1024, n_layer=24, n_head=16),
        models.GPT2LMHeadModel,
        8,
        512,
        jl.LoraConfig(rank=4, alpha=32, targets="c_attn", fused=FUSED),
    ),
    "llama-7b": Case(
        models.LlamaConfig(scan_layers=True, remat=True, dtype=jnp.bfloat16),
        models.LlamaForCausalLM,
        1,
        2048,
        jl.LoraConfig(rank=8, targets="q_proj|v_proj"),
        half=True,
    ),
    "gpt3-175b": Case(
        models.GPT2Config(
            scan_layers=True,
            remat=True,
            dtype=jnp.bfloat16,
            n_embd=12288,
            n_layer=96,
            n_head=96,
            n_positions=2048,
        ),
        models.GPT2LMHeadModel,
        1,
        2048,
        jl.LoraConfig(rank=4, targets="c_attn", fused=FUSED),
        half=True,
    ),
}
LANGUAGE = (models.GPT2LMHeadModel, models.LlamaForCausalLM)
COLUMNS = [
    "model",
    "way",
    "trained parameters",
    "of the base, 1 in",
    "params GB",
    "gradients GB",
    "optimizer GB",
    "held GB",
    "of LoRA's held",
    "activations GB",
    "peak GB",
    "of LoRA's peak",
    "checkpoint MB",
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/memory.json"))
    options = parser.parse_args(arguments)
    rows = []
    with progress() as bar:
        task = bar.add_task("compiling", total=len(options.models))
        for name in options.models:
            rows += measure(name, CASES[name])
            bar.advance(task)
    note = (
        "Held: params and optimizer state, exactly, from shapes; gradients have the bytes of what "
        "is trained. Peak: all that the step holds at its most, as XLA for CPU plans it; "
        "activations: what of the peak is neither held nor gradients. Adam."
    )
    table = results.table("Training state", COLUMNS, rows)
    results.write(
        options.out, "Memory", note, [table], device="none: abstract", settings=vars(options)
    )


def measure(name: str, case: Case) -> list[list[Any]]:
    """The rows of one model: full fine-tuning, one way or two, and LoRA."""
    tx = optax.adam(1e-4)
    kinds: dict[str, Any] = {"full": jnp.float32}
    if case.half:
        kinds |= {"full, all in bfloat16": jnp.bfloat16}
    steps = {
        way: full_step(case, dataclasses.replace(case.config, param_dtype=kind), tx)
        for way, kind in kinds.items()
    }
    base = jnp.bfloat16 if case.half else jnp.float32
    steps["LoRA"] = lora_step(case, dataclasses.replace(case.config, param_dtype=base), tx)
    found = {way: (args, compiled_peak(step, args)) for way, (step, args) in steps.items()}
    (_, lora_params, lora_state), lora_peak = found["LoRA"][0][:3], found["LoRA"][1]
    lora_held = size(lora_params) + size(lora_state) + size(found["LoRA"][0][3])
    rows = []
    for way, (args, peak) in found.items():
        frozen = args[3] if way == "LoRA" else {}
        trained, state = args[1], args[2]
        held = size(trained) + size(state) + size(frozen)
        count = sum(x.size for x in jax.tree.leaves(trained))
        whole = sum(x.size for x in jax.tree.leaves(frozen)) or count
        rows.append(
            [
                name,
                way,
                count,
                round(whole / count),
                (size(trained) + size(frozen)) / 1e9,
                size(trained) / 1e9,
                size(state) / 1e9,
                held / 1e9,
                held / lora_held,
                (peak - held - size(trained)) / 1e9,
                peak / 1e9,
                peak / lora_peak,
                size(trained) / 1e6,
            ]
        )
    return rows


def size(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compiled_peak(step: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """Bytes of arguments and temporaries of a step that donates what it replaces."""
    compiled = jax.jit(step, donate_argnums=(1, 2)).lower(*args).compile()
    found: Any = compiled.memory_analysis()
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + new


def shapes(case: Case, config: Any) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The model, its abstract variables and batch."""
    model = case.head(config)
    ids = jax.ShapeDtypeStruct((case.batch, case.seq), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    labels = ids if case.head in LANGUAGE else jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    return model, variables, {"input_ids": ids, "labels": labels}


def mean_loss(case: Case, apply: Callable[..., Any], batch: dict[str, Any]) -> jax.Array:
    """The loss of the model's task."""
    if case.head in LANGUAGE:
        return jnp.mean(apply(batch["input_ids"], labels=batch["labels"]))
    logits = apply(batch["input_ids"]).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]))


def full_step(case: Case, config: Any, tx: Any) -> Step:
    """Full fine-tuning, and its abstract arguments: batch, trained, state."""
    model, variables, batch = shapes(case, config)

    def step(batch: Any, params: Any, state: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return mean_loss(case, lambda *a, **k: model.apply({"params": params}, *a, **k), batch)

        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = variables["params"]
    return step, (batch, params, jax.eval_shape(tx.init, params))


def lora_step(case: Case, config: Any, tx: Any) -> Step:
    """LoRA, and its abstract arguments: batch, trained, state, frozen."""
    model, variables, batch = shapes(case, config)
    planned = jl.plan(model, variables, case.lora, batch["input_ids"])
    adapter = planned.spec.abstract()

    def step(batch: Any, leaves: Any, state: Any, base: Any) -> Any:
        def loss(leaves: Any) -> jax.Array:
            own = dataclasses.replace(adapter, params=leaves)
            return mean_loss(
                case, lambda *a, **k: jl.lora_apply(model, {"params": base}, own, *a, **k), batch
            )

        updates, state = tx.update(jax.grad(loss)(leaves), state)
        return optax.apply_updates(leaves, updates), state

    leaves = adapter.params
    return step, (batch, leaves, jax.eval_shape(tx.init, leaves), variables["params"])


if __name__ == "__main__":
    main()
