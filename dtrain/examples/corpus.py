"""Text to learn from: any files, as one long array of bytes, cut into windows."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor
from torch.utils.data import Dataset

from dtrain.errors import ConfigError


def standard_library(folder: Path) -> list[Path]:
    """Every module of Python's standard library, sorted, without its tests and the installed packages."""
    others = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in others]  # to look into them first takes half a second
        found += [Path(parent, name) for name in files if name.endswith(".py")]
    return sorted(found)


def text_files(folder: Path) -> list[Path]:
    """Every file below a folder, sorted, but for hidden ones and binaries: those with a NUL byte early on."""
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            with path.open("rb") as file:
                if b"\0" not in file.read(8192):
                    found.append(path)
    return found


def read_corpus(data: Sequence[Path] = ()) -> npt.NDArray[np.uint8]:
    """Read all text into one array, file after file.

    :param data: files, read as they are, and folders, of which all text is read. Empty: the standard library.
    :raises ConfigError: one of them does not exist, cannot be read, or has not a byte of text in it.
    """
    parts: list[npt.NDArray[np.uint8]] = []
    for source in data or [Path(sysconfig.get_path("stdlib"))]:
        if not source.exists():
            raise ConfigError(
                f"--data {source}: there is no such file or folder (looked for {source.absolute()}); correct "
                "the path, or leave --data out to train on Python's standard library"
            )
        try:
            if not data:
                files = standard_library(source)
            elif source.is_dir():
                files = text_files(source)
            else:
                files = [source]
            read = [np.fromfile(file, dtype=np.uint8) for file in files]
        except OSError as error:
            raise ConfigError(f"--data {source}: {error}; make it readable, or name other text") from error
        if not any(part.size for part in read):
            raise ConfigError(
                f"--data {source}: holds no text ({len(files)} files looked at; in a folder, hidden and "
                "binary ones do not count); name a file or a folder that holds some"
            )
        parts += read
    return np.concatenate(parts)


class Windows(Dataset[Tensor]):
    """The corpus, cut into windows of context + 1 bytes: the last byte of one is the first of the next.

    :raises ConfigError: the corpus is too short for a single window.
    """

    def __init__(self, corpus: npt.NDArray[np.uint8], context: int) -> None:
        if context < 1:
            raise ConfigError(f"--context {context}: must be 1 or more; it is the bytes seen at once, such as 128")
        if corpus.size < context + 1:
            raise ConfigError(
                f"--context {context}: one window takes {context + 1} bytes, and the text of --data has only "
                f"{corpus.size}; name more text, or a --context of {max(corpus.size - 1, 1)} or less"
            )
        self.corpus = corpus
        self.context = context

    def __len__(self) -> int:
        return (self.corpus.size - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """All samples of a batch in one go: where it exists, it is called in place of __getitem__."""
        starts = np.asarray(indices, dtype=np.int64) * self.context
        windows = self.corpus[starts[:, None] + np.arange(self.context + 1)]
        return list(torch.from_numpy(windows))

    def fingerprint(self) -> str:
        """Tells this text from another of the same length; dtrain saves it with the position in the data."""
        return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(self.corpus).data)


def collate(samples: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Make a batch of windows: what the model sees, and at each place the byte that comes next."""
    windows = torch.stack(list(samples)).long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
