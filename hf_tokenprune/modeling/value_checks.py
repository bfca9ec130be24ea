"""How values from outside are read: each check returns a plain Python value, or refuses in one sentence that quotes it.

Values come from JSON, from numpy and from anybody's classes. An object may be untrue or raise in each of its methods,
a list may have no end and a number more digits than Python prints: none of that gets further than here.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from numbers import Integral, Real
from operator import index
from reprlib import Repr
from typing import Any


MOST = 2**31 - 1  # of an integer: no sample has so many tokens
HIGHEST = 1e30  # of a threshold: float32 holds it, and no score comes near
MOST_LAYERS = 10_000  # and of anything that there is one of per layer
MOST_IDS = 2**20  # of token ids: no vocabulary has more


# Quoting

LONGEST = 100  # characters of one quoted value


class _Short(Repr):
    """As `repr` has it, without the middle of what is long."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = self.maxarray = 16
        self.maxdict, self.maxlevel = 8, 4
        self.maxstring = self.maxother = LONGEST

    def repr1(self, value: Any, level: int) -> str:
        try:
            return super().repr1(value, level)
        except Exception:
            return f"<{type(value).__name__} that cannot be shown>"

    def repr_int(self, value: int, level: int) -> str:
        size = abs(value)
        if size < 10**40:
            return repr(value)
        digits = int(size.bit_length() * 0.30103) + 1  # or one less; Python does not print more than 4,300
        first, last = size // 10 ** (digits - 12), size % 10**8
        return f"{'-' * (value < 0)}{first}...{last:08d}"


def quoted(value: Any) -> str:
    """A value for a message: its `repr` in one line of at most `LONGEST` characters, whatever it is."""
    text = " ".join(_Short().repr(value).split())
    half = LONGEST // 2 - 2
    return text if len(text) <= LONGEST else f"{text[:half]}...{text[-half:]}"


# Plain values


def is_a(value: Any, kind: type | tuple[type, ...]) -> bool:
    """`isinstance` by an object's type: what it says of its class may be untrue, or raise."""
    try:
        return issubclass(type(value), kind)
    except Exception:  # of a type that has no hash
        return False


def plain_number(value: Any) -> int | float | None:
    """A number as Python has it; None: it is none, or no float holds it."""
    try:
        if is_a(value, Integral):
            return None if is_a(value, bool) else index(value)
        return float(value) if is_a(value, Real) else None
    except Exception:
        return None


def plain_text(value: Any) -> str | None:
    """Text without what a subclass adds to it; None: it is none."""
    return str.__str__(value) if is_a(value, str) else None


def is_false(value: Any) -> bool:
    """Whether Python takes it for False, or None."""
    try:
        return not value
    except Exception:
        return False


def plain(value: Any, levels: int = 4) -> Any:
    """In JSON's types, as far as it has them: numbers, texts, lists and dicts of them. The rest as it is, for a check
    to refuse."""
    number, text = plain_number(value), plain_text(value)
    if number is not None or text is not None:
        return number if text is None else text
    if not levels:
        return value
    if type(value) is dict:
        return {name: plain(item, levels - 1) for name, item in value.items()}
    entries = _entries(value, MOST_LAYERS)
    return value if entries is None or len(entries) > MOST_LAYERS else [plain(item, levels - 1) for item in entries]


def _entries(value: Any, most: int) -> list | None:
    """Those of a list or its like, one more than `most` where it has more; None: it is none."""
    bare = is_a(value, Sequence) and not is_a(value, (str, bytes, bytearray, memoryview))
    return _listed(value, most) if bare else None


def _listed(value: Iterable, most: int) -> list | None:
    try:
        return list(islice(iter(value), most + 1))
    except Exception:
        return None


# Checks


def check_number(name: str, value: Any) -> float:
    number = plain_number(value)
    if number is None or not abs(number) <= sys.float_info.max:  # an int beyond any float is not finite either
        raise ValueError(f"{name} ({quoted(value)}) must be a finite number")
    return float(number)


def check_integer(name: str, value: Any, minimum: int, most: int = MOST) -> int:
    number = plain_number(value)
    if not isinstance(number, int) or number < minimum:
        raise ValueError(f"{name} ({quoted(value)}) must be an integer >= {minimum}")
    if number > most:
        raise ValueError(f"{name} ({quoted(value)}) must be an integer <= {most}")
    return number


def check_choice(name: str, value: Any, known: Iterable[str]) -> str:
    text = plain_text(value)
    if text is None or text not in known:
        raise ValueError(f"unknown {name} {quoted(value)}; known: {', '.join(known)}")
    return text


def check_fields(of: str, given: Iterable[str], known: Iterable[str]) -> None:
    """of: what the names are fields of."""
    for name in given:
        if name not in known:
            raise ValueError(f"unknown field {quoted(name)} of {of}; known: {', '.join(known)}")


def check_bool(name: str, value: Any) -> bool:
    if not is_a(value, bool):
        raise ValueError(f"{name} ({quoted(value)}) must be True or False")
    return value


def check_sequence(name: str, value: Any, most: int = MOST_LAYERS) -> tuple:
    entries = _entries(value, most)
    if entries is None:
        raise ValueError(f"{name} ({quoted(value)}) must be a list")
    if len(entries) > most:
        raise ValueError(f"{name} ({quoted(value)}) must have at most {most} entries")
    return tuple(entries)


def check_mapping(name: str, value: Any, rule: str = "a dict") -> dict[str, Any]:
    """rule: what it must be."""
    try:
        keys = _listed(value, MOST_LAYERS) if is_a(value, Mapping) else None
        entries = None if keys is None else [(key, value[key]) for key in keys]
    except Exception:
        entries = None
    if entries is None:
        raise ValueError(f"{name} ({quoted(value)}) must be {rule}")
    for key, _ in entries:
        if plain_text(key) is None:
            raise ValueError(f"a name ({quoted(key)}) in {name} must be text")
    return {plain_text(key): entry for key, entry in entries}


def check_rate(name: str, value: Any) -> float:
    rate = check_number(name, value)
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"{name} ({quoted(value)}) must be in (0, 1]")
    return rate


def check_threshold(name: str, value: Any) -> float:
    threshold = check_number(name, value)
    if threshold < 0.0:
        raise ValueError(f"{name} ({quoted(value)}) must be >= 0")
    if threshold > HIGHEST:
        raise ValueError(f"{name} ({quoted(value)}) must be <= {HIGHEST}")
    return threshold


def check_count(name: str, value: Any) -> int:
    return check_integer(name, value, 1)


def check_removed(name: str, value: Any) -> int:
    return check_integer(name, value, 0)
