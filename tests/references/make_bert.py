"""Write the reference numbers of tests/models/test_bert.py with torch and transformers.

Run from the repository's root, in an environment with torch, transformers and safetensors (made
with torch 2.13.0+cpu and transformers 5.23.0):

    python tests/references/make_bert.py FOLDER_OF_MINILM

FOLDER_OF_MINILM is what `jaxlora.fetch.fetch("minilm")` returns. Each tiny model is one npz:
`config` (config.json as text), `head`, `weights/…`, `inputs/…`, `outputs/…`.
"""

# torch is not among the project's dependencies.
# pyright: reportMissingImports=false, reportCallIssue=false

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
TINY = {
    "bert_gelu": (
        BertForSequenceClassification,
        {"num_hidden_layers": 2, "num_attention_heads": 2, "type_vocab_size": 2, "num_labels": 3},
    ),
    "bert_gelu_new": (
        BertForTokenClassification,
        {
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "type_vocab_size": 1,
            "num_labels": 5,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-2,
        },
    ),
    "bert_gelu_tanh": (
        BertForSequenceClassification,
        {
            "num_hidden_layers": 3,
            "num_attention_heads": 1,
            "type_vocab_size": 3,
            "num_labels": 1,
            "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "bert_relu": (
        BertModel,
        {
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "type_vocab_size": 2,
            "hidden_act": "relu",
        },
    ),
}
SENTENCES = [
    "A small boat crosses the quiet bay.",
    "The little ship sails over calm water.",
    "Quarterly revenue rose by 7.5% against 2019!",
    "No.",
    "Our café's naïve façade, re-opened on Thursdays, sells électronique toys & “games”.",
    "The second half of the concert, which nobody had rehearsed because the conductor was ill, "
    "turned out to be the part that the audience remembered for many years afterwards.",
]
POSITIONS = [0, 1, 3]


def embed(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Pool and normalise as sentence-transformers does."""
    weights = mask.unsqueeze(-1).float()
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(mean, p=2, dim=1)


def tiny(name: str, seed: int) -> None:
    """Draw a model with weights large enough that every term shows in its outputs."""
    kind, fields = TINY[name]
    generator = torch.Generator().manual_seed(seed)
    config = BertConfig(**SIZES, **fields, attn_implementation="eager")
    model = kind(config).eval()
    for key, weight in model.state_dict().items():
        scale = 1.0 if "embeddings" in key else 0.4
        center = 1.0 if key.endswith("LayerNorm.weight") else 0.0
        weight.copy_(center + scale * torch.randn(weight.shape, generator=generator))

    batch, seq = 3, 9
    inputs = {
        "input_ids": torch.randint(0, config.vocab_size, (batch, seq), generator=generator),
        "attention_mask": torch.ones(batch, seq, dtype=torch.long),
        "token_type_ids": torch.randint(
            0, config.type_vocab_size, (batch, seq), generator=generator
        ),
    }
    inputs["attention_mask"][1, 5:] = 0
    inputs["attention_mask"][2, 1:4] = 0
    if name == "bert_gelu_tanh":
        inputs["position_ids"] = torch.randint(0, 12, (batch, seq), generator=generator)
    with torch.no_grad():
        out = model(**inputs)
        if kind is BertModel:
            hidden = out.last_hidden_state
            outputs = {"hidden": hidden, "pooled": out.pooler_output}
            outputs["embedded"] = embed(hidden, inputs["attention_mask"])
        else:
            outputs = {"logits": out.logits}
    arrays = {f"weights/{k}": v.numpy() for k, v in model.state_dict().items()}
    arrays |= {f"inputs/{k}": v.numpy().astype(np.int32) for k, v in inputs.items()}
    arrays |= {f"outputs/{k}": v.numpy() for k, v in outputs.items()}
    fields = json.loads(config.to_json_string())
    arrays |= {"config": np.array(json.dumps(fields)), "head": np.array(kind.__name__)}
    np.savez_compressed(HERE / f"{name}.npz", **arrays)


def minilm(folder: Path) -> None:
    """Run the real weights on our own sentences."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, attn_implementation="eager").eval().float()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**batch)
    np.savez_compressed(
        HERE / "minilm.npz",
        sentences=np.array(SENTENCES),
        input_ids=batch["input_ids"].numpy().astype(np.int32),
        attention_mask=batch["attention_mask"].numpy().astype(np.int32),
        token_type_ids=batch["token_type_ids"].numpy().astype(np.int32),
        positions=np.array(POSITIONS),
        hidden=out.last_hidden_state[:, POSITIONS].numpy(),
        pooled=out.pooler_output.numpy(),
        embedded=embed(out.last_hidden_state, batch["attention_mask"]).numpy(),
    )


if __name__ == "__main__":
    for number, each in enumerate(TINY):
        tiny(each, seed=number)
    minilm(Path(sys.argv[1]))
