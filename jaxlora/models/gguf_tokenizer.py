"""The tokenizer of a GGUF file, built from its metadata."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxlora.errors import CheckpointError, optional
from jaxlora.models.gguf import GgufModel, token_id
from jaxlora.models.gguf_file import GgufFile

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type
_SPACE = "\u2581"


def _split(digits: str) -> Callable[[Any], list[Any]]:
    """The split of cl100k (OpenAI's tiktoken), with that many digits in a piece."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return lambda tokenizers: [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def _gpt2(tokenizers: Any) -> list[Any]:
    return [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


def _single_digits(tokenizers: Any) -> list[Any]:
    return [tokenizers.pre_tokenizers.Digits(individual_digits=True), *_gpt2(tokenizers)]


_LLAMA3, _QWEN2 = _split("{1,3}"), _split("")
PRE_TOKENIZERS: dict[str, Callable[[Any], list[Any]]] = {
    "gpt-2": _gpt2,
    "smollm": _single_digits,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
}
"""For each `tokenizer.ggml.pre`, the steps that cut text before BPE, made from `tokenizers`."""


def read_tokenizer(model: GgufModel) -> Any:
    """Build the tokenizer of a GGUF file, with its special tokens and chat template.

    Byte-level BPE ("gpt2") with one of the `PRE_TOKENIZERS`, and BPE of sentencepiece ("llama").
    Of the latter each stretch of text between special tokens gets the leading space, as in
    llama.cpp and in Llama 2's own tokenizer.json.

    Args:
      model: what `read_gguf` gave.

    Returns:
      A `transformers.PreTrainedTokenizerFast`. No pad token is made up where the file has none.

    Raises:
      CheckpointError: the file has no tokenizer, one of another kind, or a damaged one.
      MissingDependencyError: transformers or tokenizers is not installed.

    Example:
      >>> from jaxlora.fetch import fetch
      >>> from jaxlora.models.gguf import read_gguf
      >>> [path] = fetch("smollm2").glob("*.gguf")
      >>> tokenizer = read_tokenizer(read_gguf(path))
      >>> tokenizer("Hello, world!")["input_ids"]
      [19556, 28, 905, 17]
      >>> tokenizer.decode([19556, 28, 905, 17])
      'Hello, world!'
    """
    file = model.file
    tokenizers = optional("tokenizers", f"Building the tokenizer of {file.path}")
    transformers = optional("transformers", f"Building the tokenizer of {file.path}")
    kind = file.get("tokenizer.ggml.model", str)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise CheckpointError(
            f"Tokenizer of {file.path}: got {kind!r}, expected one of {', '.join(builders)}. "
            "Next: use the tokenizer of the model's own folder."
        )
    tokens = _strings(file, "tokens")
    types = _numbers(file, "token_type", len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    names = {
        "bos_token": _token(file, "bos", tokens),
        "eos_token": _token(file, "eos", tokens),
        "unk_token": _token(file, "unknown", tokens),
        "pad_token": _token(file, "padding", tokens),
    }
    special = (_CONTROL,) if kind == "gpt2" else (_CONTROL, _UNKNOWN)
    before, after = _ends(file, kind, names)
    try:
        backend = builders[kind](tokenizers, file, vocab)
        backend.add_tokens(
            [
                tokenizers.AddedToken(token, normalized=False, special=n in special)
                for token, n in zip(tokens, types, strict=True)
                if n in special or n == _USER_DEFINED
            ]
        )
        if before or after:
            backend.post_processor = tokenizers.processors.TemplateProcessing(
                single=[*before, "$A", *after],
                pair=[*before, "$A", *after, *(f"{t}:1" for t in [*before, "$B", *after])],
                special_tokens=[(token, vocab[token]) for token in {*before, *after}],
            )
    except CheckpointError:
        raise
    except Exception as e:  # the tokenizers package raises bare Exceptions
        raise CheckpointError(f"The tokenizer in {file.path} is damaged: {e}") from e
    length = model.config.get("max_position_embeddings", model.config.get("n_positions"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.get("tokenizer.chat_template", str),
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in names.items() if token is not None},
    )


def _strings(file: GgufFile, name: str) -> list[str]:
    key = f"tokenizer.ggml.{name}"
    found = file.metadata.get(key)
    if not isinstance(found, list):
        raise CheckpointError(
            f"The tokenizer in {file.path} is damaged: '{key}' is {type(found).__name__}, expected "
            "an array of strings."
        )
    return found


def _numbers(file: GgufFile, name: str, length: int) -> np.ndarray:
    key = f"tokenizer.ggml.{name}"
    found = file.metadata.get(key)
    if not isinstance(found, np.ndarray) or len(found) != length:
        there = len(found) if isinstance(found, np.ndarray) else type(found).__name__
        raise CheckpointError(
            f"The tokenizer in {file.path} is damaged: '{key}' is {there}, expected an array of "
            f"numbers, {length} of them as there are tokens."
        )
    return found


def _token(file: GgufFile, kind: str, tokens: list[str]) -> str | None:
    found = token_id(file, kind)
    if found is not None and found >= len(tokens):
        raise CheckpointError(
            f"The tokenizer in {file.path} is damaged: its {kind} token is {found}, expected less "
            f"than {len(tokens)}."
        )
    return None if found is None else tokens[found]


def _byte_level(tokenizers: Any, file: GgufFile, vocab: dict[str, int]) -> Any:
    pre = file.get("tokenizer.ggml.pre", str)
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"Pre-tokenizer of {file.path}: got {pre!r}, expected one of "
            f"{', '.join(PRE_TOKENIZERS)}. Next: add it to gguf_tokenizer.PRE_TOKENIZERS, or use "
            "the tokenizer of the model's own folder."
        )
    merges = [tuple(merge.split(" ")) for merge in _strings(file, "merges")]
    if wrong := [" ".join(merge) for merge in merges if len(merge) != 2]:
        raise CheckpointError(
            f"The tokenizer in {file.path} is damaged: merge {wrong[0]!r} is not two tokens."
        )
    steps = PRE_TOKENIZERS[pre]
    backend = tokenizers.Tokenizer(
        # Llama 3 takes a piece that is a token whole, whatever the merges would make of it.
        tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=steps is _LLAMA3)
    )
    if steps is _QWEN2:
        backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps(tokenizers))
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _sentencepiece(tokenizers: Any, file: GgufFile, vocab: dict[str, int]) -> Any:
    scores = _numbers(file, "scores", len(_strings(file, "tokens")))
    unknown = token_id(file, "unknown")
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocab,
            merges=_merges(vocab, scores),
            unk_token=next((t for t, i in vocab.items() if i == unknown), None),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    norm, decode = tokenizers.normalizers, tokenizers.decoders
    space = norm.Replace(" ", _SPACE)
    backend.normalizer = norm.Sequence([norm.Prepend(_SPACE), space]) if prefix else space
    steps = [decode.Replace(_SPACE, " "), decode.ByteFallback(), decode.Fuse()]
    backend.decoder = decode.Sequence([*steps, decode.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges(vocab: Mapping[str, int], scores: np.ndarray) -> list[tuple[str, str]]:
    """Each way to make a token of two others, the tokens of higher score first."""
    merges = [
        (-scores[i], i, token[:at], token[at:])
        for token, i in vocab.items()
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    return [(left, right) for _, _, left, right in sorted(merges)]


def _ends(
    file: GgufFile, kind: str, names: Mapping[str, str | None]
) -> tuple[list[str], list[str]]:
    """What goes before and after a text: as the file says, else as its kind has it."""
    llama3 = PRE_TOKENIZERS.get(file.get("tokenizer.ggml.pre", str)) is _LLAMA3
    ends = []
    for end, usual in (("bos_token", kind == "llama" or llama3), ("eos_token", False)):
        token = names[end]
        wanted = file.get(f"tokenizer.ggml.add_{end}", bool, usual)
        ends.append([token] if wanted and token is not None else [])
    return ends[0], ends[1]
