"""The same decoder in torch: full fine-tuning and PEFT's LoRA, and inference merged and not.

Run in an environment with torch, peft and rich (made with torch 2.13.0+cpu, peft 0.21.2):

    .venv-torch/bin/python -m benchmarks.step_torch --tokens 512 2048
    .venv-torch/bin/python -m benchmarks.step_torch --device cuda --dtype bfloat16 --compile

The ratios are to torch's own full fine-tuning: those of step.py are to jax's.
"""

# torch is not among the project's dependencies.
# pyright: reportMissingImports=false

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch

from benchmarks import results
from benchmarks.measuring import in_turn

TARGETS = {"q,v": ["query", "value"], "all": ["query", "key", "value", "out", "up", "down"]}


class Layer(torch.nn.Module):
    """A pre-norm decoder layer, as in decoder.py."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_a, self.norm_b = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (
            torch.nn.Linear(width, width) for _ in range(4)
        )
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: Any) -> Any:
        """(batch, sequence, width) to the same."""
        y = self.norm_a(x)
        q, k, v = (
            linear(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gelu = torch.nn.functional.gelu(self.up(self.norm_b(x)), approximate="tanh")
        return x + self.down(gelu)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--sequence", type=int, help="default: a quarter of the tokens")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models, too")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/step_torch.json"))
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tables = [
        table
        for tokens in options.tokens
        for table in (steps(options, tokens), runs(options, tokens))
    ]
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    results.write(
        options.out,
        "Torch and PEFT",
        f"The same {options.layers} layers of width {options.width} in torch, with PEFT's LoRA and "
        "Adam. The ratios are to torch's own full fine-tuning and its own base.",
        tables,
        device=name,
        settings=vars(options),
    )


def steps(options: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """The table of the training steps of a number of tokens."""
    x = inputs(options, tokens)
    ways = {"full": step(options, x, None, 0)}
    if options.compile:
        ways["full, compiled"] = step(options, x, None, 0, compiled=True)
    for name in TARGETS:
        for rank in options.ranks:
            ways[f"PEFT, {name} r={rank}"] = step(options, x, name, rank)
            if options.compile:
                run = step(options, x, name, rank, compiled=True)
                ways[f"PEFT, {name} r={rank}, compiled"] = run
    return compared(options, x, ways, "full", "Training step")


def runs(options: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """The table of the forward passes of a number of tokens."""
    x = inputs(options, tokens)
    ways = {"base": forward(model_of(options, x, None, 0), x)}
    for rank in options.ranks:
        ways[f"PEFT unmerged, all r={rank}"] = forward(model_of(options, x, "all", rank), x)
        merged = model_of(options, x, "all", rank).merge_and_unload()
        ways[f"PEFT merged, all r={rank}"] = forward(merged, x)
    return compared(options, x, ways, "base", "Forward pass")


def inputs(options: argparse.Namespace, tokens: int) -> Any:
    """(batch, sequence, width)."""
    sequence = options.sequence or tokens // 4
    x = torch.randn(tokens // sequence, sequence, options.width)
    return x.to(options.device, getattr(torch, options.dtype))


def compared(
    options: argparse.Namespace, x: Any, ways: dict[str, Any], base: str, what: str
) -> dict[str, Any]:
    """The table of ways run in turn, over one of them."""
    batch, sequence, _ = x.shape
    title = f"{what}: {batch * sequence:,} tokens in sequences of {sequence}, {options.dtype}"
    times = in_turn(ways, options.rounds, title)
    rows = [
        [
            name,
            own.over(times[base]),
            own.spread(times[base]),
            own.over_at_best(times[base]),
            own.median_ms,
        ]
        for name, own in times.items()
    ]
    return results.table(title, ["way", f"time / {base}", "10-90 %", "at best", "ms"], rows)


def model_of(options: argparse.Namespace, x: Any, targets: str | None, rank: int) -> Any:
    """The decoder, with PEFT's adapter where there are targets."""
    layers = [Layer(options.width, options.heads) for _ in range(options.layers)]
    model: Any = torch.nn.Sequential(*layers).to(x.device, x.dtype)
    if targets is None:
        return model
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS[targets])
    return peft.get_peft_model(model, config)


def forward(model: Any, x: Any) -> Callable[[], None]:
    """A forward pass that waits for its end."""
    model.eval()

    def once() -> None:
        with torch.inference_mode():
            model(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    return once


def step(
    options: argparse.Namespace, x: Any, targets: str | None, rank: int, compiled: bool = False
) -> Callable[[], None]:
    """A training step that waits for its end."""
    model = model_of(options, x, targets, rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    run = torch.compile(model) if compiled else model

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        run(x).float().square().mean().backward()
        optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()

    return once


if __name__ == "__main__":
    main()
