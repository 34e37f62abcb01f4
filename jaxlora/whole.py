"""Files that are written whole or not at all."""

import os
import tempfile
from pathlib import Path

from jaxlora.errors import CheckpointError


def write_whole(file: str | os.PathLike[str], data: bytes, *, overwrite: bool = False) -> Path:
    """Write a file under another name, and rename it when it is whole.

    Args:
      file: where; its folder is made.
      data: what.
      overwrite: replace a file that is there.

    Returns:
      The absolute path.

    Raises:
      CheckpointError: there is a file and `overwrite` is not given, or a folder.

    Example:
      >>> write_whole(tempfile.mkdtemp() + "/new/file", b"data").read_bytes()
      b'data'
    """
    final = Path(file).expanduser().absolute()
    if final.is_dir():
        raise CheckpointError(f"{final} is a folder, expected the path of a file.")
    if final.exists() and not overwrite:
        raise CheckpointError(
            f"{final} is there already, expected a new path. `overwrite=True` replaces it."
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, final)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return final


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
