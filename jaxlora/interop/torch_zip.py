"""Reads and writes the files of `torch.save`, without torch and without running what they hold.

Such a file is a zip of `<root>/data.pkl`, a pickle of the object, and `<root>/data/<n>`, the bytes
of each storage. The pickle names the storages and how tensors lie in them.
"""

import functools
import io
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxlora.errors import CheckpointError, LoraError, listing
from jaxlora.interop.unpickle import Known, load
from jaxlora.whole import write_whole

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
"""{torch's class of a storage: the dtype of its elements}."""

UNTYPED = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
"""The dtypes without such a class; their tensors name them."""

_ZIP, _LEGACY = (
    b"PK\x03\x04",
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x02}", b"\x80\x02c"),
)
_MOST_AXES = 32


def read(file: str | os.PathLike[str]) -> dict[Any, Any]:
    """Read a file that `torch.save` wrote of a dict.

    Args:
      file: the file. The format from before torch 1.6 is no zip, and refused.

    Returns:
      The dict. Tensors are NumPy arrays that cannot be written to; those that share a storage in
      torch share it here. Dicts, lists, tuples, numbers and text are as in the file.

    Raises:
      CheckpointError: no such file, one that is damaged, that holds other objects than these, or
        whose sizes contradict each other. No code of the file is run.

    Example:
      >>> import tempfile
      >>> file = write(tempfile.mkdtemp() + "/two.pt", {"fc.lora_A": np.ones((2, 3), np.float32)})
      >>> read(file)["fc.lora_A"].shape
      (2, 3)
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}, expected one that `torch.save` wrote.")
    with path.open("rb") as start:
        _check_is_zip(path, start.read(16))
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _Entries(archive, path)
            found = load(entries.read("data.pkl"), _known(), entries.storage, str(path))
    except LoraError:
        raise
    except Exception as e:  # whatever a broken zip or pickle raises
        said = str(e).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"{path} is damaged: {type(e).__name__}: {said}. Fetch or save it again."
        ) from e
    if type(found) is not dict:
        kind = "tensor" if isinstance(found, np.ndarray) else type(found).__name__
        raise CheckpointError(f"{path} holds a {kind}, expected a dict of tensors.")
    return found


def write(
    file: str | os.PathLike[str], tensors: Mapping[str, Any], *, overwrite: bool = False
) -> Path:
    """Write a dict of tensors as `torch.save` does; `torch.load(weights_only=True)` reads it.

    Args:
      file: where.
      tensors: {name: array}.
      overwrite: replace a file that is there.

    Returns:
      The absolute path.

    Raises:
      CheckpointError: the file is there, or an array has a dtype that torch has not.
    """
    arrays = {name: np.asarray(x) for name, x in tensors.items()}
    storages = {dtype: storage for storage, dtype in STORAGES.items()}
    for name, x in arrays.items():
        if x.dtype.name not in storages:
            raise CheckpointError(
                f"{name} has dtype {x.dtype.name}, expected one of {', '.join(storages)}."
            )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:

        def put(name: str, data: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)  # of 1980: equal bytes

        put("data.pkl", _pickled(arrays, storages))
        put("byteorder", b"little")
        for n, x in enumerate(arrays.values()):
            put(f"data/{n}", x.astype(x.dtype.newbyteorder("<")).tobytes())
        put("version", b"3\n")
    return write_whole(file, out.getvalue(), overwrite=overwrite)


def _check_is_zip(path: Path, start: bytes) -> None:
    if start.startswith(_ZIP):
        return
    if start.startswith(_LEGACY):
        raise CheckpointError(
            f"{path} is in torch's format from before 1.6, expected the zip of today. "
            "Save it again, in torch: `torch.save(torch.load(file, weights_only=True), file)`."
        )
    raise CheckpointError(
        f"{path} starts with {start[:4]!r}, expected a zip file that `torch.save` wrote."
    )


class _Storage(NamedTuple):
    """The bytes of a storage, and their dtype if its class has one."""

    data: bytes
    dtype: str | None


class _Entries:
    """The entries of the zip. Nothing is extracted, and each is as long as the file says."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self.archive, self.path = archive, path
        infos = archive.infolist()
        roots = [i.filename.partition("/")[0] for i in infos if i.filename.endswith("/data.pkl")]
        if len(roots) != 1:
            raise CheckpointError(
                f"{path} holds {listing(i.filename for i in infos) or 'nothing'}, expected one "
                "'data.pkl' and its storages, as `torch.save` writes them."
            )
        self.root = roots[0]
        self.infos = {i.filename: i for i in infos}
        packed = [i for i in infos if i.compress_type != zipfile.ZIP_STORED]
        if packed or len(self.infos) < len(infos):
            raise CheckpointError(
                f"{path} holds entries that are compressed or twice there, expected none: "
                "`torch.save` writes no such file."
            )
        total, there = sum(i.file_size for i in infos), path.stat().st_size
        if total > there:
            raise CheckpointError(
                f"{path} has {there:,} bytes and claims entries of {total:,}: it is damaged."
            )
        if f"{self.root}/byteorder" in self.infos and self.read("byteorder") != b"little":
            raise CheckpointError(f"{path} was saved on a big-endian machine, expected little.")
        self.data = functools.cache(self.read)

    def read(self, name: str) -> bytes:
        return self.archive.read(self.infos[f"{self.root}/{name}"])

    def storage(self, found: Any) -> _Storage:
        """The storage of a persistent id."""
        what, kind, key, _, numel = found
        if what != "storage" or not isinstance(kind, Known):
            raise TypeError("a persistent id that is no storage")
        if type(key) is not str or type(numel) is not int or numel < 0:
            raise TypeError("a storage without a name or a size")
        dtype = STORAGES.get(kind.name.partition(" ")[2])
        info = self.infos.get(f"{self.root}/data/{key}")
        expected = numel * (jnp.dtype(dtype).itemsize if dtype else 1)
        if info is None or info.file_size != expected:
            raise CheckpointError(
                f"{self.path}: storage {key[:20]!r} has "
                f"{'no bytes' if info is None else f'{info.file_size:,} bytes'}, expected "
                f"{expected:,}. The file is damaged."
            )
        return _Storage(self.data(f"data/{key}"), dtype)


def _known() -> dict[str, Any]:
    """What a global of the pickle makes. Names without a maker can only be named."""
    return {
        "collections OrderedDict": lambda: {},
        "torch._utils _rebuild_tensor_v2": _tensor,
        "torch._utils _rebuild_tensor_v3": _untyped_tensor,
        "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
        "torch Size": lambda sizes: tuple(sizes),
        "torch.storage UntypedStorage": None,
        **{f"torch {storage}": None for storage in STORAGES},
        **{f"torch {dtype}": None for dtype in (*STORAGES.values(), *UNTYPED)},
    }


def _tensor(
    storage: Any, offset: Any, sizes: Any, strides: Any, *_: Any, dtype: str | None = None
) -> np.ndarray:
    """A tensor in its storage, after checking that it lies in it."""
    if not isinstance(storage, _Storage):
        raise TypeError(f"a tensor in a {type(storage).__name__}")
    for part in (sizes, strides):
        if type(part) is not tuple or len(part) > _MOST_AXES:
            raise TypeError("a tensor without sizes or strides")
    numbers = (offset, *sizes, *strides)
    if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise ValueError("a tensor with a size, stride or offset that is none")
    kind = jnp.dtype(dtype or storage.dtype)
    flat = np.frombuffer(storage.data, kind)
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    count = math.prod(sizes)
    if count and (last >= flat.size or count > flat.size):
        raise ValueError(
            f"a tensor of {count:,} elements up to place {last:,} in a storage of {flat.size:,}; "
            "an expanded one must be cloned before it is saved"
        )
    if not count:
        return np.zeros(sizes, kind)
    return np.lib.stride_tricks.as_strided(
        flat[offset:], sizes, [step * kind.itemsize for step in strides], writeable=False
    )


def _untyped_tensor(
    storage: Any, offset: Any, sizes: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> np.ndarray:
    name = dtype.name.partition(" ")[2]
    return _tensor(storage, offset, sizes, strides, dtype=name)


def _pickled(arrays: Mapping[str, np.ndarray], storages: Mapping[str, str]) -> bytes:
    """The opcodes of {name: tensor}, those that `torch.save` writes by protocol 2."""

    def text(x: str) -> bytes:
        data = x.encode()
        return b"X" + len(data).to_bytes(4, "little") + data

    def number(n: int) -> bytes:
        data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    def numbers(ns: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, ns)) + b"t"

    parts = [b"\x80\x02}("]
    for n, (name, x) in enumerate(arrays.items()):
        strides = tuple(math.prod(x.shape[i + 1 :]) for i in range(x.ndim))
        kind = f"ctorch\n{storages[x.dtype.name]}\n".encode()
        storage = b"(" + text("storage") + kind + text(str(n)) + text("cpu") + number(x.size)
        parts += [
            text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(",
            storage + b"tQ" + number(0) + numbers(x.shape) + numbers(strides),
            b"\x89ccollections\nOrderedDict\n)RtR",
        ]
    return b"".join([*parts, b"u."])
