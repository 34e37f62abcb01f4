"""Makes peft.npz: what HF PEFT computes, differentiates and trains on random weights.

Run where torch, transformers and peft are installed (2.13.0, 5.23.0 and 0.21.2 made the file here):

    python tests/references/make_peft.py

Names are "<layer>/<method>/<what>/<leaf>", all in torch's layouts: base/weight and base/bias before
PEFT touched them; start, grad and after of each trained leaf (a, b, m, bias); data/x, data/target,
data/y at the start and data/y_after three steps. For the methods that move part of the weight into
the factors, data/delta and data/delta_after are the effective weight less base/weight.

PEFT's branch of a dilated convolution is not dilated, so that it fails or differs from the merged
weight. There (conv2d_dilated) only the output of the merged layer is stored.
"""

import sys
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
from transformers.pytorch_utils import Conv1D  # pyright: ignore[reportMissingImports]

LAYERS = {
    "linear": (lambda: torch.nn.Linear(6, 4), lambda: torch.randn(3, 6)),
    "embedding": (lambda: torch.nn.Embedding(7, 5), lambda: torch.randint(0, 7, (3, 4))),
    "conv1d": (lambda: torch.nn.Conv1d(3, 4, 3, padding=1), lambda: torch.randn(2, 3, 5)),
    "conv2d": (
        lambda: torch.nn.Conv2d(3, 4, (2, 3), stride=(2, 1)),
        lambda: torch.randn(2, 3, 5, 4),
    ),
    "conv3d": (
        lambda: torch.nn.Conv3d(2, 3, (2, 1, 2), stride=(1, 2, 1)),
        lambda: torch.randn(2, 2, 3, 3, 3),
    ),
    "conv2d_dilated": (
        lambda: torch.nn.Conv2d(3, 4, (2, 3), dilation=(2, 1)),
        lambda: torch.randn(2, 3, 5, 4),
    ),
    "conv1d_gpt2": (lambda: Conv1D(4, 6), lambda: torch.randn(3, 6)),
    "conv1d_gpt2_square": (lambda: Conv1D(6, 6), lambda: torch.randn(3, 6)),
}
METHODS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
OF_LINEAR_ONLY = ("bias", "pissa", "olora")
OF_THE_WEIGHT = ("pissa", "olora")
LEAVES = {
    "lora_A": "a",
    "lora_embedding_A": "a",
    "lora_B": "b",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "m",
    "bias": "bias",
}


class Net(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def randomize(module):
    """Fills a base layer, whose own initialization may be zero or tiny."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)


def trained_leaves(model):
    """{a, b, m, bias: parameter} of those that are trained."""
    return {
        LEAVES[part]: p
        for name, p in model.named_parameters()
        for part in name.split(".")
        if p.requires_grad and part in LEAVES
    }


def move(leaves):
    """Makes fresh leaves look trained: none is zero, and magnitudes stay positive."""
    for name, p in leaves.items():
        if name == "m":
            p.data *= 1 + 0.3 * torch.rand_like(p)
        elif name in ("a", "b"):
            torch.nn.init.normal_(p)


def train(model, leaves, x):
    """{"<what>/<leaf>": array} of three steps of AdamW on a mean squared error."""
    y = model(x).detach()
    target = torch.randn_like(y)
    out = {"data/x": x, "data/y": y, "data/target": target}
    out |= {f"start/{name}": p.detach().clone() for name, p in leaves.items()}
    tx = torch.optim.AdamW(
        leaves.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    )
    for step in range(3):
        tx.zero_grad()
        ((model(x) - target) ** 2).mean().backward()
        if step == 0:
            out |= {f"grad/{name}": p.grad.clone() for name, p in leaves.items()}
        tx.step()
    out |= {f"after/{name}": p.detach() for name, p in leaves.items()}
    out["data/y_after"] = model(x).detach()
    return {name: array.numpy() for name, array in out.items()}


def case(layer, method):
    make, sample = LAYERS[layer]
    base = make()
    randomize(base)
    out = {f"base/{name}": p.detach().clone().numpy() for name, p in base.named_parameters()}
    options = METHODS[method] | {"fan_in_fan_out": isinstance(base, Conv1D)}
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], **options)
    model = get_peft_model(Net(base), config)
    adapted, leaves = model.base_model.model.layer, trained_leaves(model)

    def delta():
        effective = adapted.base_layer.weight + adapted.get_delta_weight("default")
        return effective.detach().numpy() - out["base/weight"]

    if method not in OF_THE_WEIGHT:
        move(leaves)
        if layer == "conv2d_dilated":
            out |= {f"start/{name}": p.detach().clone().numpy() for name, p in leaves.items()}
            x, merged = sample(), model.merge_and_unload()
            return out | {"data/x": x.numpy(), "data/y": merged(x).detach().numpy()}
        return out | train(model, leaves, sample())
    out["data/delta"] = delta()
    out |= train(model, leaves, sample())
    return out | {"data/delta_after": delta()}


def main(folder: str | Path = Path(__file__).parent, seed: str | int = 0):
    torch.manual_seed(int(seed))
    out = {}
    for layer in LAYERS:
        for method in METHODS:
            if layer == "linear" or method not in OF_LINEAR_ONLY:
                out |= {f"{layer}/{method}/{name}": x for name, x in case(layer, method).items()}
    np.savez_compressed(Path(folder) / "peft.npz", **out)


if __name__ == "__main__":
    main(*sys.argv[1:])  # a folder and a seed; the stored numbers are of seed 0
