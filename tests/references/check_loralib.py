"""Check that torch and loralib load the files that `interop.loralib.save` writes.

Two steps, in the project's environment and in one with torch, transformers and loralib:

    python tests/references/check_loralib.py write FOLDER
    python tests/references/check_loralib.py check FOLDER

The first saves an adapter of each model of make_loralib_files.py, with our outputs beside it. The
second loads the file with `weights_only=True` into a model of loralib's layers, and fails on
missing or unexpected factors and on other outputs.
"""

# torch is not among the project's dependencies.
# pyright: reportMissingImports=false

import sys
from pathlib import Path
from typing import Any

import numpy as np


def write(folder: Path) -> None:
    """Save adapters and outputs."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import jax

    import jaxlora as jl
    from jaxlora.interop import loralib
    from tests import test_interop_loralib as ours

    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "gpt2": (ours.read_model(folder, "gpt2"), {"targets": "c_attn", "fused": ours.QV}),
        "roberta": (
            ours.read_model(folder, "roberta"),
            {"targets": ("query", "value"), "modules_to_save": "classifier"},
        ),
        "net": (ours.net(), {"targets": ("embed", "wide", "point", "out"), "bias": "lora_only"}),
    }
    for family, ((model, variables), options) in cases.items():
        inputs = ours.GRID if family == "net" else ours.IDS
        if family == "net":  # groups have no form there
            options |= {"exclude": "grouped"}
        adapter = ours.made(model, variables, inputs, **options)
        adapter = jax.tree.map(lambda x: 0.3 * x, adapter)
        names = ours.NET if family == "net" else None
        loralib.save(folder / f"{family}.pt", adapter, model, names)
        outputs = jl.lora_apply(model, variables, adapter, inputs)
        np.save(folder / f"{family}.npy", np.asarray(outputs))


def check(folder: Path) -> None:
    """Load each file with torch and compare."""
    import make_loralib_files as theirs
    import torch

    worst = 0.0
    for family, make in theirs.MODELS.items():
        model, ids = make()
        if family == "net":
            with np.load(theirs.HERE / "loralib_files.npz") as file:
                base = {k: torch.tensor(file[k]) for k in file.files if k.startswith("net/base/")}
            base = {k.removeprefix("net/base/"): x for k, x in base.items()}
            model.load_state_dict(base, strict=False)
        state = torch.load(folder / f"{family}.pt", weights_only=True)
        missing, unexpected = model.load_state_dict(state, strict=False)
        missing = [k for k in missing if "lora_" in k and not k.startswith("grouped")]
        if missing or unexpected or len(state) < 4:
            raise SystemExit(f"{family}: missing {missing}, unexpected {unexpected}.")
        with torch.no_grad():
            outputs = model(ids)
        got = getattr(outputs, "logits", outputs).numpy()
        difference = float(np.abs(got - np.load(folder / f"{family}.npy")).max())
        worst = max(worst, difference)
        print(f"{family:22} {difference:.1e}")
    if not worst < 1e-4:
        raise SystemExit(f"The largest difference is {worst}, expected less than 1e-4.")


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
