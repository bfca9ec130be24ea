"""Values that break what reads them: by name, a function that makes one."""

import enum
import json
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch

from hf_tokenprune import PruningConfig, PruningStage


class Broken:
    """Raises in everything that it can be asked, its class included."""

    def _raise(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("asked a broken object")

    __repr__ = __str__ = __bool__ = __len__ = __iter__ = __eq__ = __ne__ = __lt__ = __gt__ = __contains__ = _raise
    __getitem__ = __int__ = __float__ = __index__ = __abs__ = __getattr__ = __format__ = __class_getitem__ = _raise
    __le__ = __ge__ = __round__ = __trunc__ = __floor__ = __ceil__ = keys = items = _raise
    __hash__ = object.__hash__
    __class__ = property(_raise)


def broken(kind: type) -> Any:
    """One of a kind whose methods raise."""
    names = [name for name in vars(Broken) if name not in ("__module__", "__dict__", "__weakref__", "__doc__")]
    return type(f"Broken{kind.__name__}", (kind,), {name: vars(Broken)[name] for name in names})()


class Endless(Sequence):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, place: Any) -> int:
        return 1


class EndlessMapping(Mapping):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, key: Any) -> int:
        return 1

    def __iter__(self) -> Any:
        while True:
            yield "preset"


class NoHash(type):
    __hash__ = None


class OfNoHash(metaclass=NoHash):
    pass


class Untrue:
    __class__ = dict


class Name(str):
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    def __hash__(self) -> int:
        return 7


class Level(enum.IntEnum):
    TWO = 2


class Way(str, enum.Enum):
    PACKED = "packed"


@cache
def deep(levels: int, kind: type = list) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"stages": value} if kind is dict else kind([value])
    return value


def ring() -> list:
    value: list = [1]
    value.append(value)
    return value


HOSTILE: dict[str, Callable[[], Any]] = {
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "5000 digits": lambda: 10**5000,
    "-5000 digits": lambda: -(10**5000) - 7,
    "digits in a list": lambda: [10**5000, 3],
    "a fraction of digits": lambda: Fraction(10**5000, 3),
    "401 digits": lambda: 10**400,
    "2^31": lambda: 2**31,
    "2^63": lambda: 2**63,
    "tiny": lambda: 5e-324,
    "-0.0": lambda: -0.0,
    "1e308": lambda: 1e308,
    "complex": lambda: 1 + 2j,
    "decimal": lambda: Decimal("0.5"),
    "decimal nan": lambda: Decimal("sNaN"),
    "fraction": lambda: Fraction(1, 3),
    "int64": lambda: np.int64(2),
    "uint8": lambda: np.uint8(2),
    "float32": lambda: np.float32(0.5),
    "float64": lambda: np.float64(0.3),
    "float16": lambda: np.float16(0.25),
    "longdouble": lambda: np.longdouble("1e4000"),
    "bool_": lambda: np.bool_(True),
    "str_": lambda: np.str_("top_k"),
    "datetime64": lambda: np.datetime64("2020-01-01"),
    "numpy nan": lambda: np.float32("nan"),
    "array": lambda: np.array([1, 2]),
    "array of one": lambda: np.array([0.5]),
    "array without axes": lambda: np.array(2),
    "large array": lambda: np.zeros((50, 50)),
    "array of objects": lambda: np.array([{}, None], dtype=object),
    "tensor": lambda: torch.tensor([1, 2]),
    "scalar tensor": lambda: torch.tensor(0.5),
    "large tensor": lambda: torch.zeros(99, 99),
    "meta tensor": lambda: torch.zeros(3, device="meta"),
    "bytes": lambda: b"top_k",
    "bytearray": lambda: bytearray(b"\1\2"),
    "memoryview": lambda: memoryview(b"\1\2"),
    "set": lambda: {1, 2},
    "frozenset": lambda: frozenset([3]),
    "deque": lambda: deque([1, 2]),
    "range": lambda: range(1, 3),
    "endless range": lambda: range(10**15),
    "generator": lambda: (i for i in range(2)),
    "function": lambda: max,
    "lambda": lambda: lambda: 1,
    "class": lambda: dict,
    "module": lambda: json,
    "object": object,
    "ellipsis": lambda: ...,
    "not implemented": lambda: NotImplemented,
    "long text": lambda: "top_k" * 10_000,
    "text of surrogates": lambda: "\ud800\0\n",
    "empty text": str,
    "long list": lambda: list(range(20_000)),
    "list of long texts": lambda: ["x" * 5000] * 40,
    "deep list": lambda: deep(50),
    "deeper list": lambda: deep(3_000),
    "deeper tuple": lambda: deep(3_000, tuple),
    "deeper dict": lambda: deep(3_000, dict),
    "ring": ring,
    "dict of other keys": lambda: {1: 2, None: 3, ("a",): 4},
    "large dict": lambda: {f"key{i}" * 50: i for i in range(500)},
    "ordered dict": lambda: OrderedDict(preset="top_k", layers=[1]),
    "stage": lambda: PruningStage([1], "cls_attention", "keep_rate", [0.5]),
    "config": lambda: PruningConfig.preset("top_k", layers=[1]),
    "waiting config": lambda: PruningConfig.preset("tome"),
    "level": lambda: Level.TWO,
    "way": lambda: Way.PACKED,
    "name": lambda: Name("top_k"),
    "path": lambda: Path("top_k"),
    "mock": Mock,
    "mock of a dict": lambda: Mock(spec=dict),
    "broken": Broken,
    "broken str": lambda: broken(str),
    "broken int": lambda: broken(int),
    "broken float": lambda: broken(float),
    "broken list": lambda: broken(list),
    "broken tuple": lambda: broken(tuple),
    "broken dict": lambda: broken(dict),
    "list of broken": lambda: [Broken(), broken(int)],
    "broken key": lambda: {Broken(): 1},
    "broken value": lambda: {"preset": Broken()},
    "endless": Endless,
    "endless mapping": EndlessMapping,
    "of no hash": OfNoHash,
    "untrue": Untrue,
    "long class name": lambda: type("C" * 9000, (), {})(),
}
