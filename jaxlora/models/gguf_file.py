"""The GGUF container: metadata and tensors of a file, every count held against the file's size."""

import dataclasses
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora.errors import CheckpointError, listing, optional

# The value types of the format, by number; 8 is a string and 9 an array.
_DTYPES = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8")
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor as it lies in the file: its type's number, numpy shape and bytes."""

    name: str
    type: int
    shape: tuple[int, ...]
    start: int
    n_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufFile:
    """An open GGUF file.

    Attributes:
      path: where it is.
      metadata: its keys and values; an array of numbers is numpy's, one of strings a list.
      entries: its tensors by their names in the file.
      data: the bytes of the file, not yet read.
    """

    path: Path
    metadata: Mapping[str, Any]
    entries: Mapping[str, Entry]
    data: np.ndarray

    def read(self, name: str) -> np.ndarray:
        """Read a tensor and dequantize it to float32.

        Args:
          name: its name in the file.

        Returns:
          An array of its own, never a view of the file.

        Raises:
          CheckpointError: gguf has no dequantization for its type.
          KeyError: there is no such tensor.
        """
        entry = self.entries[name]
        gguf = optional("gguf", f"Reading {self.path}")
        kind = gguf.GGMLQuantizationType(entry.type)
        raw = self.data[entry.start : entry.start + entry.n_bytes]
        try:
            array = gguf.dequantize(raw.reshape(*entry.shape[:-1], -1), kind)
        except NotImplementedError as e:
            raise CheckpointError(
                f"'{name}' in {self.path} has quantization type {kind.name}, which the package "
                "'gguf' cannot dequantize. Next: convert the file to Q8_0 or F16."
            ) from e
        return np.array(array, np.float32).reshape(entry.shape)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the metadata, or the default.

        Raises:
          CheckpointError: it is of another type.
        """
        value = self.metadata.get(key, default)
        if key in self.metadata and type(value) is not kind:
            raise CheckpointError(
                f"'{key}' in {self.path} is {value!r}, expected a value of type {kind.__name__}."
            )
        return value

    def number(self, key: str, default: Any = None, kind: type = int) -> Any:
        """A positive number of the metadata.

        Raises:
          CheckpointError: it is something else, or is not there and has no default.
        """
        value = self.get(key, kind, default)
        if value is None:
            group = key.partition(".")[0] + "."
            there = [k for k in self.metadata if k.startswith(group)] or ["none"]
            raise CheckpointError(
                f"{self.path} lacks the key '{key}'. Keys in '{group}': {listing(there, 20)}."
            )
        if not 0 < value < math.inf:
            raise CheckpointError(f"'{key}' in {self.path} is {value!r}, expected more than 0.")
        return value


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF file of version 2 or 3, little-endian. Only its header is read.

    Raises:
      CheckpointError: it is no GGUF file, of another version, damaged or cut short, or has a
        quantization type that the installed gguf does not know.
      MissingDependencyError: gguf is not installed.
    """
    gguf = optional("gguf", f"Reading {path}")
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is not a GGUF file: it is empty.")
    data = np.memmap(path, np.uint8, "r").view(np.ndarray)
    cursor = _Cursor(data, path)
    magic = bytes(cursor.data[:4])
    if magic != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'.")
    cursor.at = 4
    version = cursor.integer("<I", "the version")
    if version not in (2, 3):
        raise CheckpointError(
            f"{path} has GGUF version {version}, expected 2 or 3 in little-endian order."
        )
    n_tensors = cursor.count("tensors", 32)
    n_keys = cursor.count("keys", 13)
    metadata = {}
    for _ in range(n_keys):
        key = cursor.string("a key")
        metadata[key] = cursor.value(f"key '{key}'")
    found = [_read_description(cursor) for _ in range(n_tensors)]
    opened = GgufFile(path=path, metadata=metadata, entries={}, data=data)
    alignment = opened.number("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    entries = {}
    for name, shape, kind, offset in found:
        if name in entries:
            raise CheckpointError(f"{path} is damaged: it has the tensor '{name}' twice.")
        if kind not in gguf.GGML_QUANT_SIZES:
            raise CheckpointError(
                f"'{name}' in {path} has quantization type {kind}, which the installed 'gguf' does "
                "not know. Next: a newer 'gguf', or convert the file to Q8_0 or F16."
            )
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise CheckpointError(
                f"{path} is damaged: '{name}' has shape {shape}, expected rows of a multiple of "
                f"{block}, the block of its quantization."
            )
        n_bytes = math.prod(shape) // block * block_bytes
        end = start + offset + n_bytes
        if end > len(data):
            raise CheckpointError(
                f"{path} is damaged or cut short: '{name}' of shape {shape} ends at byte {end}, "
                f"and the file has {len(data)}. Fetch it again."
            )
        entries[name] = Entry(
            name=name, type=kind, shape=shape, start=start + offset, n_bytes=n_bytes
        )
    return dataclasses.replace(opened, entries=entries)


class _Cursor:
    """Reads on through the header, and never past the file's end."""

    def __init__(self, data: np.ndarray, path: Path) -> None:
        self.data = data.data
        self.at = 0
        self.path = path

    def take(self, n: int, what: str) -> memoryview:
        if n > len(self.data) - self.at:
            raise CheckpointError(
                f"{self.path} is damaged or cut short: {what} at byte {self.at} takes {n} bytes, "
                f"and the file has {len(self.data)}. Fetch it again."
            )
        self.at += n
        return self.data[self.at - n : self.at]

    def integer(self, form: str, what: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def count(self, what: str, least: int) -> int:
        """A count of things of at least `least` bytes each."""
        n = self.integer("<Q", f"the count of {what}")
        if n * least > len(self.data) - self.at:
            raise CheckpointError(
                f"{self.path} is damaged or cut short: it says that it has {n} {what}, more than "
                f"its {len(self.data)} bytes can hold. Fetch it again."
            )
        return n

    def string(self, what: str) -> str:
        raw = self.take(self.integer("<Q", what), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as e:
            raise CheckpointError(f"{self.path} is damaged: {what} is not UTF-8: {e}.") from e

    def value(self, what: str) -> Any:
        kind = self.integer("<I", what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            return self.scalars(kind, 1, what).item()
        kind = self.integer("<I", what)
        if kind == _STRING:
            n = self.count(f"strings in {what}", 8)
            return [self.string(what) for _ in range(n)]
        return self.scalars(kind, self.count(f"elements in {what}", 1), what)

    def scalars(self, kind: int, n: int, what: str) -> np.ndarray:
        name = _DTYPES[kind] if kind < len(_DTYPES) else None
        if name is None:
            raise CheckpointError(
                f"{self.path} is damaged: {what} has value type {kind}, which there is not, or "
                "is an array in an array."
            )
        dtype = np.dtype(name)
        return np.frombuffer(self.take(n * dtype.itemsize, what), dtype)


def _read_description(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """The name, shape, type and offset of a tensor."""
    name = cursor.string("the name of a tensor")
    what = f"the description of '{name}'"
    n_dims = cursor.integer("<I", what)
    if not 1 <= n_dims <= 4:
        raise CheckpointError(
            f"{cursor.path} is damaged: '{name}' has {n_dims} dimensions, expected 1 to 4."
        )
    shape = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims, what))[::-1]
    if 0 in shape:
        raise CheckpointError(f"{cursor.path} is damaged: '{name}' has shape {shape}.")
    return name, shape, cursor.integer("<I", what), cursor.integer("<Q", what)
