"""`Choice`: what patterns choose by whole dotted names, as a shell would. An object's name stands for all of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from dtrain.errors import StateError, UsageError


class Choice:
    """What `only` and `skip` choose."""

    def __init__(self, only: Sequence[str], skip: Sequence[str]) -> None:
        self.only = only
        self.skip = skip

    def __call__(self, name: str) -> bool:
        return (not self.only or matches(name, self.only)) and not matches(name, self.skip)

    def any(self, name: str, names: Iterable[str]) -> bool:
        """Whether something of it is chosen, be it a tensor or what holds several of `names`."""
        return any(map(self, _inside(name, names)))

    def all(self, name: str, names: Iterable[str]) -> bool:
        """Whether all of it is chosen."""
        return all(map(self, _inside(name, names)))

    def whole(self, name: str, leaves: Sequence[str]) -> bool:
        """Whether something is chosen that means nothing in part. :raises StateError: a part of it is."""
        count = sum(map(self, leaves))
        if 0 < count < len(leaves):
            raise StateError(
                f"{name} can be loaded only as a whole, and the patterns choose {count} of {len(leaves)} of its "
                f"values; choose or skip {name + '*'!r}"
            )
        return count > 0


def _inside(name: str, names: Iterable[str]) -> list[str]:
    return [inner for inner in names if inner.startswith(f"{name}.")] or [name]


def matches(name: str, patterns: Iterable[str]) -> bool:
    named = name, name.partition(".")[0]
    return any(fnmatchcase(part, pattern) for pattern in patterns for part in named)


def patterns_of(option: str, given: Iterable[str]) -> list[str]:
    """:raises UsageError: they are none."""
    patterns = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise UsageError(f"{option}={given!r}: {option} takes patterns, such as ['model.head.*']")
    return patterns


def check_patterns(option: str, patterns: Iterable[str], names: Iterable[str], place: str) -> None:
    """:raises StateError: a pattern matches nothing."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.4)
            hint = f"the closest are {', '.join(close)}" if close else f"there are {', '.join(sorted(names)[:3])}, ..."
            raise StateError(f"{option}={pattern!r} matches nothing in {place} or in the objects; {hint}")
