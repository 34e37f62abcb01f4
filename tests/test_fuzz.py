"""2,000 broken and hostile files: none brings anything but our errors. `FUZZ=100000` tries more."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fuzz

COUNT = int(os.environ.get("FUZZ", "2000"))
SEED = os.environ.get("FUZZ_SEED", "0")
PARTS = 1 + COUNT // 10_000  # a process each


@pytest.mark.parametrize("part", range(PARTS))
def test_whatever_a_file_holds_reading_it_is_an_error_of_ours_or_right(part):
    command = [sys.executable, "-m", "tests.fuzz", str(COUNT), SEED, str(part), str(PARTS)]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.stdout, run.stderr[-5000:]
    report = json.loads(run.stdout)
    assert report["findings"] == {}
    assert run.returncode == 0
    tried = {name: sum(results.values()) for name, results in report["results"].items()}
    assert sum(tried.values()) == len(range(part, COUNT, PARTS))
    assert set(tried) == {
        "orbax", "run", "safetensors", "peft", "loralib", "torch", "model", "config", "gguf"
    }  # fmt: skip
    refused = {name: tried[name] - results.get("read", 0)
               for name, results in report["results"].items()}  # fmt: skip
    assert all(refused[name] > tried[name] / 4 for name in tried), refused


ATTACKS = {
    "a process": lambda folder: os.system("true"),
    "a file elsewhere": lambda folder: (folder.parent / "escape").write_text("x"),
    "a folder elsewhere": lambda folder: (folder.parent / "escape").mkdir(),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_what_reading_must_not_do_is_seen(attack, tmp_path):
    code = (
        "import sys, os, pathlib; from tests import fuzz, test_fuzz;"
        "sys.addaudithook(fuzz.audit); folder = pathlib.Path(sys.argv[1]) / 'in';"
        "form = fuzz.Form({'a': b''}, list(test_fuzz.ATTACKS.values())[int(sys.argv[2])], 1);"
        "fuzz.attempt(form, form.seed, folder)"
    )
    number = list(ATTACKS.values()).index(attack)
    command = [sys.executable, "-c", code, str(tmp_path), str(number)]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert "tests.fuzz.Escape" in run.stderr
    assert not (tmp_path / "escape").exists()


def test_damage_is_the_same_for_the_same_seed():
    seed = {"a.json": b'{"x": [1, 2], "y": {"z": 3}}', "b": bytes(range(256))}
    first, again, other = (fuzz.mutated(random.Random(n), seed) for n in (1, 1, 2))
    assert first == again != other
    assert first != seed
