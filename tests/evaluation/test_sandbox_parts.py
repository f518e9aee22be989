"""The parts of the sandbox alone: the system call filter, the values that go between processes."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter, OrderedDict, deque
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from limbeck.evaluation.sandbox import syscalls
from limbeck.evaluation.sandbox.wire import decode, encode


def no_object(_: object) -> Any:
    pytest.fail("a plain value was taken for an object")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()) | st.binary()
    | st.complex_numbers(allow_nan=False) | st.fractions() | st.decimals(allow_nan=False) | st.dates() | st.timedeltas()
    | st.datetimes() | st.builds(lambda n: 7**n, st.integers(0, 6000)),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.integers() | st.text(), inner),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(PLAIN)
@example(7**5089)
@example([-0.0, (True, 1, 1.0)])
def test_values_come_back_with_their_type(value):
    data = encode(value, no_object)
    back = decode(data, no_object)
    # Also inside: their types are in the data. Not by repr, which long integers refuse.
    assert back == value and type(back) is type(value) and json.dumps(encode(back, no_object)) == json.dumps(data)


def test_containers_come_back_with_their_type():
    for value in (
        {1, 2}, frozenset("ab"), deque([1]), Counter("aab"), OrderedDict(b=1, a=2), bytearray(b"x"), range(1, 9, 3),
        [Fraction(1, 3), Decimal("0.10"), date(2020, 1, 2), timedelta(1, 2, 3)], float("inf"), "\ud800",
    ):  # fmt: skip
        back = decode(encode(value, no_object), no_object)
        assert back == value and type(back) is type(value)


@pytest.mark.parametrize("data", [[], ["made", "os", "system", ["tuple", ["x"]]], ["kept", "x"], ["no"], ["list", 3]])
def test_what_is_no_value_is_refused(data):
    with pytest.raises(ValueError, match="no value"):
        decode(data, lambda number: number)


ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000


def filtered(machine: str, number: int, arguments: tuple[int, ...] = (0,) * 6, audit: int | None = None) -> int:
    """What the filter says to a system call: the four instructions of classic BPF that it uses, one by one."""
    data = struct.pack("II Q 6Q", number, syscalls.MACHINES[machine][1] if audit is None else audit, 0, *arguments)
    code = list(struct.iter_unpack("HBBI", syscalls.program(machine)))
    word, place = 0, 0
    while True:
        operation, yes, no, value = code[place]
        place += 1
        match operation:
            case 0x20:
                (word,) = struct.unpack_from("I", data, value)
            case 0x54:
                word &= value
            case 0x15:
                place += yes if word == value else no
            case 0x06:
                return value
            case _:
                pytest.fail(f"instruction {operation:#x}")


@pytest.mark.parametrize("machine", syscalls.MACHINES)
def test_the_filter_allows_its_list_and_nothing_else(machine):
    place = syscalls.MACHINES[machine][0]
    allowed = {numbers[place] for numbers in syscalls.ALLOWED_SYSCALLS.values()} - {None}
    with_conditions = ((16, 72, 257, 302), (29, 25, 56, 261))[place]
    for number in range(600):
        if number not in with_conditions:
            assert filtered(machine, number) == (ALLOW if number in allowed else REFUSE), number
    # The numbers of the x32 interface, and those of another machine.
    assert all(filtered(machine, number | 0x40000000) == REFUSE for number in range(600))
    assert filtered(machine, 0, audit=0x40000003) == KILL
    ioctl, fcntl, openat, prlimit = with_conditions
    assert filtered(machine, ioctl, (0, 0x5401, 0, 0, 0, 0)) == ALLOW
    assert filtered(machine, ioctl, (0, 0x5412, 0, 0, 0, 0)) == REFUSE
    assert filtered(machine, fcntl, (0, 3, 0, 0, 0, 0)) == ALLOW
    assert filtered(machine, fcntl, (0, 8, 0, 0, 0, 0)) == REFUSE
    for flags, verdict in ((0, ALLOW), (os.O_TRUNC, REFUSE), (os.O_TRUNC | os.O_WRONLY | os.O_CREAT, ALLOW)):
        assert filtered(machine, openat, (0, 0, flags, 0, 0, 0)) == verdict
    for new_limit, verdict in ((0, ALLOW), (1, REFUSE), (1 << 40, REFUSE)):
        assert filtered(machine, prlimit, (0, 0, new_limit, 0, 0, 0)) == verdict
