"""PEFT's folders in, with torch's logits; ours out and back; and everything that can be wrong.

tests/references/make_peft_folders.py says what is stored. That torch loads what we write is checked
by check_peft.py there, in `make test-interop`.
"""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora as jl
from jaxlora import models
from jaxlora.interop import peft

STORED = Path(__file__).parent / "references" / "peft_folders.npz"


@functools.cache
def stored():
    with np.load(STORED) as file:
        return {name: file[name] for name in file.files}


CASES = sorted(
    {tuple(name.split("/")[:2]) for name in stored() if name.count("/") == 2}
    - {(name.split("/")[0], "base") for name in stored()}
)


def unpack(name, folder):
    """Writes the stored files of "<model>/<adapter>" and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, x in stored().items():
        if key.startswith(f"{name}/") and x.dtype == np.uint8:
            (folder / key.rpartition("/")[2]).write_bytes(x.tobytes())
    return folder


@functools.cache
def base(name, scan, root):
    folder = unpack(f"{name}/base", Path(root) / f"{name}-base")
    model, params, _ = models.from_pretrained(folder, scan_layers=scan)
    return model, {"params": params}


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("peft")


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(("name", "method"), CASES)
def test_logits_after_loading_are_torchs(name, method, scan, root):
    model, variables = base(name, scan, str(root))
    folder = unpack(f"{name}/{method}", root / name / method)
    adapter = peft.load(folder, model, variables)
    ids = jnp.asarray(stored()[f"{name}/inputs"])
    got = jl.lora_apply(model, variables, adapter, ids)
    expected = stored()[f"{name}/{method}/logits"]
    assert np.abs(expected - stored()[f"{name}/logits"]).max() > 1e-2
    np.testing.assert_allclose(got, expected, atol=1e-4)
