"""What earlier versions wrote loads for ever, with the outputs that it had."""

from pathlib import Path

import numpy as np
import pytest

import jaxlora as jl
from jaxlora.interop import loralib, peft, safetensors
from tests.references.make_compat import MODEL, NAMES, X, base

FOLDER = Path(__file__).parent / "references" / "compat"
VERSIONS = sorted(p.name for p in FOLDER.iterdir())
VARIABLES = {"params": base()}
FORMS = {
    "orbax": lambda f: jl.load_adapter(f / "orbax", params=base()),
    "safetensors": lambda f: safetensors.load(f / "adapter.safetensors", base()),
    "peft": lambda f: peft.load(f / "peft", MODEL, VARIABLES, X, names=NAMES),
    "loralib": lambda f: loralib.load(f / "loralib.pt", MODEL, VARIABLES, X, alpha=4, names=NAMES),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("version", VERSIONS)
def test_an_adapter_of_an_earlier_version_gives_its_output(version, form):
    adapter = FORMS[form](FOLDER / version)
    output = "output_loralib.npy" if form == "loralib" else "output.npy"
    expected = np.load(FOLDER / version / output)
    np.testing.assert_allclose(jl.lora_apply(MODEL, VARIABLES, adapter, X), expected, 1e-5, 1e-5)
    assert np.abs(expected - MODEL.apply(VARIABLES, X)).max() > 0.1


def test_the_first_version_is_there():
    assert "0.1.0" in VERSIONS
