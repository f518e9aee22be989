"""Fingerprints and records that tell whether they are as written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.runtime.files import write_json
from limbeck.runtime.records import fingerprint, flatten, read_sealed, sealed
from limbeck.types import LimbeckError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner), max_leaves=8
)


@given(st.dictionaries(st.text(), JSON))
def test_fingerprint_ignores_the_order_of_keys(value: dict[str, object]) -> None:
    turned = dict(reversed(value.items()))
    assert fingerprint(value) == fingerprint(turned)
    assert fingerprint(value) != fingerprint({**value, "one more \x00": 1})


class TestSealing:
    def test_as_written(self, tmp_path: Path) -> None:
        record = {"a": 0.1 + 0.2, "b": {"10": None, 9: ["x", 1e300]}, "check": "old"}
        write_json(tmp_path / "a.json", sealed(record))
        assert read_sealed(tmp_path / "a.json") == {"a": 0.1 + 0.2, "b": {"10": None, "9": ["x", 1e300]}}

    @pytest.mark.parametrize("text", ["[]", "null", "3", '"text"', "{", "[" * 9000, '{"check": 1}', "\x80"])
    def test_something_else(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "a.json").write_text(text, "latin-1")
        with pytest.raises(LimbeckError, match=r"a\.json is damaged .*; delete it and run the same command again"):
            read_sealed(tmp_path / "a.json")

    def test_another_value(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", sealed({"a": 1, "b": 2}) | {"b": 3})
        with pytest.raises(LimbeckError, match="it is not what was written"):
            read_sealed(tmp_path / "a.json")


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}
