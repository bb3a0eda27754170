"""The registry that fills itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimizer.errors import InvalidInput
from optimizer.registry import Registry

FILES = {
    "__init__.py": 'from optimizer.registry import Registry\nTOOLS = Registry("tool", "toolbox")\n',
    "saw.py": 'from toolbox import TOOLS\n@TOOLS.register("saw")\ndef saw():\n    return "cuts"\n',
    "axe.py": 'from toolbox import TOOLS\n@TOOLS.register("axe")\ndef axe():\n    return "splits"\n',
}


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry[object]]:
    """The registry of a real package with two modules."""
    package = tmp_path / "toolbox"
    package.mkdir()
    for name, text in FILES.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import toolbox  # type: ignore[import-not-found]

    yield toolbox.TOOLS
    for name in [name for name in sys.modules if name.partition(".")[0] == "toolbox"]:
        del sys.modules[name]


def test_finds_every_module_of_its_package_once_it_is_read(tools: Registry[object]) -> None:
    assert "toolbox.saw" not in sys.modules
    assert list(tools) == ["axe", "saw"]
    assert len(tools) == 2
    assert "axe" in tools
    assert "toolbox.saw" in sys.modules


def test_finds_an_entry_without_being_listed_first(tools: Registry[object]) -> None:
    entry = tools["saw"]
    assert callable(entry)
    assert entry() == "cuts"
    assert tools.find("axe", "tool") is tools["axe"]


def test_unknown_names_are_answered_with_the_known_ones(tools: Registry[object]) -> None:
    with pytest.raises(InvalidInput, match="unknown tool 'drill'") as caught:
        tools.find("drill", "job.tool")
    assert caught.value.field == "job.tool"
    assert caught.value.remedy == "use one of: axe, saw"
    assert tools.get("drill") is None


def test_a_name_is_taken_once(tools: Registry[object]) -> None:
    assert len(tools) == 2
    with pytest.raises(ValueError, match="'saw' is registered twice"):
        tools.register("saw")(object())


def test_a_broken_module_is_not_hidden(tools: Registry[object], tmp_path: Path) -> None:
    (tmp_path / "toolbox" / "broken.py").write_text("raise RuntimeError('cannot start')\n")
    for _ in range(2):  # also the second time: half a registry would be worse
        with pytest.raises(RuntimeError, match="cannot start"):
            len(tools)
