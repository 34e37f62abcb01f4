"""Write the reference tokens of tests/test_generate.py with torch and transformers.

Run from the repository's root, in an environment with torch, transformers and gguf (made with torch
2.13.0+cpu and transformers 5.23.0):

    python tests/references/make_generate.py FOLDER_OF_SMOLLM2

FOLDER_OF_SMOLLM2 is what `jaxlora.fetch.fetch("smollm2")` returns. `generate_tiny.npz`: `config`
(config.json as text), `weights/…`, `prompts` and `mask` (3 rows, padded on the left), and for each
case its `options` (as text), `tokens` (all sequences of each row, best first, -1 after their end)
and `scores`; `logits`, and what each warper keeps of them. `generate_smollm2.npz`: `texts`, and
`prompts` and `tokens`, -1 after their end; `gaps` between the two likeliest logits of each step.
"""

# torch is not among the project's dependencies.
# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
ROWS = [[5, 9, 2, 30, 11], [7], [36, 1, 12, 12, 8, 20, 3, 25, 4]]
NEW = 12
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "greedy_eos": {"num_beams": 1, "eos_token_id": [3, 18, 28]},
    "greedy_penalty": {"num_beams": 1, "repetition_penalty": 1.8},
    "beams4": {"num_beams": 4, "length_penalty": 0.9},
    "beams10": {"num_beams": 10, "length_penalty": 0.9},
    "beams4_long": {"num_beams": 4, "length_penalty": 2.0},
    "beams10_long": {"num_beams": 10, "length_penalty": 2.0},
    "beams4_short": {"num_beams": 4, "length_penalty": -1.0},
    "beams3_eos": {"num_beams": 3, "length_penalty": 1.0, "eos_token_id": [3, 18, 28]},
    "beams4_none": {"num_beams": 4, "length_penalty": 0.9, "eos_token_id": None},
    "beams4_penalty": {"num_beams": 4, "length_penalty": 0.9, "repetition_penalty": 1.8},
}
EOS = 3
WARPERS = {
    "temperature": [TemperatureLogitsWarper(0.7)],
    "top_k": [TopKLogitsWarper(5)],
    "top_p": [TopPLogitsWarper(0.8)],
    "min_p": [MinPLogitsWarper(0.1)],
    "all": [
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(1.5),
        TopKLogitsWarper(12),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.05),
    ],
}
CHATS = [
    "What is the capital of France?",
    "Explain photosynthesis to a child in two sentences.",
    "Give me three names for a small bakery.",
    "How do I boil an egg?",
    "Translate 'good morning' into Spanish.",
    "Write a haiku about the sea.",
    "Is 91 a prime number? Say why.",
    "Summarize: The meeting moved from Tuesday to Thursday because the room was taken.",
]
PLAIN = [
    "Once upon a time, in a village by the river,",
    "The three most important inventions of the nineteenth century were",
    "To change a bicycle tire, first",
    "Dear Sir or Madam,\n\nI am writing to",
    "The weather in London is often",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\n# mean of each row\n",
    "SELECT name, age FROM people WHERE",
    "for (int i = 0; i < n; i++) {\n",
    "1, 2, 4, 8, 16,",
    "12 + 30 = 42\n7 + 8 = 15\n21 + 9 =",
    "Ünïcödé, naïve café, 東京:",
]


def tiny() -> None:
    """Draw a model whose distributions are neither flat nor certain, and run every case."""
    generator = torch.Generator().manual_seed(4)
    config = LlamaConfig(**SIZES, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    for key, weight in model.state_dict().items():
        center = 1.0 if "norm" in key else 0.0
        scale = 1.0 if "embed" in key else 0.2 if "norm" in key or "lm_head" in key else 0.4
        weight.copy_(center + scale * torch.randn(weight.shape, generator=generator))
    width = max(map(len, ROWS))
    prompts = torch.tensor([[0] * (width - len(row)) + row for row in ROWS])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ROWS])
    arrays = {f"weights/{k}": v.numpy() for k, v in model.state_dict().items()}
    arrays |= {"config": np.array(config.to_json_string()), "prompts": prompts.numpy()}
    arrays |= {"mask": mask.numpy()}
    for name, options in CASES.items():
        tokens, scores = [], []
        for row in range(len(ROWS)):  # alone, so that no padding is penalized
            keep = mask[row] != 0
            found = run(model, prompts[row : row + 1, keep], mask[row : row + 1, keep], options)
            tokens.append(found[0])
            scores.append(found[1])
        if "repetition_penalty" not in options:
            together = run(model, prompts, mask, options)
            assert np.array_equal(together[0].reshape(np.shape(tokens)), tokens)
        print(name, np.sum(np.array(tokens) >= 0, axis=-1).tolist())
        arrays |= {f"cases/{name}/options": np.array(json.dumps({"eos_token_id": EOS, **options}))}
        arrays |= {f"cases/{name}/tokens": np.array(tokens, np.int32)}
        arrays |= {f"cases/{name}/scores": np.array(scores, np.float32)}
    logits = 3 * torch.randn(4, 50, generator=generator)
    seen = torch.randint(0, 50, (4, 9), generator=generator)
    arrays |= {"logits": logits.numpy(), "seen": seen.numpy()}
    for name, warpers in WARPERS.items():
        out = logits
        for warper in warpers:
            out = warper(seen, out)
        arrays[f"warpers/{name}"] = out.numpy()
    np.savez_compressed(HERE / "generate_tiny.npz", **arrays)


def run(
    model: LlamaForCausalLM, prompts: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """The new tokens (rows * sequences, NEW) and their scores."""
    beams = options["num_beams"]
    options = {"eos_token_id": EOS, "num_return_sequences": beams, **options}
    with torch.no_grad():
        out = model.generate(
            prompts,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    ends = options["eos_token_id"]
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    tokens = np.full((len(out.sequences), NEW), -1)
    for n, sequence in enumerate(out.sequences[:, prompts.shape[1] :].tolist()):
        end = next((i + 1 for i, token in enumerate(sequence) if token in ends), len(sequence))
        tokens[n, :end] = sequence[:end]
    scores = out.sequences_scores.numpy() if beams > 1 else np.zeros(len(tokens))
    return tokens, scores


def smollm2(folder: Path) -> None:
    """Run the real weights greedily, each prompt alone."""
    [file] = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    model.eval()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": chat}], tokenize=False, add_generation_prompt=True
        )
        for chat in CHATS
    ] + PLAIN
    new, rows, outputs, gaps = 64, [], [], []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
                return_dict_in_generate=True,
                output_logits=True,
            )
        rows.append(ids[0].tolist())
        outputs.append(out.sequences[0, ids.shape[1] :].tolist())
        two = torch.stack(out.logits)[:, 0].topk(2).values
        gaps.append((two[:, 0] - two[:, 1]).tolist())
        print(repr(text), "->", repr(tokenizer.decode(outputs[-1])), min(gaps[-1]))
    np.savez_compressed(
        HERE / "generate_smollm2.npz",
        texts=np.array(texts),
        prompts=padded(rows, -1, np.int32),
        tokens=padded(outputs, -1, np.int32),
        gaps=padded(gaps, np.inf, np.float32),
        eos=np.array(tokenizer.eos_token_id),
    )


def padded(rows: list[list[Any]], fill: Any, dtype: Any) -> np.ndarray:
    """The rows as one array, filled at the end."""
    out = np.full((len(rows), max(map(len, rows))), fill, dtype)
    for n, row in enumerate(rows):
        out[n, : len(row)] = row
    return out


if __name__ == "__main__":
    tiny()
    smollm2(Path(sys.argv[1]))
