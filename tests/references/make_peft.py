"""Makes peft.npz: outputs of HF PEFT layers on random weights.

Run where torch and peft are installed (torch 2.13.0, peft 0.21.2 made the file here):

    python tests/references/make_peft.py
"""

from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]


class Net(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


LAYERS = {
    "linear": (lambda: torch.nn.Linear(6, 4), lambda: torch.randn(3, 6)),
    "embedding": (lambda: torch.nn.Embedding(7, 5), lambda: torch.randint(0, 7, (3, 4))),
    "conv": (lambda: torch.nn.Conv2d(3, 4, (2, 3), stride=2), lambda: torch.randn(2, 3, 6, 7)),
}
METHODS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def main():
    torch.manual_seed(0)
    out = {}
    for kind, (make, sample) in LAYERS.items():
        for method, options in METHODS.items():
            config = LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], **options)
            model = get_peft_model(Net(make()), config).eval()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "lora_" in name and "magnitude" not in name:
                        p.copy_(torch.randn_like(p))
                    elif "magnitude" in name:
                        p.mul_(1 + 0.3 * torch.rand_like(p))
                x = sample()
                y = model(x)
            key = f"{kind}/{method}/"
            out |= {key + "x": x.numpy(), key + "y": y.numpy()}
            for name, p in model.named_parameters():
                short = name.replace(".default", "").rsplit("layer.", 1)[1]
                out[key + short.removesuffix(".weight")] = p.detach().numpy()
    np.savez_compressed(Path(__file__).with_name("peft.npz"), **out)


if __name__ == "__main__":
    main()
