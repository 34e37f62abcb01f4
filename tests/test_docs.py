"""Every Python block of the README and the docs runs, in order and in one namespace a file."""

import re
from pathlib import Path

import pytest

from tests import test_eva, test_parity, test_properties, test_quantize

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    assert blocks
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": page.stem})


# What a row of the table in docs/methods.md is tested as: a model of the zoo, and layers of the
# references. And what its columns are: a method, or the suites that have a list of their own.
ROWS = {
    "Dense": ("mlp", {"linear"}),
    "Dense in a scan": ("scan_axis_1", set()),
    "attention (DenseGeneral)": ("attention", set()),
    "Einsum": ("einsum", set()),
    "Einsum as gemma's": ("gemma_einsum", set()),
    "Embed, also attended to": ("embed_attend", {"embedding"}),
    "Conv, ConvTranspose, ConvLocal": ("conv", {"conv1d", "conv2d", "conv3d"}),
    "fused kernel with a mask": ("fused", {"merged_tft"}),
    "kernel stored (out, in)": ("fan_in_fan_out", {"conv1d_gpt2", "linear_fan_in"}),
    "experts as raw params": ("expert_params", set()),
    "what no rule serves": ("unserved", set()),
}
COLUMNS = {
    "LoRA": "lora",
    "rsLoRA": "rslora",
    "DoRA": "dora",
    "PiSSA": "pissa",
    "OLoRA": "olora",
    "orthogonal": "orthogonal",
    "zero_free": "zero_free",
    "LoRA-FA": "freeze_a",
}


def test_the_table_of_methods_is_what_the_tests_run():
    tested = {tuple(str(pair.id).split("-")) for pair in test_properties.PAIRS}
    compared = [name.split("/") for name in test_parity.references()]
    lines = (ROOT / "docs" / "methods.md").read_text().splitlines()
    head, _, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    found = {}
    for line in [line for line in lines if line.startswith("| ")][1:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found[cells[0]] = dict(zip(head, cells, strict=True))
    assert len(rows) == len(found)
    assert set(found) == set(ROWS)
    for layer, (model, stored) in ROWS.items():
        row = found[layer]
        for column, method in COLUMNS.items():
            assert (row[column] == "✓") == ((model, method) in tested), (layer, column)
        assert (row["EVA"] == "✓") == (model in test_eva.MODELS), layer
        scanned = {name.partition("_axis")[0] for name in test_quantize.MODELS}
        assert (row["quantized base"] == "✓") == (model.partition("_axis")[0] in scanned), layer
        for library in ("PEFT", "loralib"):
            methods = {m for lib, at, m in compared if lib == library.lower() and at in stored}
            assert set(filter(None, row[library].split(", "))) == methods, (layer, library)
