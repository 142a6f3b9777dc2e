"""The package's imports run one way: a module knows its own layer and those below it, none above."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From top to bottom. "__init__" stands for the names that dtrain/__init__.py gathers for users: what
# shows the package in use may import them; the layers they're gathered from may not.
LAYERS = (
    "cli",
    "examples",
    "__init__",
    "launch",
    "training",
    "elastic",
    "checkpoint",
    "observe",
    "config",
    "criteria",
    "storage",
    "errors",
    "ahead",
)


def imported_layers(path: PurePath, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and layer of each import of dtrain's own, wherever in the file it stands.

    Imports inside functions or under TYPE_CHECKING count: the reader has to follow them as well.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # One dot is the folder that the file lies in, for a package's __init__.py too.
            folder = path.parts[: len(path.parts) - node.level] if node.level else ()
            base = ".".join((*folder, *filter(None, [node.module])))
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *inner = name.split(".")
            if top != "dtrain":
                continue
            # `from dtrain import NAME` brings a layer or, failing that, a gathered name. A longer path
            # always runs through a layer, so an unlisted one there is not mistaken for a gathered name.
            gathered = not inner or (len(inner) == 1 and inner[0] not in LAYERS)
            yield node.lineno, "__init__" if gathered else inner[0]


def upward_imports(path: PurePath, source: str) -> list[str]:
    """What is wrong with the imports of the file at `path` (as in dtrain/cli/main.py)."""
    own = PurePath(path.parts[1]).stem
    if own == "__init__":
        return []  # it gathers names from everywhere, which is all that it does
    if own not in LAYERS:
        return [f"{path}: {own} is not one of the layers"]
    found = []
    for line, layer in imported_layers(path, ast.parse(source)):
        if layer not in LAYERS:
            found.append(f"{path}:{line}: {layer} is not one of the layers")
        elif LAYERS.index(layer) < LAYERS.index(own):
            found.append(f"{path}:{line}: {own} imports {layer}, which lies above it")
    return found


def test_every_module_imports_only_from_its_own_layer_and_those_below() -> None:
    files = sorted((ROOT / "dtrain").rglob("*.py"))
    assert files, "no module found: the check would hold of nothing"
    assert [fault for file in files for fault in upward_imports(file.relative_to(ROOT), file.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dtrain/storage/local.py", "import dtrain.checkpoint.commit"),
        ("dtrain/storage/local.py", "from dtrain.checkpoint import commit"),
        ("dtrain/storage/local.py", "from dtrain import checkpoint"),
        ("dtrain/storage/local.py", "from ..checkpoint.commit import Commit"),
        ("dtrain/storage/local.py", "from .. import checkpoint"),
        ("dtrain/storage/__init__.py", "from ..checkpoint import commit"),
        ("dtrain/storage/deep/local.py", "from ...checkpoint import commit"),
        ("dtrain/storage/local.py", "def late():\n    from dtrain.checkpoint import commit"),
        ("dtrain/storage/local.py", "from ..config import Config"),
        ("dtrain/examples/gpt.py", "from dtrain.cli.main import main"),
        ("dtrain/training/loop.py", "from dtrain import Run"),
        ("dtrain/training/loop.py", "import dtrain"),
        ("dtrain/training/loop.py", "from dtrain.utils.text import wrap"),
        ("dtrain/utils/text.py", "import os"),
    ],
)
def test_a_planted_upward_or_unplaced_import_is_found(path: str, source: str) -> None:
    assert len(upward_imports(PurePath(path), source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dtrain/cli/main.py", "from dtrain.examples import gpt"),
        ("dtrain/examples/gpt.py", "from dtrain import Run"),
        ("dtrain/training/loop.py", "from ..checkpoint.commit import Commit\nfrom . import step"),
        ("dtrain/training/__init__.py", "from .loop import Loop"),
        ("dtrain/config.py", "from .errors import ConfigError"),
        ("dtrain/errors.py", "import os, torch.distributed\nfrom collections.abc import Iterator"),
        ("dtrain/__init__.py", "from .training.loop import Loop"),
    ],
)
def test_imports_downwards_sideways_and_of_other_packages_are_let_through(path: str, source: str) -> None:
    assert upward_imports(PurePath(path), source) == []


def test_what_trainers_need_is_there_before_the_fork_and_not_looked_at_again() -> None:
    """The garbage collector was at rest meanwhile, and works again."""
    ask = "import gc, sys, dtrain; print('torch._dynamo' in sys.modules, gc.isenabled(), gc.get_freeze_count() > 10**5)"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True"] * 3
