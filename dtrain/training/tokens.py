"""Files of tokens that are larger than memory."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash

from dtrain.errors import DataError
from dtrain.observe.progress import bytes_bar
from dtrain.storage.places import is_remote

_CACHE = Path("~/.cache/dtrain/tokens")
_LOOKED_AT = 1 << 20


class Tokens:
    """A file of nothing but token numbers, cut into windows of `context + 1`: the last token of one is the first of the
    next. A map-style data set; of the file, only what is used is read.

    :param path: a file, or a URL that fsspec knows. What a URL stands for is copied to a folder of this machine
        first, once; give a URL inside of the training function, since a client may not be used before a fork.
    :param context: tokens that a model sees at once.
    :param dtype: of the numbers: uint16, int32, ...
    :param cache: that folder.
    :raises DataError: the file isn't there, or doesn't hold a single window.
    :raises OSError: it couldn't be copied for a reason that may pass.
    """

    def __init__(self, path: str | Path, context: int, dtype: str = "uint16", *, cache: str | Path = _CACHE) -> None:
        if isinstance(context, bool) or not isinstance(context, int) or context < 1:
            raise DataError(
                f"Tokens(context={context!r}): must be 1 or more; it is the tokens seen at once, such as 1024"
            )
        try:
            size = np.dtype(dtype).itemsize
            whole = np.issubdtype(dtype, np.integer)
        except TypeError:
            whole = False
        if not whole:
            raise DataError(f"Tokens(dtype={dtype!r}): must be a type of whole numbers, such as uint16 or int32")
        file = _copied(str(path), Path(cache).expanduser()) if is_remote(str(path)) else Path(path).expanduser()
        try:
            count = file.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; name the file of tokens") from error
        if not file.is_file():
            raise DataError(f"{path} is no file; name the file of tokens")
        if count % size or count < size * (context + 1):
            raise DataError(
                f"{path} has {count} bytes: that is no file of at least {context + 1} tokens of type {dtype} (context="
                f"{context}, and one for the last prediction); check its dtype, or make context smaller"
            )
        self.path = str(path)
        self.context = context
        self._tokens = np.memmap(file, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self.context

    def __getitem__(self, index: int) -> torch.Tensor:
        """:returns: int64, of shape (context + 1,)."""
        if not -len(self) <= index < len(self):
            raise IndexError(
                f"{self.path} has {len(self)} windows of {self.context} tokens: there is no number {index}"
            )
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """All windows of a batch in one go."""
        starts = [index * self.context for index in indices]
        windows = np.stack([self._tokens[start : start + self.context + 1] for start in starts])
        return list(torch.from_numpy(windows.astype(np.int64)))

    def fingerprint(self) -> str:
        """Of the first and the last megabyte."""
        raw = self._tokens.view(np.uint8)
        return xxhash.xxh3_64_hexdigest(bytes(raw[:_LOOKED_AT]) + bytes(raw[-_LOOKED_AT:]))


def _copied(url: str, cache: Path) -> Path:
    """The file on this machine; ranks that come at the same time wait for the one that copies."""
    import fsspec

    target = cache / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{url.rpartition('/')[2][-100:]}"
    half = Path(f"{target}.half")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with Path(f"{target}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.exists():
                return target
            with fsspec.open(url, "rb") as source, half.open("wb") as out, bytes_bar(source.size, url) as bar:
                while part := source.read(16 << 20):
                    out.write(part)
                    bar.update(len(part))
                out.flush()
                os.fsync(out.fileno())
                if source.size is not None and out.tell() != source.size:
                    raise OSError(f"{out.tell()} bytes came of {source.size}")
            half.rename(target)
    except Exception as error:
        what = f"{url} could not be copied to {half}: {type(error).__name__}: {error}"
        if isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError):
            raise DataError(what) from error
        raise OSError(what) from error  # another try may be worth it; not every client's own errors say so
    return target
