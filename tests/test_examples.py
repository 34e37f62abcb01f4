"""Each example runs for a few steps on a tiny model, and says what it promises."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_classify(tmp_path, capsys):
    rows = [f"{k}\t{w} film" for w, k in (("good", "yes"), ("bad", "no"))] * 10
    (tmp_path / "films.tsv").write_text("\n".join(["answer\tsentence", *rows]))
    module = example("classify")
    options = module.Options(
        model=str(tiny.encoder(tmp_path / "model")),
        data=tmp_path / "films.tsv",
        test=tmp_path / "films.tsv",
        text="sentence",
        label="answer",
        out=str(tmp_path / "run"),
        rank=2,
        epochs=4,
        batch_size=4,
        learning_rate=1e-2,
    )
    scores = module.main(options)
    assert scores["accuracy"] == 1
    said = capsys.readouterr().out
    assert "merged agrees on 100.00 %" in said
    assert module.main(options) == scores  # the run that is there goes on, at its end


def test_tasks(tmp_path, capsys, monkeypatch):
    words = {"good": 1, "fine": 1, "bad": 0, "dull": 0}
    reviews = [(f"the film was {word}", label) for word, label in words.items()] * 5
    monkeypatch.setattr("jaxlora.tasks.classify.load_reviews", lambda which: reviews)
    module = example("tasks")
    monkeypatch.setattr(module, "TASKS", ("movie", "nyt"))
    options = module.Options(
        model=str(tiny.encoder(tmp_path / "model")),
        out=str(tmp_path / "runs"),
        limit=8,
        epochs=1,
        rank=2,
        max_length=16,
    )
    table = module.main(options)
    assert set(table) == set(module.TASKS)
    said = capsys.readouterr().out
    assert "switch, merged" in said
    assert "2 full copies" in said


def test_chat(tmp_path, capsys):
    turns = [[{"role": r, "content": c} for r, c in d] for d in tiny.DIALOGUES]
    lines = [json.dumps({"messages": messages}) for messages in turns]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    module = example("chat")
    options = module.Options(
        model=str(tiny.causal(tmp_path / "model")),
        data=tmp_path / "talk.jsonl",
        out=tmp_path / "run",
        epochs=1,
        rank=2,
        max_length=48,
        max_new_tokens=3,
    )
    answers = module.main(options)
    assert set(answers) == {"base", "run"}
    assert capsys.readouterr().out.count("run: ") == len(module.QUESTIONS)


def test_nlg(tmp_path):
    module = example("nlg")
    options = module.Options(
        model=str(tiny.causal(tmp_path / "model")),
        data=tmp_path / "food.txt",
        out=tmp_path / "run",
        epochs=1,
        beams=2,
        max_new_tokens=4,
        max_length=48,
    )
    rows = [f"name [ {n} ]||the {n} is {w} ." for n in ("Mill", "Inn", "the") for w in ("dear",)]
    (tmp_path / "food.txt").write_text("\n".join(rows))
    scores = module.main(options)
    assert set(scores) == {"base", "adapter"}
    assert {"bleu", "nist", "rouge_l", "cider", "loss"} <= set(scores["adapter"])


@pytest.mark.parametrize("name", ["dialogues.jsonl", "restaurants.txt"])
def test_the_data_beside_the_examples_can_be_read(name):
    from jaxlora.rows import read_rows
    from jaxlora.tasks.chat import check_messages

    if name.endswith(".jsonl"):
        rows = read_rows(EXAMPLES / name, ("messages",))
        for row in rows:
            check_messages(row)
    else:
        rows = read_rows(EXAMPLES / name, ("mr", "text"))
    assert len(rows) >= 40
