"""Search and test items are told apart by what they say, not by where they stand."""

from __future__ import annotations

from typing import Any

import pytest

from optimizer.errors import InvalidData
from workers.data import Rows, digest_of
from workers.splits import Splits, check_disjoint


def rows(*items: dict[str, Any], field: str = "objectives.0.data", **columns: str) -> Rows:
    return Rows(items, [f"line {n}" for n in range(1, len(items) + 1)], columns, field, digest_of(items))


def splits(search: Rows, test: Rows | None, name: str = "task") -> Splits:
    return Splits(name, search, test, ("text", "label"))


def test_other_items_pass() -> None:
    search = rows({"text": "a", "label": 0}, {"text": "b", "label": 1})
    check_disjoint([splits(search, rows({"text": "a", "label": 1}, {"text": "c", "label": 0}))])
    check_disjoint([splits(search, None)])


def test_the_same_item_is_refused_whatever_its_columns_are_called() -> None:
    search = rows({"text": "a", "label": 0}, {"text": "b", "label": 1, "split": "search"})
    test = rows({"word": "c", "label": 0}, {"word": "b", "label": 1, "id": 7}, field="objectives.0.test", text="word")
    with pytest.raises(InvalidData, match=r"1 of 2 test items .* line 2 is line 2 of the search data") as caught:
        check_disjoint([splits(search, test)])
    assert caught.value.field == "objectives.0.test"
    assert caught.value.remedy == "remove them from one of the two"


def test_other_objectives_search_items_count_too() -> None:
    shared = {"text": "a", "label": 0}
    first = splits(rows({"text": "b", "label": 0}), rows(shared, field="objectives.0.test"), "first")
    with pytest.raises(InvalidData, match="search items of objective 'second'"):
        check_disjoint([first, splits(rows(shared), None, "second")])


def test_only_some_of_many_are_listed() -> None:
    many = [{"text": str(n), "label": 0} for n in range(9)]
    with pytest.raises(InvalidData, match=r"9 of 9 .*; and 4 more"):
        check_disjoint([splits(rows(*many), rows(*many))])
