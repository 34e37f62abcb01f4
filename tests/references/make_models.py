"""Write the reference numbers of tests/models/test_models.py with torch and transformers.

Run from the repository's root, in an environment with torch and transformers (made with torch
2.13.0+cpu and transformers 5.23.0):

    python tests/references/make_models.py [FAMILY …]

Each family is one npz. Of each of its models it holds `NAME/config` (config.json as text),
`NAME/class`, `NAME/weights/…` as save_pretrained writes them (in float16, which they are drawn to
fit), `NAME/inputs/…` and `NAME/outputs/…`. Weights are large enough that every one of them shows in
the outputs, which is checked.
"""

# torch is not among the project's dependencies.
# pyright: reportMissingImports=false

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

HERE = Path(__file__).parent
BATCH, SEQ = 3, 7
TEXT = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 29, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 4}
GPT2 |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DEBERTA = TEXT | {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}
VIT = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FAMILIES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "llama": {
        "llama_linear": (
            "LlamaForCausalLM",
            TEXT
            | {"num_key_value_heads": 2, "head_dim": 6, "attention_bias": True, "mlp_bias": True}
            | {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 100.0}},
        ),
        "llama_llama3": (
            "LlamaForCausalLM",
            TEXT
            | {"tie_word_embeddings": True, "rms_norm_eps": 0.1, "hidden_act": "gelu_pytorch_tanh"}
            | {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 50.0,
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 3.0,
                    "original_max_position_embeddings": 8,
                }
            },
        ),
        "llama_classification": ("LlamaForSequenceClassification", TEXT | {"num_labels": 3}),
        "llama_none": ("LlamaModel", TEXT | {"num_attention_heads": 2, "num_key_value_heads": 1}),
        "mistral": (
            "MistralForCausalLM",
            TEXT | {"num_key_value_heads": 1, "sliding_window": 3, "tie_word_embeddings": True},
        ),
        "qwen2": (
            "Qwen2ForCausalLM",
            TEXT | {"num_key_value_heads": 2, "tie_word_embeddings": True},
        ),
        "qwen2_window": (
            "Qwen2ForSequenceClassification",
            TEXT
            | {"num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 2}
            | {"max_window_layers": 0, "num_labels": 1},
        ),
        "qwen3": (
            "Qwen3ForCausalLM",
            TEXT | {"num_key_value_heads": 2, "head_dim": 6, "attention_bias": True},
        ),
    },
    "gpt2": {
        "gpt2": ("GPT2LMHeadModel", GPT2),
        "gpt2_untied": (
            "GPT2LMHeadModel",
            GPT2
            | {"n_head": 2, "n_inner": 20, "activation_function": "relu", "n_layer": 3}
            | {"scale_attn_weights": False, "tie_word_embeddings": False}
            | {"layer_norm_epsilon": 0.1},
        ),
        "gpt2_classification": (
            "GPT2ForSequenceClassification",
            GPT2 | {"num_labels": 3, "activation_function": "gelu", "n_inner": 8},
        ),
        "gpt2_none": ("GPT2Model", GPT2 | {"n_layer": 1, "n_head": 1, "n_inner": 8}),
    },
    "roberta": {
        "roberta": (
            "RobertaForSequenceClassification",
            TEXT | {"pad_token_id": 1, "type_vocab_size": 1, "num_labels": 3},
        ),
        "roberta_token": (
            "RobertaForTokenClassification",
            TEXT | {"pad_token_id": 2, "type_vocab_size": 2, "num_labels": 2, "hidden_act": "relu"},
        ),
        "xlm_roberta": (
            "XLMRobertaModel",
            TEXT | {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 0.1},
        ),
        "camembert": (
            "CamembertForSequenceClassification",
            TEXT | {"type_vocab_size": 1, "num_labels": 1, "num_hidden_layers": 1},
        ),
    },
    "deberta": {
        "deberta_v3": (
            "DebertaV2ForSequenceClassification",
            DEBERTA | {"position_buckets": 4, "max_relative_positions": 6, "num_labels": 3},
        ),
        "deberta_xxl": (
            "DebertaV2ForSequenceClassification",
            DEBERTA
            | {"position_buckets": 4, "conv_kernel_size": 3, "conv_act": "gelu", "num_labels": 2}
            | {"pooler_hidden_act": "tanh"},
        ),
        "deberta_unshared": (
            "DebertaV2ForTokenClassification",
            DEBERTA
            | {"share_att_key": False, "norm_rel_ebd": "none", "position_biased_input": True}
            | {"embedding_size": 12, "type_vocab_size": 2, "max_relative_positions": 3}
            | {"num_labels": 2, "hidden_act": "relu"},
        ),
        "deberta_c2p": (
            "DebertaV2Model",
            DEBERTA
            | {"share_att_key": False, "pos_att_type": ["c2p"], "norm_rel_ebd": "none"}
            | {"conv_kernel_size": 5},
        ),
        "deberta_p2c": (
            "DebertaV2ForTokenClassification",
            DEBERTA | {"pos_att_type": "p2c", "num_labels": 3, "layer_norm_eps": 0.1},
        ),
        "deberta_absolute": (
            "DebertaV2Model",
            TEXT | {"type_vocab_size": 2, "num_attention_heads": 2, "num_hidden_layers": 1},
        ),
    },
    "vit": {
        "vit": (
            "ViTForImageClassification",
            VIT | {"image_size": 8, "patch_size": 4, "num_labels": 3},
        ),
        "vit_none": (
            "ViTModel",
            VIT
            | {"image_size": [9, 6], "patch_size": [4, 2], "num_channels": 2, "qkv_bias": False}
            | {"pooler_output_size": 6, "pooler_act": "relu", "hidden_act": "gelu_pytorch_tanh"}
            | {"layer_norm_eps": 0.1, "num_attention_heads": 2},
        ),
    },
}
NO_EFFECT = r"(key|k_proj|key_proj)\.bias$"
"""A key's bias adds the same to all scores of a query: the softmax takes it away again."""


def draw(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws all params anew; what float16 cannot hold is left out."""
    for name, weight in model.named_parameters():
        scale = 1.0 if re.search("embed|wte|wpe", name) else 0.4
        center = 1.0 if weight.dim() == 1 and name.endswith("weight") else 0.0
        drawn = center + scale * torch.randn(weight.shape, generator=generator)
        weight.data.copy_(drawn.half().float())


def text_inputs(config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A full row, one padded on the right, one on the left; only padding is the padding token."""
    mask = torch.ones(BATCH, SEQ, dtype=torch.long)
    mask[1, 5:] = 0
    mask[2, :3] = 0
    pad = config.pad_token_id
    ids = torch.randint(pad + 1, config.vocab_size, (BATCH, SEQ), generator=generator)
    inputs = {"input_ids": torch.where(mask > 0, ids, pad), "attention_mask": mask}
    if (types := getattr(config, "type_vocab_size", 0)) > 1:
        inputs["token_type_ids"] = torch.randint(0, types, (BATCH, SEQ), generator=generator)
    return inputs


def image_inputs(config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Two images, channels first."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (2, config.num_channels, height, width)
    return {"pixel_values": torch.randn(shape, generator=generator).half().float()}


def run(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's outputs, zero at padding. Causal models count positions without padding."""
    given = dict(inputs)
    mask = inputs.get("attention_mask")
    if model.config.model_type in CAUSAL and "position_ids" not in inputs and mask is not None:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(**given)
    outputs = {k: out[k] for k in ("logits", "last_hidden_state", "pooler_output") if k in out}
    for name, array in outputs.items():
        if mask is not None and array.dim() == 3:
            outputs[name] = array * mask[..., None]
    return outputs


CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gpt2")


def check_that_all_weights_show(model: Any, inputs: dict[str, torch.Tensor], name: str) -> None:
    """Fails if a tensor could be read wrongly without a difference in the outputs."""
    before = run(model, inputs)
    for key, weight in model.named_parameters():
        kept = weight.data.clone()
        weight.data.add_(0.1 * torch.randn(weight.shape))
        after = run(model, inputs)
        weight.data.copy_(kept)
        moved = max(float((before[k] - after[k]).abs().max()) for k in before)
        if moved < 1e-3 and not re.search(NO_EFFECT, key):
            raise SystemExit(f"{name}: {key} moves the outputs by {moved} only.")


def make(family: str, name: str, kind: str, fields: dict[str, Any], seed: int) -> dict[str, Any]:
    """The arrays of one model."""
    generator = torch.Generator().manual_seed(seed)
    cls = getattr(transformers, kind)
    config = cls.config_class(**fields, attn_implementation="eager")
    model = cls(config).eval()
    draw(model, generator)
    inputs = (image_inputs if family == "vit" else text_inputs)(config, generator)
    check_that_all_weights_show(model, inputs, name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(f"{folder}/model.safetensors")
        config_json = json.loads(Path(folder, "config.json").read_text())
    arrays: dict[str, Any] = {f"weights/{k}": v.astype(np.float16) for k, v in weights.items()}
    arrays |= {f"inputs/{k}": as_input(v.numpy()) for k, v in inputs.items()}
    arrays |= {f"outputs/{k}": v.numpy() for k, v in run(model, inputs).items()}
    arrays |= {"config": np.array(json.dumps(config_json)), "class": np.array(kind)}
    return {f"{name}/{part}": array for part, array in arrays.items()}


def as_input(array: np.ndarray) -> np.ndarray:
    """Integers need no more than int8 here; images are in float16, channels last."""
    if array.dtype.kind == "i":
        return array.astype(np.int8)
    return array.astype(np.float16).transpose(0, 2, 3, 1)


if __name__ == "__main__":
    for family in sys.argv[1:] or FAMILIES:
        arrays: dict[str, Any] = {}
        for number, (each, (kind, fields)) in enumerate(FAMILIES[family].items()):
            arrays |= make(family, each, kind, fields, seed=number)
        np.savez_compressed(HERE / f"{family}.npz", **arrays)
