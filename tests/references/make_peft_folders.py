"""Makes peft_folders.npz: adapters that PEFT saved for small random models, and their logits.

Run where torch, transformers and peft are installed (2.13.0, 5.23.0 and 0.21.2 made the file here):

    python tests/references/make_peft_folders.py

Names are "<model>/base/<file>" and "<model>/<adapter>/<file>", the bytes of the files of
`save_pretrained`, and "<model>/inputs", "<model>/logits" and "<model>/<adapter>/logits".
"""

# torch is not among the project's dependencies.
# pyright: reportMissingImports=false

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

SMALL: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", SMALL),
    "roberta": ("RobertaForSequenceClassification", SMALL | {"pad_token_id": 1}),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        SMALL
        | {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 4,
            "conv_kernel_size": 3,
            "conv_act": "gelu",
            "type_vocab_size": 0,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 24, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
    ),
    "llama": ("LlamaForCausalLM", SMALL | {"num_key_value_heads": 1}),
    "llama_tied": ("LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}),
    "vit": (
        "ViTForImageClassification",
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 20,
            "image_size": 8,
            "patch_size": 4,
            "num_channels": 2,
        },
    ),
}
ENCODER = {"target_modules": ["query", "value"]}
ADAPTERS: dict[str, dict[str, dict[str, Any]]] = {
    "bert": {
        "lora": ENCODER,
        "head": {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        "dora": {"target_modules": "all-linear", "use_dora": True},
        "bias_all": {**ENCODER, "bias": "all", "modules_to_save": ["classifier"]},
        "layers": {
            "target_modules": ["dense"],
            "layers_to_transform": [1],
            "layers_pattern": "layer",
            "exclude_modules": ["attention.output.dense"],
        },
        "embedding": {"target_modules": ["word_embeddings", "position_embeddings"]},
        "dora_embedding": {"target_modules": ["word_embeddings", "key"], "use_dora": True},
    },
    "roberta": {
        "rslora": {
            **ENCODER,
            "use_rslora": True,
            "rank_pattern": {"value": 3, r"layer\.0\.attention\.self\.query": 1},
            "alpha_pattern": {"^roberta.encoder.layer.1.*query": 7},
            "task_type": "SEQ_CLS",
        },
        "bias_lora_only": {"target_modules": ["query", "out_proj"], "bias": "lora_only"},
    },
    "deberta": {
        "conv": {"target_modules": ["query_proj", "conv.conv", "word_embeddings"]},
        "dora_conv": {"target_modules": ["conv.conv", "dense"], "use_dora": True},
    },
    "gpt2": {
        "c_attn": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        "dora": {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True},
        "tied": {"target_modules": ["wte", "wpe", "lm_head"]},
        "tied_whole": {
            "target_modules": ["c_fc"],
            "modules_to_save": ["lm_head"],
            "ensure_weight_tying": True,
        },
        "tokens": {"target_modules": ["c_fc"], "trainable_token_indices": {"wte": [9, 2]}},
    },
    "llama": {
        "regex": {"target_modules": r".*self_attn\.(q|k)_proj|.*\.0\.mlp\.up_proj"},
        "all_linear": {"target_modules": "all-linear", "r": 4},
        "pissa": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"},
        "olora": {"target_modules": ["v_proj", "up_proj"], "init_lora_weights": "olora"},
        "converted": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"},
        "head": {"target_modules": ["lm_head", "embed_tokens"]},
        "tokens": {"target_modules": ["o_proj"], "trainable_token_indices": [3, 1, 20]},
        "bfloat16": {"target_modules": ["gate_proj"]},
    },
    "llama_tied": {
        "tied": {"target_modules": ["embed_tokens", "up_proj"], "ensure_weight_tying": True},
        "whole": {
            "target_modules": ["up_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        "tokens": {"target_modules": ["up_proj"], "trainable_token_indices": [3, 1, 20]},
    },
    "vit": {
        "conv": {"target_modules": ["projection"], "modules_to_save": ["classifier"]},
        "dora_conv": {"target_modules": ["projection"], "use_dora": True},
    },
}


def base_model(name: str) -> Any:
    kind, fields = MODELS[name]
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**fields)).eval()
    for p in model.parameters():  # away from zeros, ones and what hardly changes the logits
        p.data = 0.4 * torch.randn_like(p) + (p.data if p.ndim == 1 else 0)
    model.tie_weights()
    return model


def adapted(model: Any, options: dict[str, Any]) -> Any:
    """The model with an adapter whose trained leaves look trained."""
    model = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 3, **options})).eval()
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += (0.02 if options.get("init_lora_weights") else 0.3) * torch.randn_like(p)
            if "magnitude" in name:
                p.data.abs_()
    parts = dict(model.named_parameters())
    for a, b in (("A", "B"), ("B", "A")):  # what a head shares with its table is one
        head, table = f"lm_head.lora_{a}.", f"wte.lora_embedding_{b}."
        for name, p in parts.items():
            if head in name:
                for other, q in parts.items():
                    if table in other:
                        p.data = q.data.T.clone()
    return model


def files(folder: Path) -> dict[str, np.ndarray]:
    return {
        path.name: np.frombuffer(path.read_bytes(), np.uint8)
        for path in folder.iterdir()
        if path.suffix in (".json", ".safetensors") and path.name != "generation_config.json"
    }


def case(base: Path, kind: str, method: str, options: dict[str, Any], ids: Any) -> dict[str, Any]:
    cls = getattr(transformers, kind)
    model = adapted(cls.from_pretrained(base).eval(), options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        given: dict[str, Any] = {"save_embedding_layers": method == "head"}
        if method == "converted":
            start = get_peft_model(
                cls.from_pretrained(base), LoraConfig(**{"r": 2, "lora_alpha": 3, **options})
            )
            start.peft_config["default"].init_lora_weights = True
            start.save_pretrained(folder / "start")
            given["path_initial_model_for_weight_conversion"] = str(folder / "start")
        if method == "bfloat16":
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.data = p.data.bfloat16().to(p.dtype)
        with torch.no_grad():
            logits = model(ids).logits.numpy()
        if method == "bfloat16":
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.data = p.data.bfloat16()
        model.save_pretrained(folder / "out", **given)
        again = PeftModel.from_pretrained(cls.from_pretrained(base), folder / "out").eval()
        with torch.no_grad():
            np.testing.assert_allclose(again(ids).logits.numpy(), logits, atol=1e-4)
        return files(folder / "out") | {"logits": logits}


def main(folder: str | Path = Path(__file__).parent, seed: str | int = 0) -> None:
    """Make the file, in a folder, from a seed."""
    warnings.simplefilter("ignore")
    torch.manual_seed(int(seed))
    out: dict[str, np.ndarray] = {}
    for name, (kind, _) in MODELS.items():
        ids = torch.randn(2, 2, 8, 8) if name == "vit" else torch.randint(2, 24, (2, 5))
        with tempfile.TemporaryDirectory() as temporary:
            base = Path(temporary)
            model = base_model(name)
            model.save_pretrained(base)
            with torch.no_grad():
                logits = model(ids).logits.numpy()
            found = {"base": files(base)} | {
                method: case(base, kind, method, options, ids)
                for method, options in ADAPTERS[name].items()
            }
        out |= {f"{name}/inputs": ids.numpy(), f"{name}/logits": logits}
        for method, parts in found.items():
            out |= {f"{name}/{method}/{file}": x for file, x in parts.items()}
            print(name, method, sum(x.nbytes for x in parts.values()))
    np.savez_compressed(Path(folder) / "peft_folders.npz", allow_pickle=False, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
