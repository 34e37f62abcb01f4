"""Write smollm2.json: what transformers and torch make of SmolLM2's GGUF file.

Run from the repository's root, in an environment with torch, transformers and gguf (made with torch
2.13.0+cpu, transformers 5.23.0 and gguf 0.19.0):

    python tests/references/make_smollm2.py FOLDER_OF_SMOLLM2 FOLDER_OF_REVIEWS

The folders are what `jaxlora.fetch.fetch("smollm2")` and `fetch("reviews")` return. Each function
in `SECTIONS` makes one section of the file; more go there.
"""

# torch is not among the project's dependencies.
# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false
# ruff: noqa: RUF001

import dataclasses
import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    convert_gguf_tokenizer,
    get_gguf_tokenizer,
)

TEXTS = [
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "two  spaces,   three,    four",
    "tabs\tand\t\tmore\n\nlines\r\nof\rtext \n \n  ",
    "\n\n\n",
    "\u00a0no-break\u2003em\u3000ideographic\u200bzero\u200d",
    "1 12 123 1234 12345 3.14159 1,000,000 2024-01-31 0x1F 1e-5",
    "x1y22z333 v2.0.1 n°5 10% $7.50 #42 @3",
    "½ of 5² is ¼; Ⅷ, ３４, ٣٤, १२३, 五十, ① and ② x³",
    "don't I'll we've she's they'd I'm you're 'tis rock'n'roll DON'T I'LL WE'VE",
    "naïve café Ångström straße ĳ œuvre Łódź ğ",
    "e\u0301 cafe\u0301 A\u030angstro\u0308m \u1100\u1161\u11a8 \ufb01ne",
    "Привет, как дела? Съешь ещё этих мягких французских булок.",
    "Γειά σου Κόσμε, τι κάνεις;",
    "你好，世界！今天天气很好。",
    "こんにちは世界、カタカナとひらがな。ﾊﾝｶｸ",
    "안녕하세요 세계! 오늘 날씨가 좋네요",
    "مرحبا بالعالم، كيف حالك؟",
    "שלום עולם, מה שלומך?",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "สวัสดีชาวโลก วันนี้อากาศดี",
    "Xin chào thế giới, hôm nay trời đẹp",
    "🙂 👍🏽 👩‍👩‍👧‍👦 🇨🇭 ❤️ 🤖x🤖 🫠",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β → ∑ᵢ xᵢ² ≤ ∞",
    "def f(x: int) -> int:\n    if x<=1:\n\t\treturn 1\n    return x*f(x-1)  # 5! == 120\n",
    'for (int i=0;i<n;++i){a[i]+=b[i]*2.5f;}\n{"k": [1, 2, {"a": null}]}\n<a href="x?y=1&z=2">',
    "https://example.org/a/b?c=1#d user@example.org C:\\dir\\file.txt ../x/~y",
    "ALL CAPS camelCase snake_case kebab-case SCREAMING_SNAKE PascalCaseXYZ",
    "...!!!??? --- ___ *** ((([[[{{{ }}}]]])))",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "a" * 70,
    " " * 33 + "x",
    "\x00\x01\x07\x1b[0m\x7f\u0080\ufeff\ufffd",
    "\U0001f9ec\U000e0041\U00010330\U0002070e",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "before<|im_end|>after <|endoftext|> spaced <|im_start|> x",
    "<repo_name>a/b<file_sep>c.py<|endoftext|><jupyter_code>1+1<jupyter_output>2<empty_output>",
    "<|im_start |> <| im_start|> <|im_star t|> <im_start> <|IM_END|> im_end|>",
]
CHATS = [
    [{"role": "user", "content": "What is 12 times 12?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "The capital of Switzerland?"},
    ],
    [
        {"role": "user", "content": "Bonjour, ça va ?"},
        {"role": "assistant", "content": "  Oui, merci.\n"},
        {"role": "user", "content": "Count: 1, 2, <|im_end|> 🙂"},
    ],
]


@dataclasses.dataclass
class Made:
    """What the sections are made from."""

    file: Path
    reviews: Path
    model: Any
    tokenizer: Any


def config(made: Made) -> dict[str, Any]:
    """The fields of the config that this model has values for."""
    fields = made.model.config.to_dict()
    fields |= fields["rope_parameters"]
    names = (
        "model_type",
        "attention_bias",
        "bos_token_id",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "mlp_bias",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    )
    return {name: fields[name] for name in names}


def tensors(made: Made) -> dict[str, str]:
    """The start of the sha256 of each tensor's float32 bytes; the head is the embedding."""
    state = {name: tensor.numpy() for name, tensor in made.model.state_dict().items()}
    np.testing.assert_array_equal(state.pop("lm_head.weight"), state["model.embed_tokens.weight"])
    assert {array.dtype for array in state.values()} == {np.dtype(np.float32)}
    return {name: hashlib.sha256(array.tobytes()).hexdigest()[:16] for name, array in state.items()}


def texts(made: Made) -> list[dict[str, Any]]:
    """The ids of each text, by `tokenizer.ggml.pre`; those that "smollm" has too are left out.

    transformers takes "smollm" for "gpt-2". llama.cpp, which defines the name, first cuts out every
    character of the Unicode category N: so is it done here. "transformers" has its ids where they
    are others.
    """
    whole = made.tokenizer
    builds = {pre: tokenizer_of(made.file, pre) for pre in ("llama-bpe", "gpt-2")}
    builds["qwen2"] = qwen2_tokenizer(made.file)
    found = []
    for text in TEXTS:
        row = {"text": text, "smollm": ids_by_digit(whole, text)}
        if row["smollm"] != (naive := whole(text)["input_ids"]):
            row["transformers"] = naive
        others = {pre: build.encode(text).ids for pre, build in builds.items()}
        row |= {pre: ids for pre, ids in others.items() if ids != row["smollm"]}
        row["decoded"] = whole.decode(row["smollm"])
        found.append(row)
    return found


def corpus(made: Made) -> dict[str, Any]:
    """A digest of the ids of every line of the movie reviews, each ended by -1."""
    lines = made.reviews.read_text(encoding="utf-8").splitlines()
    ids = [i for line in lines for i in (*ids_by_digit(made.tokenizer, line), -1)]
    digest = hashlib.sha256(np.array(ids, np.int32).tobytes()).hexdigest()
    return {"lines": len(lines), "tokens": len(ids) - len(lines), "sha256": digest}


def chats(made: Made) -> list[dict[str, Any]]:
    """Each chat as text and ids, with and without the prompt to answer."""
    found = []
    for messages in CHATS:
        for prompt in (False, True):
            text = made.tokenizer.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=False
            )
            ids = ids_by_digit(made.tokenizer, text)
            found.append({"messages": messages, "prompt": prompt, "text": text, "ids": ids})
    return found


def logits(made: Made) -> list[dict[str, Any]]:
    """Every 61st logit after the last token of each chat that is to be answered."""
    found = []
    for messages in CHATS:
        text = made.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        ids = ids_by_digit(made.tokenizer, text)
        with torch.no_grad():
            last = made.model(torch.tensor([ids])).logits[0, -1]
        found.append({"ids": ids, "logits": [round(x, 6) for x in last[::61].tolist()]})
    return found


SECTIONS: dict[str, Callable[[Made], Any]] = {
    "config": config,
    "tensors": tensors,
    "texts": texts,
    "corpus": corpus,
    "chats": chats,
    "logits": logits,
}


def ids_by_digit(tokenizer: Any, text: str) -> list[int]:
    numbers = "".join({c for c in text if unicodedata.category(c).startswith("N")})
    pieces = re.split(f"([{re.escape(numbers)}])", text) if numbers else [text]
    return [i for piece in pieces for i in tokenizer(piece)["input_ids"]]


def tokenizer_of(file: Path, pre: str) -> Any:
    architecture, fields, _ = get_gguf_tokenizer(str(file))
    backend, _ = convert_gguf_tokenizer(architecture, {**fields, "pre_tokenizer_type": pre})
    return backend


def qwen2_tokenizer(file: Path) -> Any:
    _, fields, _ = get_gguf_tokenizer(str(file))
    vocab = {token: i for i, token in enumerate(fields["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    kinds = zip(fields["tokens"], token_types(file), strict=True)
    control = [token for token, kind in kinds if kind == 3]
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    return tokenizer.backend_tokenizer


def token_types(file: Path) -> list[int]:
    return gguf.GGUFReader(file).fields["tokenizer.ggml.token_type"].contents()


def main() -> None:
    """Make every section, and write one item a line."""
    folder, reviews = Path(sys.argv[1]), Path(sys.argv[2])
    [file] = folder.glob("*.gguf")
    made = Made(
        file=file,
        reviews=reviews / "movieReviewSnippets_GroundTruth.txt",
        model=AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, dtype=torch.float32
        ).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder, gguf_file=file.name),
    )
    assert isinstance(made.tokenizer, PreTrainedTokenizerFast)
    sections = {name: make(made) for name, make in SECTIONS.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {in_lines(made)}" for name, made in sections.items())
    Path(__file__).with_name("smollm2.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def in_lines(section: Any) -> str:
    if not isinstance(section, list):
        return json.dumps(section, ensure_ascii=False)
    return "[\n" + ",\n".join(json.dumps(item, ensure_ascii=False) for item in section) + "\n]"


if __name__ == "__main__":
    main()
