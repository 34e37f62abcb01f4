"""Write sentencepiece.json: a tiny BPE model as a GGUF file has it, and its ids of texts.

Run from the repository's root, in an environment with sentencepiece (made with 0.2.3):

    python tests/references/make_sentencepiece.py FOLDER_OF_REVIEWS

FOLDER_OF_REVIEWS is what `jaxlora.fetch.fetch("reviews")` returns. The model is trained on the
movie reviews with the options of Llama 2's.
"""

# sentencepiece is not among the project's dependencies.
# pyright: reportMissingImports=false

import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import sentencepiece

TEXTS = [
    "",
    " ",
    "the movie",
    " the movie is  not   good",
    "A film that's better than it was in 1999!",
    "naïve café, 你好 🙂",
    "tabs\tand\nlines\r\n",
    "trailing  ",
    "xxxxxyyyyyzzzzz THE MOVIE",
]
# The numbers of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def main() -> None:
    """Train the model, and write its pieces and what it makes of the texts."""
    file = Path(sys.argv[1]) / "movieReviewSnippets_GroundTruth.txt"
    lines = [line.split("\t")[2] for line in file.read_text(encoding="utf-8").splitlines()]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:3000]),
        model_writer=trained,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=0.999,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    ids = range(model.get_piece_size())

    def kind(i: int) -> int:
        named = ((model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_byte, BYTE))
        return next((number for holds, number in named if holds(i)), NORMAL)

    corpus = np.array([i for line in lines for i in (*model.encode(line), -1)], np.int32)
    reference = {
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "types": [kind(i) for i in ids],
        "texts": [
            {"text": text, "ids": model.encode(text), "decoded": model.decode(model.encode(text))}
            for text in TEXTS
        ],
        # Of every review's sentence, each ended by -1.
        "corpus": {"ids": len(corpus), "sha256": hashlib.sha256(corpus.tobytes()).hexdigest()},
    }
    Path(__file__).with_name("sentencepiece.json").write_text(
        json.dumps(reference, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
