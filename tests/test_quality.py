"""What decides which runs benchmarks/quality.py makes, and what it says of them."""

from pathlib import Path

import pytest

from benchmarks import quality_runs as qr

ROOT = Path(__file__).parent.parent


def runs(accuracies, method="full", task="movie"):
    """Runs of {(rate, seed): accuracy}, the same on validation and test."""
    shared = {
        "task": task,
        "method": method,
        "trained": 10,
        "checkpoint_bytes": 100,
        "loss": 0.5,
        "step_ms": 2.0,
    }
    return [
        shared | {"rate": rate, "seed": seed, "valid": accuracy, "test": accuracy}
        for (rate, seed), accuracy in accuracies.items()
    ]


def test_the_sweep_comes_first_then_the_seeds_of_the_two_best_rates():
    rates = [0.1, 0.2, 0.3]
    assert qr.pending([], rates, 2, 1) == [(0.1, 0), (0.2, 0), (0.3, 0)]
    assert qr.pending(runs({(0.1, 0): 0.8, (0.3, 0): 0.9}), rates, 2, 1) == [(0.2, 0)]
    swept = runs({(0.1, 0): 0.8, (0.2, 0): 0.7, (0.3, 0): 0.9})
    assert qr.pending(swept, rates, 2, 1) == [(0.3, 1), (0.1, 1)]
    done = swept + runs({(0.1, 1): 0.6, (0.3, 1): 0.6})
    assert qr.pending(done, rates, 2, 1) == []


def test_rates_are_ranked_by_those_that_have_all_seeds():
    assert qr.ranked([], 1) == []
    assert qr.ranked(runs({(0.2, 0): 0.8, (0.1, 0): 0.8}), 1) == [0.1, 0.2]
    some = runs({(0.1, 0): 0.8, (0.2, 0): 0.7, (0.2, 1): 1.0})
    assert qr.ranked(some, 1) == [0.1, 0.2]
    assert qr.ranked(some, 2) == [0.2]


def test_the_table_gives_mean_spread_and_paired_differences():
    full = runs({(0.1, 0): 0.80, (0.1, 1): 0.82})
    lora = runs({(0.5, 0): 0.81, (0.5, 1): 0.84}, "lora-all")
    text = qr.tables(full + lora, ["movie"], 2, 1)
    assert "| full fine-tuning | 10 | 0.0 | 1.00 | 81.00 ± 1.41 | 0.1 |" in text
    assert "| LoRA, all linear layers less full fine-tuning | +1.50 ± 0.50 |" in text


def test_a_line_that_was_cut_is_left_out(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    qr.append(path, {"seed": 0})
    path.write_text(path.read_text() + '{"seed": 1, "va')
    assert qr.load(path) == [{"seed": 0}]
    assert "skipped a line" in capsys.readouterr().out
    qr.append(path, {"seed": 2})
    assert qr.load(path) == [{"seed": 0}, {"seed": 2}]


def test_a_page_without_markers_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table -->\nold\n<!-- /table -->\nb\n")
    qr.write_page(page, "table", "new\n")
    assert page.read_text() == "a\n<!-- table -->\nnew\n<!-- /table -->\nb\n"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="lacks the lines <!-- table -->"):
        qr.write_page(page, "table", "new\n")


def test_the_page_is_made_of_the_runs():
    found = qr.load(ROOT / "benchmarks" / "quality.jsonl")
    page = (ROOT / "docs" / "quality.md").read_text()
    budgets = list({str(run["budget"]): run["budget"] for run in found}.values())
    for section, budget in zip(("table", "larger"), budgets, strict=True):
        runs = [run for run in found if run["budget"] == budget]
        tasks = [task for task in qr.NAMES if any(run["task"] == task for run in runs)]
        text = qr.tables(runs, tasks, seeds=5, sweep=1)
        assert f"<!-- {section} -->\n{text}<!-- /{section} -->" in page
