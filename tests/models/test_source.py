"""GGUF files through `from_pretrained`: real weights against torch, and what is refused."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import models
from jaxlora.errors import CheckpointError
from jaxlora.fetch import fetch

REFERENCE = Path(__file__).parent.parent / "references" / "smollm2.json"


@pytest.fixture(name="file", scope="module")
def _file() -> Path:
    [file] = fetch("smollm2").glob("*.gguf")
    return file


def test_smollm2_has_torchs_logits(file):
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))
    model, params, tokenizer = models.from_pretrained(file.parent)  # a folder with just one file
    assert tokenizer.chat_template
    run = jax.jit(lambda params, ids: model.apply({"params": params}, ids, last=1))
    for row in reference["logits"]:
        got = run(params, np.array([row["ids"]]))[0, 0, ::61]
        np.testing.assert_allclose(got, row["logits"], rtol=0, atol=1e-4)


def test_scanned_in_bfloat16_on_a_mesh(file):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("fsdp",), auto, devices=jax.devices()[:1])
    model, params, _ = models.from_pretrained(
        file, scan_layers=True, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, mesh=mesh
    )
    kernel = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.shape == (30, 576, 1536)
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", None)
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))["logits"][0]
    got = model.apply({"params": params}, np.array([reference["ids"]]), last=1)[0, 0, ::61]
    # bfloat16 has 8 bits of mantissa, over 30 layers; the logits are up to 20 in size.
    np.testing.assert_allclose(got.astype(jnp.float32), reference["logits"], rtol=0, atol=1.5)


def test_a_folder_with_two_files_does_not_tell_which(file, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).symlink_to(file)
    with pytest.raises(CheckpointError, match=r"2 GGUF files, expected one of them: a.gguf, b"):
        models.from_pretrained(tmp_path)


def test_a_pickle_is_refused(file, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"holds config.json, pytorch_model.bin. .* saved as"):
        models.from_pretrained(tmp_path)
    shutil.copy(file, tmp_path / "model.gguf")  # config.json says that it is a folder of tensors
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor"):
        models.from_pretrained(tmp_path)
