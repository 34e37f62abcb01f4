"""What an adapter costs after training: unmerged, merged, and merged inside the call.

    python -m benchmarks.inference
    python -m benchmarks.inference --layers 2 --width 128 --tokens 256 --rounds 3

A Llama of ours reads a prompt (prefill), then gives one token with a cache of keys and values
(decode). Merged params run the base's own program: their HLO is compared, and must be equal.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxlora as jl
from benchmarks import hlo, results
from benchmarks.decoder import NnxDecoder, Shape
from benchmarks.floor import ALL
from benchmarks.measuring import Times, in_turn
from benchmarks.programs import Program, program
from benchmarks.ways import Lora, adapted, filled
from jaxlora.errors import optional
from jaxlora.models.llama import LlamaConfig, LlamaForCausalLM

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PATTERN = f".*/({'|'.join(NAMES)})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt")
    parser.add_argument("--past", type=int, default=512, help="tokens in the cache of a decode")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="of the decodes")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/inference.json"))
    options = parser.parse_args(arguments)

    shapes = {f"prefill, {options.tokens:,} tokens": (1, options.tokens, 0)}
    for batch in options.batches:
        title = f"decode, batch {batch}, {options.past} tokens in the cache"
        shapes[title] = (batch, 1, options.past)
    results.write(
        options.out,
        "Inference",
        f"A Llama of {options.layers} layers of width {options.width}, all its linear layers "
        "adapted. Merged params run the base's own program: the compiled HLO is equal. FLOPs / "
        "floor: the compiled products over those of the base and of the two products of each "
        "branch; none where XLA has no dots left to count. nnx.LoRA is compared with its own base, "
        "a decoder with a gelu MLP of the same width.",
        [measured(title, options, *sizes) for title, sizes in shapes.items()],
        device=jax.devices()[0].device_kind,
        settings=vars(options),
    )


def measured(
    title: str, options: argparse.Namespace, batch: int, tokens: int, past: int
) -> dict[str, Any]:
    """The table of one shape of input."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=past + tokens,
    )
    model = LlamaForCausalLM(config)
    ids = jnp.zeros((batch, tokens), jnp.int32)
    cache = model.empty_cache(batch, past + tokens)
    seen = cache.segments.at[:, :past].set(1)
    cache = dataclasses.replace(cache, segments=seen, index=jnp.int32(past))
    base = filled(jax.eval_shape(model.init, jax.random.key(0), ids))

    found = {"base": program(applied(model), base, ids, cache)}
    floors = {"base": hlo.total(hlo.dots(found["base"].text))}
    against = {"base": "base"}
    for rank in options.ranks:
        lora = jl.LoraConfig(rank=rank, alpha=2 * rank, targets=PATTERN)
        adapter = jl.lora_init(jax.random.key(1), model, base, lora, ids)
        adapter = dataclasses.replace(adapter, params=filled(adapter.params))
        folded = {"params": jl.merge(base["params"], adapter)}
        merged = program(applied(model), folded, ids, cache)
        if hlo.program_alone(merged.text) != hlo.program_alone(found["base"].text):
            raise SystemExit(f"{title}: the HLO of merged params differs from the base's.")
        print(f"{title}: the HLO of merged params equals the base's")

        def unmerged(variables: Any, adapter: Any, ids: Any, cache: Any) -> Any:
            return jl.lora_apply(model, variables, adapter, ids, cache=cache, last=1)

        def in_call(variables: Any, adapter: Any, ids: Any, cache: Any) -> Any:
            params = jl.merge(variables["params"], adapter)
            return model.apply({"params": params}, ids, cache=cache, last=1)

        new = {
            "jaxlora, merged": merged,
            "jaxlora, unmerged": program(unmerged, base, adapter, ids, cache),
            "jaxlora, weights in the call": program(in_call, base, adapter, ids, cache),
            "Qwix, unmerged": of_qwix(model, rank, ids, cache),
        }
        sides = [site.layout.count("i") + site.layout.count("o") for site in adapter.spec.sites]
        branches = 2 * batch * tokens * rank * sum(sides)
        for name, one in new.items():
            found[f"{name}, r={rank}"] = one
            against[f"{name}, r={rank}"] = "base"
            floors[f"{name}, r={rank}"] = floors["base"] + ("unmerged" in name) * branches
    for name, one in of_nnx(options, batch, tokens, past).items():
        found[name], against[name] = one, "nnx, base"
        floors[name] = 0
    times = in_turn({k: p.__call__ for k, p in found.items()}, options.rounds, title)
    return table(title, found, times, against, floors)


def applied(model: Any) -> Callable[..., Any]:
    """The model as a function of its own, so that each one is compiled anew."""

    def apply(variables: Any, ids: Any, cache: Any) -> Any:
        return model.apply(variables, ids, cache=cache, last=1)

    return apply


def table(
    title: str,
    found: dict[str, Program],
    times: dict[str, Times],
    against: dict[str, str],
    floors: dict[str, int],
) -> dict[str, Any]:
    """The rows, the ratios first."""
    rows = []
    for name, one in found.items():
        own, base = times[name], times[against[name]]
        of_base, floor = found[against[name]].dot_flops, floors[name]
        rows.append(
            [
                name,
                own.over(base),
                own.spread(base),
                own.over_at_best(base),
                one.dot_flops / of_base if of_base else None,
                f"{one.dot_flops / floor:.3f}" if floor and "in the call" not in name else None,
                one.compile_seconds,
                own.median_ms,
            ]
        )
    columns = ["way", "time / base", "10-90 %", "at best", "FLOPs / base", "FLOPs / floor"]
    return results.table(title, [*columns, "compile, s", "ms"], rows)


def of_qwix(model: Any, rank: int, ids: Any, cache: Any) -> Program:
    """Qwix's unmerged model."""
    library = optional("qwix", "The comparison with Qwix", "bench")
    provider = library.LoraProvider(module_path=PATTERN, rank=rank, alpha=2.0 * rank)
    model = library.apply_lora_to_model(model, provider)
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), ids))

    return program(applied(model), variables, ids, cache)


def of_nnx(options: argparse.Namespace, batch: int, tokens: int, past: int) -> dict[str, Program]:
    """The decoder in NNX, bare and with nnx.LoRA; a decode is given keys and values."""
    shape = Shape(options.layers, options.width, options.heads)
    x = jax.random.normal(jax.random.key(0), (batch, tokens, options.width))
    pair = jax.random.normal(
        jax.random.key(1), (batch, past, options.heads, options.width // options.heads)
    )
    earlier = [(pair, pair)] * options.layers if past else None
    makers = {"nnx, base": lambda: NnxDecoder(shape, nnx.Rngs(0))}
    for rank in options.ranks:
        lora = Lora("all", ALL, rank)
        makers[f"nnx.LoRA, unmerged, r={rank}"] = lambda lora=lora: adapted(shape, lora)
    found = {}
    for name, make in makers.items():
        graph, state = nnx.split(nnx.eval_shape(make))

        def apply(state: Any, x: Any, earlier: Any, graph: Any = graph) -> Any:
            return nnx.merge(graph, state)(x, earlier)

        found[name] = program(apply, filled(state), x, earlier)
    return found


if __name__ == "__main__":
    main()
