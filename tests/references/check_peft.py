"""Check that torch's PEFT loads what `jaxlora.interop.peft.save` writes, with the same outputs.

Two steps, in the project's environment and in one with torch, transformers and peft:

    python tests/references/check_peft.py write FOLDER
    python tests/references/check_peft.py check FOLDER

The first saves adapters of random values for the models of make_peft_folders.py, unrolled and
scanned, with our logits beside them. The second loads each into torch's model and fails on missing
or unexpected tensors and on other logits. `make test-interop` does both.
"""

# torch is not among the project's dependencies.
# pyright: reportMissingImports=false

import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
QV, ALL = "query|value", "all-linear"
HEAD = "classifier"
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "bert": {
        "lora": {"targets": QV},
        "dora": {"targets": ALL, "exclude": HEAD, "dora": True, "modules_to_save": HEAD},
        "pissa": {"targets": "query|up", "init": "pissa"},
        "bias_all": {"targets": QV, "bias": "all"},
        "bias_and_head": {"targets": QV, "bias": "lora_only", "modules_to_save": HEAD},
        "layers": {"targets": "down", "layers": [1]},
        "embedding": {"targets": "word|token_type"},
        "dora_embedding": {"targets": "word|query", "dora": True},
        "norms": {"targets": QV, "modules_to_save": "norm"},
        "vllm": {"targets": QV, "rank_pattern": {"query": 1}, "alpha_pattern": {"value": 5}},
    },
    "roberta": {
        "rslora": {"targets": QV, "rslora": True, "rank_pattern": {"value": 3}},
        "head": {"targets": QV, "modules_to_save": HEAD, "alpha_pattern": {"query": 7.5}},
        "freeze_a": {"targets": ALL, "freeze_a": True},
        "fused": {"targets": "query|up", "fused": {"up": (True, False, False, True)}},
    },
    "deberta": {
        "conv": {"targets": "conv|query"},
        "dora": {"targets": "conv|up", "dora": True},
        "olora": {"targets": "value", "init": "olora"},
    },
    "gpt2": {
        "c_attn": {"targets": "c_attn"},
        "fused": {"targets": "c_attn", "fused": {"c_attn": (True, False, True)}},
        "dora": {"targets": ALL, "dora": True},
        "tied": {"targets": "wte|wpe|mlp/c_proj"},
        "whole": {"targets": "c_fc", "modules_to_save": "wte"},
        "rows": {"targets": "c_fc", "token_rows": {"wte": [2, 9]}},
        "pissa_rslora": {"targets": "c_fc", "init": "pissa", "rslora": True},
    },
    "llama": {
        "lora": {"targets": "q_proj|down_proj", "dropout": 0.1},
        "all_linear": {"targets": ALL},
        "embedding": {"targets": "embed_tokens|lm_head"},
        "head": {"targets": "v_proj", "modules_to_save": "lm_head"},
        "rows": {"targets": "v_proj", "token_rows": {"embed_tokens": [0, 7, 23]}},
        "vllm": {"targets": ALL, "rslora": True, "rank_pattern": {"q_proj": 5}},
        "sglang": {"targets": "v_proj|up_proj", "init": "pissa"},
    },
    "llama_tied": {
        "tied": {"targets": "embed_tokens|up_proj"},
        "whole": {"targets": "up_proj", "modules_to_save": "embed_tokens"},
        "rows": {"targets": "up_proj", "token_rows": {"embed_tokens": [20, 3]}},
    },
    "vit": {
        "conv": {"targets": "patches"},
        "dora_conv": {"targets": "patches", "dora": True, "modules_to_save": HEAD},
    },
}
"""Our configs by model; one that is named for a profile is saved with it."""


def write(to: Path) -> None:
    """Save each config's adapter, and the bases."""
    import jax
    import jax.numpy as jnp

    import jaxlora as jl
    from jaxlora import models
    from jaxlora.interop import peft

    rng = np.random.default_rng(0)
    with np.load(HERE / "peft_folders.npz") as file:
        stored = {name: file[name] for name in file.files}
    for name, configs in CONFIGS.items():
        folder = to / name
        folder.mkdir()
        for key, x in stored.items():
            if key.startswith(f"{name}/base/") and x.dtype == np.uint8:
                (folder / key.rpartition("/")[2]).write_bytes(x.tobytes())
        ids = stored[f"{name}/inputs"]
        np.save(folder / "inputs.npy", ids)
        ids = np.moveaxis(ids, 1, -1) if name == "vit" else ids
        for scan in (False, True):
            model, params, _ = models.from_pretrained(folder, scan_layers=scan)
            for method, options in configs.items():
                if scan and "layers" in options:
                    continue
                config = jl.LoraConfig(**{"rank": 2, "alpha": 3, **options})
                adapter = jl.lora_init(
                    jax.random.key(0), model, {"params": params}, config, jnp.asarray(ids)
                )
                size = 0.05 if "init" in options else 0.3
                moved = jax.tree.map(
                    lambda x, size=size: x + size * rng.normal(size=x.shape).astype(x.dtype),
                    adapter.params,
                )
                adapter = dataclasses.replace(adapter, params=moved)
                profile = method if method in peft.PROFILES else None
                out = folder / f"{method}{'-scanned' if scan else ''}"
                peft.save(out, adapter, model, profile=profile)
                logits = jl.lora_apply(model, {"params": params}, adapter, jnp.asarray(ids))
                plain = model.apply({"params": params}, jnp.asarray(ids))
                assert np.abs(np.asarray(logits) - np.asarray(plain)).max() > 1e-2, (name, method)
                np.save(out / "logits.npy", logits)


def check(folder: Path) -> None:
    """Load each adapter with torch and compare."""
    import torch
    import transformers
    from peft import PeftModel

    warnings.simplefilter("ignore")
    worst = 0.0
    for path in sorted(folder.glob("*/*/logits.npy")):
        base, adapter = path.parent.parent, path.parent
        kind = json.loads((base / "config.json").read_text())["architectures"][0]
        model = getattr(transformers, kind).from_pretrained(base).eval()
        model = PeftModel.from_pretrained(model, adapter).eval()
        found = model.load_adapter(adapter, "default")  # once more, for what it reports
        missing = [key for key in found.missing_keys if "default" in key]
        stray = found.unexpected_keys
        with torch.no_grad():
            logits = model(torch.from_numpy(np.load(base / "inputs.npy"))).logits.numpy()
        difference = float(np.abs(logits - np.load(path)).max())
        worst = max(worst, difference)
        print(f"{base.name:12} {adapter.name:24} {difference:.1e}", *stray, *missing)
        if stray or missing:
            worst = np.inf
    if not worst < 1e-4:
        raise SystemExit(f"The largest difference is {worst}, expected less than 1e-4.")


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
