"""Makes loralib_*.pt, torch_kinds.pt and loralib_files.npz: files that torch.save wrote.

Run where torch, transformers and loralib are installed (torch 2.13.0, transformers 5.23.0 and
loralib 0.1.2 made the files here), after make_models.py:

    python tests/references/make_loralib_files.py

torch_kinds.pt has a tensor of every kind, and its values are those of `arange`. The others are what
loralib's `lora_state_dict` gives, with the head where there is one: of the GPT-2 and the RoBERTa of
gpt2.npz and roberta.npz, in the form that loralib's authors published, and of a small net.
loralib_files.npz has the net's base weights and the outputs of all three.
"""

# torch is not among the project's dependencies.
# pyright: reportMissingImports=false

import json
import sys
from pathlib import Path

import loralib
import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
RANK, ALPHA = 2, 3


def kinds():
    """A tensor of every dtype, and tensors that lie in their storage in every way."""
    names = (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool uint16 float8_e4m3fn"
    )
    dtypes = {name: torch.arange(3.0).to(getattr(torch, name)) for name in names.split()}
    whole = torch.arange(24.0).reshape(4, 6)
    return {
        "dtypes": dtypes,
        "whole": whole,
        "turned": whole.T,
        "part": whole[1:3, ::2],
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.arange(2.0)),
        "state": torch.nn.Linear(2, 1).state_dict(),
        "rest": {"step": 7, "big": 2**40, "rate": 0.5, "none": None, "words": ["a", (True, False)]},
        "size": whole.shape,
    }


def drawn(module):
    """Fills the factors, of which one is zero at the start, and what else is trained."""
    for name, p in module.named_parameters():
        if "lora_" in name or name.startswith("classifier") or name == "out.bias":
            torch.nn.init.normal_(p, std=0.3)


def model_of(family):
    """The model that make_models.py stored, and its input ids."""
    with np.load(HERE / f"{family}.npz") as file:
        parts = {k.removeprefix(f"{family}/"): file[k] for k in file.files}
    config = transformers.AutoConfig.for_model(**json.loads(str(parts["config"])))
    model = getattr(transformers, str(parts["class"]))(config)
    weights = "weights/"
    state = {k.removeprefix(weights): v for k, v in parts.items() if k.startswith(weights)}
    state = {k: torch.tensor(v.astype(np.float32)) for k, v in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model.eval(), torch.arange(3, 17).reshape(2, 7)


def swapped(old, new):
    new.weight.data, new.bias.data = old.weight.data, old.bias.data
    return new


def gpt2():
    model, ids = model_of("gpt2")
    options = {"r": RANK, "lora_alpha": ALPHA, "merge_weights": False, "fan_in_fan_out": True}
    for block in model.transformer.h:
        old = block.attn.c_attn
        new = loralib.MergedLinear(16, 48, enable_lora=[True, False, True], **options)
        block.attn.c_attn = swapped(old, new)
    return model, ids


def roberta():
    model, ids = model_of("roberta")
    for layer in model.roberta.encoder.layer:
        attention = layer.attention.self
        for name in ("query", "value"):
            new = loralib.Linear(16, 16, r=RANK, lora_alpha=ALPHA, merge_weights=False)
            setattr(attention, name, swapped(getattr(attention, name), new))
    return model, ids


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        options = {"r": RANK, "lora_alpha": ALPHA, "merge_weights": False}
        self.embed = loralib.Embedding(7, 5, **options)
        self.wide = loralib.Conv2d(5, 6, 3, padding=1, **options)
        self.grouped = loralib.Conv2d(6, 4, 3, groups=2, padding=1, **options)
        self.point = loralib.Conv2d(4, 6, 1, **options)
        self.out = loralib.Linear(6, 3, **options)

    def forward(self, ids):  # (batch, height, width)
        x = self.embed(ids).permute(0, 3, 1, 2)
        x = torch.tanh(self.point(torch.tanh(self.grouped(torch.tanh(self.wide(x))))))
        return self.out(x.permute(0, 2, 3, 1))


def net():
    model = Net()
    model.load_state_dict({"out.bias": torch.zeros(3)}, strict=False)
    return model, torch.arange(24).reshape(2, 3, 4) % 7


def published(family, model):
    """What is saved of a trained model: a wrapped dict, one with a head, one with biases."""
    if family == "net":
        return loralib.lora_state_dict(model, bias="lora_only")
    state = loralib.lora_state_dict(model)
    if family == "gpt2":
        return {"model_state_dict": {f"module.{k}": v for k, v in state.items()}}
    return state | {k: v for k, v in model.state_dict().items() if k.startswith("classifier")}


MODELS = {"gpt2": gpt2, "roberta": roberta, "net": net}


def main(folder: str | Path = HERE, seed: str | int = 0):
    torch.manual_seed(int(seed))
    folder, numbers = Path(folder), {}
    torch.save(kinds(), folder / "torch_kinds.pt")
    for family, make in MODELS.items():
        model, ids = make()
        if family == "net":
            base = {k: v.numpy().copy() for k, v in model.state_dict().items() if "lora_" not in k}
            numbers |= {f"net/base/{k}": x for k, x in base.items()}
        drawn(model)
        torch.save(published(family, model), folder / f"loralib_{family}.pt")
        outputs = model(ids)
        numbers[f"{family}/outputs"] = getattr(outputs, "logits", outputs).detach().numpy()
    np.savez_compressed(folder / "loralib_files.npz", **numbers)


if __name__ == "__main__":
    main(*sys.argv[1:])  # a folder and a seed; the stored files are of seed 0
