"""Makes loralib.npz: what loralib computes, differentiates and trains on random weights.

Run where torch, loralib and what make_peft.py needs are installed (torch 2.13.0 and loralib 0.1.2
made the file here):

    python tests/references/make_loralib.py

Names are those of peft.npz. loralib's convolutions factor a kernel of width k by matrices of
k * rank rows and columns: for k = 1 that is PEFT's and jaxlora's parametrization, for wider ones it
is another. So k = 1 is stored like the other layers, and for k = 3 ("conv2d_wide") only the base,
the update of the kernel (data/delta) and the output. loralib's Conv1d and Conv3d fail for k > 1:
their product has k * k elements for each pair of channels, which fits kernels of two dimensions.
"""

import sys
from pathlib import Path

import loralib  # pyright: ignore[reportMissingImports]
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from make_peft import move, randomize, train, trained_leaves

RANK = {"r": 2, "lora_alpha": 3}


def merged(mask, **options):
    return lambda: loralib.MergedLinear(6, 12, enable_lora=mask, **RANK, **options)


LAYERS = {
    "linear": (lambda: loralib.Linear(6, 4, **RANK), (3, 6)),
    "linear_fan_in": (lambda: loralib.Linear(6, 4, fan_in_fan_out=True, **RANK), (3, 6)),
    "embedding": (lambda: loralib.Embedding(7, 5, **RANK), (3, 4)),
    "conv1d": (lambda: loralib.Conv1d(3, 4, 1, stride=2, **RANK), (2, 3, 5)),
    "conv2d": (lambda: loralib.Conv2d(3, 4, 1, padding=1, **RANK), (2, 3, 2, 3)),
    "conv3d": (lambda: loralib.Conv3d(3, 4, 1, **RANK), (2, 3, 2, 2, 2)),
    "conv2d_wide": (lambda: loralib.Conv2d(3, 4, 3, stride=2, dilation=2, **RANK), (2, 3, 7, 8)),
    "merged_tft": (merged([True, False, True]), (3, 6)),
    "merged_ftt": (merged([False, True, True]), (3, 6)),
    "merged_tft_fan_in": (merged([True, False, True], fan_in_fan_out=True), (3, 6)),
}


def case(layer, bias):
    make, shape = LAYERS[layer]
    model = make()
    randomize(model)
    loralib.mark_only_lora_as_trainable(model, bias=bias)
    leaves = trained_leaves(model)
    move(leaves)
    base = model.conv if layer.startswith("conv") else model
    out = {
        f"base/{name}": getattr(base, name).detach().clone().numpy()
        for name in ("weight", "bias")
        if hasattr(base, name)
    }
    x = torch.randint(0, 7, shape) if layer == "embedding" else torch.randn(shape)
    if layer != "conv2d_wide":
        return out | train(model, leaves, x)
    out |= {"data/x": x.numpy(), "data/y": model(x).detach().numpy()}
    model.eval()  # merges
    return out | {"data/delta": base.weight.detach().numpy() - out["base/weight"]}


def main(folder: str | Path = Path(__file__).parent, seed: str | int = 0):
    torch.manual_seed(int(seed))
    cases = [(layer, "lora", "none") for layer in LAYERS] + [("linear", "bias", "lora_only")]
    out = {}
    for layer, method, bias in cases:
        out |= {f"{layer}/{method}/{name}": x for name, x in case(layer, bias).items()}
    np.savez_compressed(Path(folder) / "loralib.npz", **out)


if __name__ == "__main__":
    main(*sys.argv[1:])  # a folder and a seed; the stored numbers are of seed 0
