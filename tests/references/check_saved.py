"""Check that torch's transformers loads what `save_pretrained` writes, with the same outputs.

Two steps, in the project's environment and in one with torch and transformers:

    python tests/references/check_saved.py write FOLDER
    python tests/references/check_saved.py check FOLDER

The first loads all references of make_models.py, with scanned layers, and saves each as a model
folder of ours, with inputs and torch's outputs beside it. The second loads each folder with its
Auto class and fails on missing or unexpected tensors and on other outputs. `make test-interop` does
both.
"""

# torch is not among the project's dependencies.
# pyright: reportMissingImports=false

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
FAMILIES = ("llama", "gpt2", "roberta", "deberta", "vit")
AUTO = {
    "ForCausalLM": ("lm", "AutoModelForCausalLM"),
    "LMHeadModel": ("lm", "AutoModelForCausalLM"),
    "ForSequenceClassification": ("classification", "AutoModelForSequenceClassification"),
    "ForImageClassification": ("classification", "AutoModelForImageClassification"),
    "ForTokenClassification": ("token", "AutoModelForTokenClassification"),
    "Model": ("none", "AutoModel"),
}
"""How torch's class names end: our head, and torch's Auto class."""


def auto(kind: str) -> tuple[str, str]:
    """Our head and torch's Auto class for a class of torch's."""
    return next(found for end, found in AUTO.items() if kind.endswith(end))


def write(to: Path) -> None:
    """Load each reference and save it anew."""
    from safetensors.numpy import save_file

    from jaxlora import models

    for family in FAMILIES:
        with np.load(HERE / f"{family}.npz") as file:
            arrays = {name: file[name] for name in file.files}
        for name in [key.removesuffix("/config") for key in arrays if key.endswith("/config")]:
            parts = {
                key.removeprefix(f"{name}/"): array
                for key, array in arrays.items()
                if key.startswith(f"{name}/")
            }
            with tempfile.TemporaryDirectory() as folder:
                state = {
                    key.removeprefix("weights/"): array.astype(np.float32)
                    for key, array in parts.items()
                    if key.startswith("weights/")
                }
                save_file(state, Path(folder, "model.safetensors"))
                Path(folder, "config.json").write_text(str(parts["config"]))
                head = auto(str(parts["class"]))[0]
                model, params, _ = models.from_pretrained(folder, head=head, scan_layers=True)
            models.save_pretrained(to / name, model, params)
            given = {
                key.replace("/", "-"): array
                for key, array in parts.items()
                if key.startswith(("inputs/", "outputs/"))
            }
            np.savez(to / f"{name}.npz", **given)


def check(folder: Path) -> None:
    """Load each folder with torch and compare."""
    import torch
    import transformers

    worst = 0.0
    for path in sorted(folder.glob("*.npz")):
        name = path.stem
        kind = json.loads((folder / name / "config.json").read_text())["architectures"][0]
        cls = getattr(transformers, auto(kind)[1])
        model, info = cls.from_pretrained(folder / name, output_loading_info=True)
        problems = {key: found for key, found in info.items() if found}
        if problems or type(model).__name__ != kind:
            raise SystemExit(f"{name}: loaded as {type(model).__name__}, with {problems}.")
        with np.load(path) as file:
            given = {key: file[key] for key in file.files}
        inputs: dict[str, Any] = {}
        for key, array in given.items():
            if key.startswith("inputs-"):
                array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
                inputs[key.removeprefix("inputs-")] = torch.from_numpy(array)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].permute(0, 3, 1, 2)
        mask = inputs.get("attention_mask")
        if mask is not None and model.config.model_type in CAUSAL:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
            model.config.pad_token_id = 0  # a model folder without a tokenizer has none
        with torch.no_grad():
            out = model(**inputs)
        for key, array in given.items():
            if key.startswith("outputs-"):
                got = out[key.removeprefix("outputs-")].numpy()
                if mask is not None and got.ndim == 3:
                    got = got * mask.numpy()[..., None]
                difference = float(np.abs(got - array).max())
                worst = max(worst, difference)
                print(f"{name:22} {key.removeprefix('outputs-'):18} {difference:.1e}")
    if not worst < 1e-4:
        raise SystemExit(f"The largest difference is {worst}, expected less than 1e-4.")


CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gpt2")


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
