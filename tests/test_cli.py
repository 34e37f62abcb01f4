"""The command line: every command on tiny models, config files beneath flags, errors."""

import contextlib
import dataclasses
import importlib
import json
import pickle
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxlora as jl
from jaxlora import models, tree
from jaxlora.cli import main
from jaxlora.cli.chat import Chat, talk
from jaxlora.cli.convert import Convert
from jaxlora.cli.forms import FORMS
from jaxlora.cli.generate import run as generate
from jaxlora.cli.main import COMMANDS
from jaxlora.cli.options import fields_of, parse
from jaxlora.cli.speakers import Speakers
from jaxlora.errors import CheckpointError, ConfigError, DataError
from jaxlora.interop import peft, safetensors, torch_zip, vllm
from jaxlora.tasks import TASKS, load_run
from tests import tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    tiny.encoder(root / "encoder")
    tiny.causal(root / "causal")
    films = [f"{w} film\t{k}" for w, k in (("good", "yes"), ("bad", "no"))] * 6
    (root / "films.tsv").write_text("\n".join(["text\tlabel", *films]))
    turns = [[{"role": r, "content": c} for r, c in d] for d in tiny.DIALOGUES]
    (root / "talk.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in turns))
    return root


def run(*argv: Any) -> int:
    return main([str(a) for a in argv])


@pytest.fixture(scope="module")
def films(root):
    config = root / "films.yaml"
    config.write_text("task: classify\nmax-length: 16\nepochs: 9\nbatch_size: 4\nrank: 2\n")
    data = root / "films.tsv"
    flags = ["--model", root / "encoder", "--data", data, "--valid", data, "--epochs", 2]
    out = root / "films"
    assert run("train", "classify", "--config", config, *flags, "--out", out, "--quiet") == 0
    return out


@pytest.fixture(scope="module")
def persona(root):
    assert train_chat(root, root / "persona", "--epochs", 6) == 0
    return root / "persona"


def train_chat(root, out, *more):
    flags = ["--model", root / "causal", "--data", root / "talk.jsonl", "--max-length", 48]
    flags += ["--batch-size", 2, "--rank", 2, "--learning-rate", 0.05]
    flags += ["--valid", root / "talk.jsonl", "--out", out, "--quiet"]
    return run("train", "chat", *flags, *more)


def test_help_names_every_command_and_task(capsys):
    assert run() == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert run("train", "--help") == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in TASKS)


@pytest.mark.parametrize("argv", [("train", task) for task in TASKS] + [(c,) for c in COMMANDS])
def test_every_help_has_an_example(argv, capsys):
    with contextlib.suppress(SystemExit):
        assert run(*argv, "--help") == 0
    text = capsys.readouterr().out
    assert f"Example: jaxlora {' '.join(argv)}" in text
    assert argv == ("train",) or "--config" in text


def test_flags_override_the_config_file(films):
    settings = load_run(films).settings
    assert (settings.epochs, settings.max_length, settings.rank) == (2, 16, 2)


def test_eval_merged_equals_unmerged_and_writes_answers(films, tmp_path, capsys):
    outputs = []
    for flags in ([], ["--merged"]):
        answers = tmp_path / "answers.jsonl"
        assert run("eval", films, "--answers", answers, *flags) == 0
        outputs.append((capsys.readouterr().out, answers.read_text()))
    assert outputs[0] == outputs[1]
    assert "accuracy" in outputs[0][0]
    rows = [json.loads(line) for line in outputs[0][1].splitlines()]
    assert rows[0] == {"text": "good film", "label": "yes", "predicted": rows[0]["predicted"]}
    assert len(rows) == 12


def test_merge_writes_a_folder_that_loads(films, tmp_path, capsys):
    assert run("merge", films, "--out", tmp_path / "merged") == 0
    model, params, tokenizer = models.from_pretrained(tmp_path / "merged", head="classification")
    trained = load_run(films)
    expected = jl.merge(trained.params, trained.adapter)
    ids = tokenizer(["good film"], return_tensors="np")["input_ids"]
    given = model.apply({"params": params}, ids)
    assert (given == trained.model.apply({"params": expected}, ids)).all()
    assert run("merge", films, "--out", tmp_path / "merged") == 2
    assert "exists, expected a new folder" in capsys.readouterr().err


def assert_same(left, right):
    assert left.spec.sites == right.spec.sites
    assert left.spec.saved == right.spec.saved
    assert {p: x.tolist() for p, x in left.values().items()} == {
        p: x.tolist() for p, x in right.values().items()
    }


def test_convert_goes_round_through_every_form(films, root, tmp_path, capsys):
    """Each form is read by what it is, and the last adapter is the first."""
    base, expected = ["--base", root / "encoder"], load_run(films)
    steps = [("orbax", []), ("a.safetensors", []), ("peft", base), ("a.loralib", [])]
    steps += [("orbax-again", [*base, "--alpha", 4, "--rank", 2]), ("merged-hf", base)]
    source = films
    for name, flags in steps:
        target, form = tmp_path / name, name.removeprefix("a.").removesuffix("-again")
        assert run("convert", source, target, "--to", form, *flags) == 0
        shown = "".join(capsys.readouterr().out.split())
        assert re.search(r"ranks.2\(12\)", shown.replace("│", "."))
        assert "encoder/layer_*/attention/query/kernel(2)" in shown.replace("│", "")
        source = target
    found = jl.load_adapter(tmp_path / "orbax-again", params=expected.params)
    assert_same(found, expected.adapter)
    merged = models.from_pretrained(tmp_path / "merged-hf", head="classification")
    wanted = jl.merge(expected.params, expected.adapter)
    for path, x in tree.items(wanted):
        np.testing.assert_array_equal(tree.flat(merged.params)[path], x)


def test_convert_keeps_the_fingerprint_of_a_base_that_is_known(films, tmp_path):
    other = tree.map_leaves(lambda _, x: x + 1, load_run(films).params)
    assert run("convert", films, tmp_path / "orbax", "--to", "orbax") == 0
    assert run("convert", films, tmp_path / "a.safetensors", "--to", "safetensors") == 0
    with pytest.raises(CheckpointError, match=r"for a base of the same shapes with other values"):
        jl.load_adapter(tmp_path / "orbax", params=other)
    with pytest.raises(CheckpointError, match=r"for a base of the same shapes with other values"):
        safetensors.load(tmp_path / "a.safetensors", other)


def test_convert_reads_a_folder_of_peft_with_a_pickle(films, root, tmp_path):
    folder, expected = tmp_path / "peft", load_run(films)
    assert run("convert", films, folder, "--to", "peft") == 0
    tensors = load_file(folder / "adapter_model.safetensors")
    torch_zip.write(folder / "adapter_model.bin", tensors)
    (folder / "adapter_model.safetensors").unlink()
    assert run("convert", folder, tmp_path / "orbax", "--to", "orbax") == 0
    assert_same(jl.load_adapter(tmp_path / "orbax", params=expected.params), expected.adapter)


def test_convert_to_vllm(films, persona, tmp_path, capsys):
    assert run("convert", persona, tmp_path / "served", "--to", "vllm") == 0
    assert vllm.check(tmp_path / "served") == []
    assert run("convert", films, tmp_path / "refused", "--to", "vllm") == 2
    assert "classifier" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_convert_never_writes_over_its_source(films, root, capsys):
    before = sorted(films.rglob("*"))
    for target in (films, films.parent):
        assert run("convert", films, target, "--to", "peft", "--overwrite") == 2
        assert f"{target} holds the source, expected another place" in capsys.readouterr().err
    assert run("convert", films, films / "x", "--to", "peft", "--base", root / "encoder") == 2
    assert "base is given, and a training run has no use for it" in capsys.readouterr().err
    assert sorted(films.rglob("*")) == before


def test_convert_casts_and_overwrites(films, tmp_path, capsys):
    target = tmp_path / "narrow.safetensors"
    argv = ["convert", films, target, "--to", "safetensors", "--checkpoint", "last"]
    assert run(*argv) == 0
    assert run(*argv) == 2
    assert "narrow.safetensors is there already" in capsys.readouterr().err
    assert run(*argv, "--overwrite", "--dtype", "bfloat16") == 0
    assert "of bfloat16" in capsys.readouterr().out
    assert safetensors.load(target).spec.config.param_dtype == "bfloat16"


def test_convert_writes_what_its_flag_names():
    written = {name for name, form in FORMS.items() if form.write}
    assert set(get_args(get_type_hints(Convert)["to"])) == written
    page = (Path(__file__).parent.parent / "docs" / "convert.md").read_text()
    assert all(f"| `{name}` |" in page for name in written)


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("nowhere", [], r"nowhere is not there, expected one of: a training run; an Orbax check"),
        ("empty", [], r"empty is a folder of nothing, expected one of"),
        ("note.txt", [], r"note.txt is a file of another kind, expected one of"),
        ("old.pt", ["--alpha", 1, "--base", "x"], r"old.pt is in torch's format from before 1.6"),
        ("lora.pt", ["--alpha", 1], r"base is None, and a loralib file does not hold it. Pass --b"),
        ("lora.pt", ["--base", "x"], r"alpha is None, and a loralib file does not hold it"),
        ("cut.safetensors", [], r"cut.safetensors is damaged or cut short \(3 bytes\)"),
        ("bare.safetensors", [], r"base is None, expected the model: to write a folder of PEFT"),
        ("lora.pt", ["--base", "ENCODER", "--alpha", 1, "--fused", "q=2"], r"fused is 'q=2', expe"),
        (
            "bare.safetensors",
            ["--alpha", 1],
            r"alpha is given, and bare safetensors has no use for",
        ),
    ],
)
def test_convert_says_what_is_wrong_and_writes_nothing(
    source, flags, message, films, root, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("note")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2))
    (tmp_path / "cut.safetensors").write_bytes(b"abc")
    torch_zip.write(
        tmp_path / "lora.pt", {"q.lora_A": np.ones((1, 2)), "q.lora_B": np.ones((2, 1))}
    )
    safetensors.save(tmp_path / "bare.safetensors", load_run(films).adapter)
    flags = [root / "encoder" if flag == "ENCODER" else flag for flag in flags]
    assert run("convert", tmp_path / source, tmp_path / "new", "--to", "peft", *flags) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_a_run_resumes_with_its_own_settings(films, capsys):
    assert run("train", "classify", "--resume", "--out", films, "--quiet") == 0
    assert run("train", "classify", "--resume", "--out", films, "--rank", 3, "--quiet") == 2
    assert "other settings: rank 2 -> 3" in capsys.readouterr().err
    assert run("train", "chat", "--resume", "--out", films) == 2
    assert "holds a run of classify, expected chat" in capsys.readouterr().err


def test_inspect_knows_runs_adapters_and_models(films, root, capsys):
    assert run("inspect", films) == 0
    shown = capsys.readouterr().out
    assert "evaluations" in shown
    assert "12 kernels, 4 leaves trained in full" in shown
    assert run("inspect", films / "best") == 0
    assert "12 kernels" in capsys.readouterr().out
    assert run("inspect", root / "causal", "--targets", "qv", "--rank", 4) == 0
    assert "4 kernels adapted, 512 of" in capsys.readouterr().out


def test_fetch_lists(capsys):
    assert run("fetch") == 0
    assert "smollm2" in capsys.readouterr().out


def test_generate_is_that_of_the_library(root, persona, capsys):
    flags = ["--prompt", "the Mill", "--max-new-tokens", 4]
    texts = []
    for more in ([], ["--adapter", persona], ["--adapter", persona, "--merged"]):
        assert run("generate", root / "causal", *flags, *more) == 0
        texts.append(capsys.readouterr().out)
    model, params, tokenizer = models.from_pretrained(root / "causal", head="lm")
    options: Any = {"max_new_tokens": 4, "tokenizer": tokenizer}
    expected = jl.generate(model, {"params": params}, ["the Mill"], **options)
    assert texts[0].strip() == (expected.text or [""])[0].strip()
    assert texts[1] == texts[2] != texts[0]
    assert run("generate", persona, *flags) == 0
    assert capsys.readouterr().out == texts[1]


def test_a_run_of_layers_in_a_loop_on_a_half_base_speaks_merges_and_converts(
    root, tmp_path, capsys
):
    out, half = tmp_path / "run", ["--dtype", "bfloat16", "--param-dtype", "bfloat16"]
    assert train_chat(root, out, "--scan-layers", "--remat", "all", *half) == 0
    trained = load_run(out)
    assert {len(site.layout.axes("s")) for site in trained.adapter.spec.sites} == {1}
    assert {x.dtype for _, x in tree.items(trained.params)} == {jnp.dtype(jnp.bfloat16)}
    assert trained.model.config.remat is True
    flags = ["--prompt", "the Mill", "--max-new-tokens", 4]
    texts = []
    capsys.readouterr()
    for model in ([out], [root / "causal", "--adapter", out]):
        assert run("generate", *model, *flags) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert run("merge", out, "--out", tmp_path / "merged") == 0
    assert run("convert", out, tmp_path / "peft", "--to", "peft") == 0
    model, params, _ = models.from_pretrained(root / "causal", head="lm")
    unrolled = peft.load(tmp_path / "peft", model, {"params": params})
    merged = models.from_pretrained(tmp_path / "merged", head="lm").params
    for (path, x), (_, y) in zip(
        tree.items(jl.merge(params, unrolled)), tree.items(merged), strict=True
    ):
        np.testing.assert_allclose(x, y, 2e-2, 2e-2, err_msg=path)


def test_chat_switches_merges_and_leaves(root, persona, capsys):
    speakers = Speakers.load(str(root / "causal"), [f"cook={persona}"])
    assert speakers.name == "cook"
    lines = iter(["is it good", "/merge", "/reset", "is it good", "/adapter base", "/adapter",
                  "/adapter cok", "/unmerge", "/what", "", "/reset", "is it good"])  # fmt: skip
    said = []

    def ask():
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    options = Chat(model="", max_new_tokens=4, temperature=0.0, repetition_penalty=1.0)
    messages = talk(speakers, options, ask=ask, say=lambda line, **_: said.append(line))
    answers = capsys.readouterr().out.split("\n")
    assert answers[0] == answers[1] != answers[2]
    assert messages[0] == {"role": "user", "content": "is it good"}
    assert len(messages) == 2
    assert said[0].startswith("cook, unmerged speaks")
    assert said[1].startswith("cook, merged speaks (")
    assert said[3].startswith("base speaks (")
    assert said[4] == "base, cook"
    assert said[5] == "Adapter is 'cok', expected one of base, cook. Nearest: cook."
    assert said[7].startswith("/adapter NAME")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["chta"], "Command is 'chta', expected one of train, .* Nearest: chat."),
        (["train", "clasify"], "Task is 'clasify', expected one of .* Nearest: classify."),
        (["eval", "nowhere"], "nowhere holds no run"),
        (["fetch", "gpt5"], "Asset is 'gpt5'"),
        (["train", "chat"], "data is empty, expected a jsonl file of dialogues"),
        (["train", "chat", "--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["train", "chat", "--config"], "--config got nothing"),
        (["inspect", "./nowhere"], "There is no folder nowhere"),
    ],
)
def test_errors_are_one_line_and_status_2(argv, message, capsys, root, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    more = ["--model", root / "causal"] if argv == ["train", "chat"] else []
    assert run(*argv, *more) == 2
    said = capsys.readouterr()
    assert re.search(message, said.err)
    assert said.err.startswith("jaxlora: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_what_other_packages_say_in_lines_becomes_one(monkeypatch, capsys):
    def fail(argv):
        raise DataError("not there: it said\n  no such name\nonline.")

    monkeypatch.setattr("jaxlora.cli.fetch.run", fail)
    assert run("fetch") == 2
    assert capsys.readouterr().err == "jaxlora: not there: it said no such name online.\n"


def test_a_damaged_file_writes_nothing(root, tmp_path, capsys):
    bad = tmp_path / "bad.tsv"
    bad.write_bytes(b"text\tlabel\ngood\tyes\nb\xffd\tno\n")
    flags = ["--model", root / "encoder", "--data", bad, "--out", tmp_path / "run"]
    assert run("train", "classify", *flags) == 2
    assert f"{bad}, line 3: got the byte 0xff, expected UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_empty_prompt(root):
    with pytest.raises(DataError, match="There is no prompt"):
        generate([str(root / "causal"), "--prompt", " "])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of every type.

    Example: none
    """

    name: str
    rate: float = 0.1
    steps: int | None = None
    way: Literal["a", "b"] = "a"
    on: bool = False
    words: tuple[str, ...] = ()
    path: Path = Path()


def test_values_of_a_config_file_become_those_of_the_fields(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("name: x\nrate: 5e-4\nsteps: 3\nway: b\n'on': true\nwords: [p, q]\npath: d\n")
    settings = parse(Settings, ["--config", str(file), "--steps", "4"], "test")
    assert settings == Settings(
        name="x", rate=5e-4, steps=4, way="b", on=True, words=("p", "q"), path=Path("d")
    )
    assert parse(Settings, ["--name", "y"], "test") == Settings(name="y")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rat": 1}, "c.yaml has the field 'rat', which there is not. Nearest: rate"),
        ({"rate": "fast"}, "c.yaml: rate is 'fast', expected float"),
        ({"steps": 1.5}, "steps is 1.5, expected int"),
        ({"steps": True}, "steps is True"),
        ({"way": "c"}, r"way is 'c', expected Literal\['a', 'b'\]"),
        ({"on": "yes"}, "on is 'yes', expected bool"),
        ({"words": "p"}, "words is 'p'"),
        ({"name": None}, "name is None, expected str"),
    ],
)
def test_config_fields_that_are_wrong(fields, message):
    with pytest.raises(ConfigError, match=message):
        fields_of(Settings, fields, "c.yaml")


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- a", "holds a list")])
def test_config_files_that_are_wrong(text, message, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse(Settings, [f"--config={file}"], "test")


def test_the_console_script_is_main():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    name, _, attribute = tomllib.loads(text)["project"]["scripts"]["jaxlora"].partition(":")
    assert getattr(importlib.import_module(name), attribute) is main
