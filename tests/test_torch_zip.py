"""Files of torch.save: what torch wrote is read exactly, and hostile or broken ones are refused."""

import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.errors import CheckpointError, LoraError
from jaxlora.interop import torch_zip
from jaxlora.interop.torch_zip import STORAGES
from jaxlora.interop.unpickle import load

KINDS = Path(__file__).parent / "references" / "torch_kinds.pt"


def zipped(data, storages=(), root="archive", packing=zipfile.ZIP_STORED):
    """A file of torch.save with this pickle, as bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as archive:
        archive.writestr(f"{root}/data.pkl", data)
        for n, storage in enumerate(storages):
            archive.writestr(f"{root}/data/{n}", storage)
    return out.getvalue()


def parts_of(file):
    """The pickle and the storages of a file."""
    with zipfile.ZipFile(file) as archive:
        root = archive.namelist()[0].partition("/")[0]
        count = sum(name.startswith(f"{root}/data/") for name in archive.namelist())
        storages = [archive.read(f"{root}/data/{n}") for n in range(count)]
        return archive.read(f"{root}/data.pkl"), storages


def written(tmp_path, data):
    file = tmp_path / "file.pt"
    file.write_bytes(data)
    return file


def tensor(numel=6, offset=0, sizes=(2, 3), strides=(3, 1), key="0", kind="torch\nFloatStorage\n"):
    """The opcodes of {"x": tensor}, with whatever numbers."""

    def put(x):
        return pickle.dumps(x, 2)[2:-1]

    return (
        b"\x80\x02}(X\x01\0\0\0xctorch._utils\n_rebuild_tensor_v2\n(("
        + put("storage")
        + b"c"
        + kind.encode()
        + put(key)
        + put("cpu")
        + put(numel)
        + b"tQ"
        + put(offset)
        + put(sizes)
        + put(strides)
        + b"\x89ccollections\nOrderedDict\n)RtRu."
    )


SIX = np.arange(6, dtype=np.float32)


def test_a_file_of_torch_with_tensors_of_every_kind():
    found = torch_zip.read(KINDS)
    for name, x in found["dtypes"].items():
        np.testing.assert_array_equal(x, np.arange(3).astype(jnp.dtype(name)))
        assert x.dtype == jnp.dtype(name)
    assert set(found["dtypes"]) >= set(STORAGES.values())
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    np.testing.assert_array_equal(found["whole"], whole)
    np.testing.assert_array_equal(found["turned"], whole.T)
    np.testing.assert_array_equal(found["part"], whole[1:3, ::2])
    assert np.shares_memory(found["whole"], found["turned"])
    assert not found["whole"].flags.writeable
    np.testing.assert_array_equal(found["scalar"], np.float32(3))
    assert found["empty"].shape == (0, 3)
    np.testing.assert_array_equal(found["parameter"], np.arange(2, dtype=np.float32))
    assert {name: x.shape for name, x in found["state"].items()} == {"weight": (1, 2), "bias": (1,)}
    assert found["rest"] == {
        "step": 7, "big": 2**40, "rate": 0.5, "none": None, "words": ["a", (True, False)]
    }  # fmt: skip
    assert found["size"] == (4, 6)


def test_what_is_written_is_read_exactly_and_twice_the_same(tmp_path):
    tensors = {
        name: np.arange(6).reshape(2, 3).astype(jnp.dtype(name)) for name in STORAGES.values()
    }
    tensors |= {"turned": SIX.reshape(2, 3).T, "scalar": np.float32(2), "empty": np.zeros((0, 2))}
    file = torch_zip.write(tmp_path / "new" / "file.pt", tensors)
    found = torch_zip.read(file)
    assert list(found) == list(tensors)
    for name, x in tensors.items():
        np.testing.assert_array_equal(found[name], x)
        assert found[name].dtype == x.dtype
    assert torch_zip.write(tmp_path / "again.pt", tensors).read_bytes() == file.read_bytes()
    assert [p.name for p in file.parent.iterdir()] == ["file.pt"]


def test_writing_refuses_what_torch_has_not_and_files_that_are_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"x has dtype int4, expected one of float64, float3"):
        torch_zip.write(tmp_path / "file.pt", {"x": jnp.ones(2, jnp.int4)})
    file = torch_zip.write(tmp_path / "file.pt", {"x": SIX})
    with pytest.raises(CheckpointError, match=r"file.pt is there already, expected a new path"):
        torch_zip.write(file, {})
    with pytest.raises(CheckpointError, match=r"is a folder, expected the path of a file"):
        torch_zip.write(tmp_path, {}, overwrite=True)
    torch_zip.write(file, {"y": SIX}, overwrite=True)
    assert list(torch_zip.read(file)) == ["y"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_is_read(protocol, tmp_path):
    data = {"step": 2**70, "rate": -0.5, "words": ["ä" * 300, (1, -1, None)], 3: {"on": True}}
    file = written(tmp_path, zipped(pickle.dumps(data, protocol)))
    assert torch_zip.read(file) == data


def test_reading_needs_neither_torch_nor_safetensors():
    code = (
        "import sys, jaxlora.interop.loralib, jaxlora.interop.safetensors; "
        "print({'torch', 'safetensors', 'huggingface_hub', 'transformers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return subprocess.call, (["touch", self.marker],)


class HostileByCode(Hostile):
    def __reduce__(self) -> Any:
        return exec, (f"import pathlib; pathlib.Path({self.marker!r}).touch()",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(Hostile, "(commands|subprocess).call"), (HostileByCode, "(__builtin__|builtins).exec")],
)
def test_code_in_a_pickle_is_refused_by_name_and_does_not_run(kind, name, protocol, tmp_path):
    marker = tmp_path / "marker"
    data = pickle.dumps({"fc.lora_A": kind(marker)}, protocol)
    with pytest.raises(CheckpointError, match=rf"asks for '{name}', which is refused: only tensor"):
        torch_zip.read(written(tmp_path, zipped(data)))
    assert not marker.exists()
    pickle.loads(data)  # to see that it would have
    assert marker.exists()


DEEP = b"\x80\x02)q\x01" + b"h\x01h\x01\x86q\x01" * 60  # a tuple whose hash takes 2**60 steps
OPCODES = {
    "INST": (b"(ios\nsystem\n.", r"opcode INST, which no tensors need"),
    "OBJ": (b"\x80\x02(cos\nsystem\no.", r"asks for 'os.system', which is refused"),
    "EXT1": (b"\x80\x02\x82\x01.", r"opcode EXT1"),
    "NEWOBJ": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", r"opcode NEWOBJ"),
    "a dotted name": (b"\x80\x04\x8c\x05torch\x8c\x0aSize.mro..\x93.", r"asks for 'torch.Size.mro"),
    "a hash that takes forever": (
        DEEP + b"}h\x01K\x01s.",
        r"damaged: TypeError: a key that is a tuple",
    ),
    "a call of a dict": (b"\x80\x02})R.", r"damaged: TypeError: a call of a dict"),
    "a call of a dtype": (
        b"\x80\x02ctorch\nfloat32\n)R.",
        r"damaged: TypeError: a call of a Known",
    ),
    "attributes of a global": (
        b"\x80\x02ccollections\nOrderedDict\n}b.",
        r"damaged: TypeError: items for a Known",
    ),
    "a storage by hand": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x01))tR.",
        r"TypeError: a tensor in a int",
    ),
    "a persistent id of numbers": (b"\x80\x02(K\x01K\x01K\x01K\x01K\x01tQ.", r"TypeError: a persi"),
    "no end": (b"\x80\x02}", r"damaged: ValueError"),
    "nothing on the stack": (b"\x80\x02.", r"damaged: IndexError"),
    "no mark": (b"\x80\x02}u.", r"damaged: IndexError"),
    "a list": (b"\x80\x02].", r"holds a list, expected a dict of tensors"),
}


@pytest.mark.parametrize(("data", "message"), OPCODES.values(), ids=OPCODES.keys())
def test_opcodes_that_no_tensors_need_are_refused(data, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        torch_zip.read(written(tmp_path, zipped(data)))


def test_an_index_into_the_memo_costs_nothing(tmp_path):
    data = b"\x80\x02}r\xff\xff\xff\xff."  # pickle.Unpickler takes 32 GB here
    assert torch_zip.read(written(tmp_path, zipped(data))) == {}


def test_a_dict_in_itself_is_read():
    found = load(b"\x80\x02}q\x00X\x01\0\0\0xh\x00s.", {}, lambda key: None, "this")
    assert found["x"] is found


def test_a_pickle_that_is_longer_than_tensors_need_is_refused(tmp_path):
    data = b"\x80\x02" + b"]" * 5_000_000
    with pytest.raises(CheckpointError, match=r"is a pickle of 5,000,002 bytes, expected at most"):
        torch_zip.read(written(tmp_path, zipped(data)))


def test_the_tensor_that_the_lies_below_are_made_of(tmp_path):
    found = torch_zip.read(written(tmp_path, zipped(tensor(), [SIX.tobytes()])))
    np.testing.assert_array_equal(found["x"], SIX.reshape(2, 3))


LIES = {
    "numel": (tensor(numel=10**12), r"storage '0' has 24 bytes, expected 4,000,000,000,000"),
    "fewer": (tensor(numel=5), r"storage '0' has 24 bytes, expected 20"),
    "negative": (tensor(numel=-6), r"a storage without a name or a size"),
    "another kind": (tensor(kind="torch\nDoubleStorage\n"), r"has 24 bytes, expected 48"),
    "offset": (tensor(offset=1), r"6 elements up to place 6 in a storage of 6"),
    "stride": (tensor(strides=(4, 1)), r"6 elements up to place 6 in a storage of 6"),
    "backwards": (tensor(strides=(-3, 1)), r"a tensor with a size, stride or offset that is none"),
    "expanded": (tensor(sizes=(10**9, 10**9), strides=(0, 0)), r"one must be cloned before"),
    "sizes of text": (tensor(sizes=("2", 3)), r"a tensor with a size, stride or offset that is"),
    "true": (tensor(sizes=(2, True)), r"a tensor with a size, stride or offset that is none"),
    "too many axes": (tensor(sizes=(1,) * 99, strides=(1,) * 99), r"without sizes or strides"),
    "no strides": (tensor(strides=()), r"damaged: ValueError: zip"),
    "empty and huge": (tensor(sizes=(0, 2**62), strides=(1, 1)), r"damaged: ValueError"),
    "outside": (tensor(key="../../../etc/passwd"), r"storage '../../../etc/passwd' has no bytes"),
}


@pytest.mark.parametrize(("data", "message"), LIES.values(), ids=LIES.keys())
def test_sizes_that_lie_are_refused(data, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        torch_zip.read(written(tmp_path, zipped(data, [SIX.tobytes()])))


def test_compressed_doubled_and_misplaced_entries_are_refused(tmp_path):
    bomb = zipped(tensor(numel=25_000_000), [bytes(100_000_000)], packing=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 200_000
    with pytest.raises(CheckpointError, match=r"entries that are compressed or twice there"):
        torch_zip.read(written(tmp_path, bomb))
    out = io.BytesIO(zipped(tensor(), [SIX.tobytes()]))
    with zipfile.ZipFile(out, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", b"")
    with pytest.raises(CheckpointError, match=r"compressed or twice there"):
        torch_zip.read(written(tmp_path, out.getvalue()))
    with pytest.raises(CheckpointError, match=r"damaged: KeyError"):
        torch_zip.read(written(tmp_path, zipped(tensor(), root="../up")))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "text")
    with pytest.raises(CheckpointError, match=r"holds readme.txt, expected one 'data.pkl' and its"):
        torch_zip.read(tmp_path / "other.zip")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.pt", "other.zip"]


def test_an_entry_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    data = zipped(tensor(numel=2**28), [SIX.tobytes()])
    lying = data.replace((24).to_bytes(4, "little") * 2, (2**30).to_bytes(4, "little") * 2)
    assert lying != data
    with pytest.raises(CheckpointError, match=r"bytes and claims entries of 1,073,74"):
        torch_zip.read(written(tmp_path, lying))


def test_other_files_say_what_they_are(tmp_path):
    with pytest.raises(CheckpointError, match=r"There is no file .*nowhere.pt, expected one that"):
        torch_zip.read(tmp_path / "nowhere.pt")
    legacy = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    with pytest.raises(CheckpointError, match=r"format from before 1.6, expected the zip .* again"):
        torch_zip.read(written(tmp_path, legacy))
    with pytest.raises(CheckpointError, match=r"starts with b'GGUF', expected a zip file"):
        torch_zip.read(written(tmp_path, b"GGUF data"))
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/byteorder", b"big")
    with pytest.raises(CheckpointError, match=r"saved on a big-endian machine, expected little"):
        torch_zip.read(tmp_path / "file.pt")


def test_a_file_that_is_cut_short_is_damaged(tmp_path):
    whole = KINDS.read_bytes()
    for length in range(0, len(whole), 211):
        with pytest.raises(CheckpointError):
            torch_zip.read(written(tmp_path, whole[:length]))


PICKLE, STORED = parts_of(KINDS)
CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)


def changed(data, changes):
    out = bytearray(data)
    for at, byte in changes:
        out[at % len(out)] = byte
    return bytes(out)


@settings(max_examples=300, deadline=2000, derandomize=True)
@given(changes=CHANGES, whole=st.booleans())
def test_changed_bytes_give_a_dict_or_a_lora_error(changes, whole, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "fuzz.pt"
    data = KINDS.read_bytes()
    file.write_bytes(changed(data, changes) if whole else zipped(changed(PICKLE, changes), STORED))
    said = str(file)
    try:
        assert isinstance(torch_zip.read(file), dict)
    except LoraError as e:
        said = str(e)
    assert str(file) in said
    assert len(said) < 1000
