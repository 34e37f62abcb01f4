"""Every benchmark runs on a tiny model, and the page is made of what they write.

step_torch.py needs torch, which is not here; it shares everything but its models.
"""

import importlib.util
import json

import jax
import numpy as np
import pytest

from benchmarks import floor, growth, inference, memory, merging, report, results, step
from benchmarks.decoder import Shape
from benchmarks.measuring import Times, in_turn
from benchmarks.ways import WAYS, Lora, fits
from jaxlora import models

# Qwix still asks Flax for a name that is gone.
pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
X = jax.random.normal(jax.random.key(0), (2, 24, 16))
ALL = Lora("all", floor.ALL, 2)
QV = Lora("q,v", ("query", "value"), 2)


def needs(way):
    if way == "Qwix" and importlib.util.find_spec("qwix") is None:
        pytest.skip("qwix is not installed")


@pytest.mark.parametrize("way", WAYS)
def test_a_step_trains_and_has_the_products_of_its_floor(way):
    needs(way)
    shape = Shape(layers=2, width=16, heads=2)
    lora = None if way.startswith("full") else ALL
    program = WAYS[way](shape, X, lora)
    before = [np.array(x) for x in jax.tree.leaves(program.args[0])]
    program()
    after = [np.array(x) for x in jax.tree.leaves(program.args[0])]
    assert all((new != old).any() for new, old in zip(after, before, strict=True))
    expected = (
        floor.full(shape, 48, 24) if lora is None else floor.lora(shape, 48, 24, floor.ALL, 2)
    )
    assert program.dot_flops == expected
    assert program.trace_seconds > 0
    assert program.compile_seconds > 0


def test_the_floor_of_query_and_value_in_scanned_and_rematerialized_layers():
    for shape in (Shape(2, 16, 2), Shape(2, 16, 2, scan=True, remat=True)):
        found = WAYS["jaxlora"](shape, X, QV).dot_flops
        assert found == floor.lora(shape, 48, 24, QV.targets, 2)


def test_the_full_set_is_every_combination():
    cases = step.every_case()
    assert len(cases) == 3 * 2 * 2 * 2 * 2 * 2
    assert {len(case.adapters) for case in cases.values()} == {2 * 4}


def test_what_a_way_cannot_do_is_left_out():
    dropout = Lora("all", floor.ALL, 2, dropout=0.1)
    assert [way for way in WAYS if not fits(way, Shape(), dropout)] == ["nnx.LoRA", "interceptor"]
    assert [way for way in WAYS if not fits(way, Shape(scan=True), ALL)] == ["nnx.LoRA"]


TINY = ["--width", "16", "--heads", "2", "--tokens", "24", "--rounds", "1"]


def test_the_scripts_write_results_and_the_page_shows_them(tmp_path):
    needs("Qwix")
    step.main([*TINY, "--layers", "1", "--cases", "dropout", "--out", f"{tmp_path}/step.json"])
    short = ["--layers", "1", "--past", "8", "--batches", "4"]
    inference.main([*TINY, *short, "--out", f"{tmp_path}/inference.json"])
    sizes = "--layers 1 --ranks 2 --sites 3 --width 16 --rank-width 16 --tokens 24 --rounds 1"
    places = ["--out", f"{tmp_path}/growth.json", "--plots", f"{tmp_path}/plots"]
    growth.main([*sizes.split(), *places])
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == {"step", "inference", "growth"}
    for one in found.values():
        assert one["machine"]["cores"] >= 1
        assert {"cpu", "device"} <= set(one["machine"])
        assert {"jax", "flax"} <= set(one["versions"])
        assert one["date"]
        assert one["settings"]["rounds"] == 1
    (dropout,) = found["step"]["tables"]
    ways = [row[0] for row in dropout["rows"]]
    assert ways == ["full", "jaxlora, all r=8", "Qwix, all r=8"]
    assert dropout["rows"][0][1] == 1
    names = [table["title"].split(",")[0] for table in found["inference"]["tables"]]
    assert names == ["prefill", "decode"]
    for table in found["inference"]["tables"]:
        assert "jaxlora, merged, r=8" in [row[0] for row in table["rows"]]
    assert len(list((tmp_path / "plots").glob("growth-*.svg"))) == 3

    report.main(["--results", str(tmp_path), "--page", f"{tmp_path}/PAGE.md"])
    text = (tmp_path / "PAGE.md").read_text()
    sections = [line for line in text.splitlines() if line.startswith("## ")]
    assert sections == ["## Training step", "## Inference", "## Growth"]
    assert "![growth-layers](plots/growth-layers.svg)" in text
    assert "| full | 1.00 |" in text


def test_merges_and_files_are_compared_with_copies(tmp_path, capsys):
    sizes = "--layers 2 --width 8 --ranks 2 --rounds 1"
    merging.main([*sizes.split(), "--out", f"{tmp_path}/merging.json"])
    merges, files = json.loads((tmp_path / "merging.json").read_text())["tables"]
    assert [row[0] for row in merges["rows"]][::4] == ["copy", merging.IN_PLACE]
    assert merges["rows"][0][1] == 1
    leaves = 2 * (8 * 2 + 2 * 8) * 4
    sizes = {row[0]: row[3] * 1e6 for row in files["rows"]}
    header = 8 + 1024  # safetensors: its length, and the names
    assert leaves < sizes["save its leaves, safetensors"] < leaves + header
    assert 2 * 8 * 8 * 4 < sizes["save the merged model, safetensors"] < 2 * 8 * 8 * 4 + header


def test_the_bytes_of_training_are_those_of_the_shapes():
    config = models.GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    lora = memory.CASES["gpt2-medium"].lora
    case = memory.Case(config, models.GPT2LMHeadModel, 2, 16, lora, half=True)
    rows = memory.measure("tiny", case)
    found = [dict(zip(memory.COLUMNS, row, strict=True)) for row in rows]
    assert [row["way"] for row in found] == ["full", "full, all in bfloat16", "LoRA"]
    kernels, biases, norms = 12 * 8 * 8, 9 * 8, 4 * 8
    base = 2 * (kernels + biases + norms) + (32 + 16 + 2) * 8
    adapter = 2 * 2 * (4 * 8 + 8 * 4)  # layers, q and v, A and B of rank 4
    full, half, own = found
    assert full["trained parameters"] == half["trained parameters"] == base
    assert own["trained parameters"] == adapter
    moments = 2 * adapter * 4 + 4  # and the count of steps
    assert own["held GB"] * 1e9 == pytest.approx(2 * base + 4 * adapter + moments)
    assert full["held GB"] * 1e9 == pytest.approx(3 * 4 * base + 4)
    assert own["checkpoint MB"] * 1e6 == pytest.approx(4 * adapter)
    for row in found:
        parts = row["held GB"] + row["gradients GB"] + row["activations GB"]
        assert parts == pytest.approx(row["peak GB"])


def test_a_page_of_one_table_and_one_of_another_machine_are_sections(tmp_path):
    one = {"title": "Memory", "note": "Bytes.", "columns": ["model", "ratio"], "rows": [["a", 0.3]]}
    one |= {"machine": {"device": "cpu", "versions": {"jax": "1"}}, "settings": {}}
    (tmp_path / "memory.json").write_text(json.dumps(one))
    (tmp_path / "memory-gpu.json").write_text(json.dumps(one | {"title": "Memory, GPU"}))
    (tmp_path / "another.json").write_text(json.dumps(one | {"title": "Another"}))
    report.main(["--results", str(tmp_path), "--page", f"{tmp_path}/PAGE.md"])
    text = (tmp_path / "PAGE.md").read_text()
    body = "Bytes.\n\ncpu, jax 1.\n\n| model | ratio |\n| --- | --- |\n| a | 0.30 |\n"
    order = ("Memory", "Memory, GPU", "Another")
    assert text.endswith("\n".join(f"## {title}\n\n{body}" for title in order))


def test_no_results_are_an_error(tmp_path):
    with pytest.raises(SystemExit, match="holds no results"):
        report.main(["--results", str(tmp_path)])


def test_times_are_compared_round_by_round():
    base, own = Times((1.0, 2.0, 4.0)), Times((2.0, 2.0, 2.0))
    assert own.over(base) == 1.0
    assert own.over_at_best(base) == 2.0
    assert own.spread(base) == "0.60-1.80"
    assert base.median_ms == 2000


def test_the_ways_run_in_turn_and_the_warm_up_does_not_count():
    calls = []
    ways = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = in_turn(ways, rounds=2, warmup=2)
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(own.seconds) for own in times.values()] == [2, 2]


def test_a_cell_has_three_digits():
    cells = [None, "x", 1234567, 0.0, 0.661, 12.346, 1234.6, 0.01234]
    shown = ["-", "x", "1,234,567", "0.00", "0.66", "12.35", "1,235", "0.012"]
    assert list(map(results.cell, cells)) == shown
