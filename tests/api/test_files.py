"""`mergeopt merge` and `mergeopt import`: from files to files, without a service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from api.cli import app
from optimizer.recipe import Recipe
from optimizer.spec import ModelRef, parse_spec
from tests.workers.models import tiny_llama
from workers.checkpoints import open_checkpoint

TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "models/base",
    "models": [
        {"model": "models/one", "parameters": {"weight": 0.6}},
        {"model": "models/two", "parameters": {"weight": [0.2, 0.4]}},
    ],
    "parameters": {"density": 0.5},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a base and two experts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for seed, name in enumerate(("base", "one", "two")):
        tiny_llama(tmp_path / "models" / name, seed=seed)
    (tmp_path / "mergekit.yml").write_text(yaml.safe_dump(TIES))
    return tmp_path


def run(*words: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(words), input=stdin)


def succeed(*words: str, stdin: str | None = None) -> str:
    result = run(*words, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: str) -> str:
    result = run(*words)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


def fixed(**changes: Any) -> str:
    """The file with numbers only."""
    models = [{"model": f"models/{name}", "parameters": {"weight": 0.5}} for name in ("one", "two")]
    data = {**TIES, "models": models, **changes}
    Path("fixed.yml").write_text(yaml.safe_dump(data))
    return "fixed.yml"


def test_from_mergekits_file_to_a_model_and_back(here: Path) -> None:
    assert succeed("import", fixed(), "--out", "recipe.json").strip() == "recipe.json: a recipe"
    recipe = Recipe.parse(json.loads(Path("recipe.json").read_text()))
    assert list(recipe.models) == ["base", "one", "two"]
    assert recipe.models["one"].digest == open_checkpoint(here / "models" / "one", "one").digest
    assert succeed("merge", "recipe.json", "out").strip() == "out"
    assert succeed("merge", "out/recipe.json", "again", "--shard-size", "5kb").strip() == "again"
    assert len(list(Path("again").glob("*.safetensors"))) > 1
    first, second = (open_checkpoint(here / name, name).digest for name in ("out", "again"))
    assert first == second
    succeed("import", "out/mergekit.yml", "--out", "same.json")
    written = Recipe.parse(json.loads(Path("same.json").read_text()))
    succeed("merge", "same.json", "third")
    assert open_checkpoint(here / "third", "third").digest == first
    assert written.fingerprint == recipe.fingerprint


def test_a_list_makes_a_job(here: Path) -> None:
    succeed("import", "mergekit.yml", "--out", "job.yml")
    job = yaml.safe_load(Path("job.yml").read_text())
    assert job["merge"]["bounds"] == {"low": 0.2, "high": 0.6}
    assert job["merge"]["granularity"] == {"layers": "each"}
    objective = {"name": "x", "evaluator": "perplexity", "data": {"path": "data"}}
    assert parse_spec({**job, "objectives": [objective], "budget": {"evaluations": 1}}).base == ModelRef(
        path="models/base"
    )
    recipe = json.loads(succeed("import", "mergekit.yml", "--recipe"))
    assert recipe["root"]["coefficients"] == [[0.6, 0.2], [0.6, 0.4]]
    assert "merge" in yaml.safe_load(succeed("import", fixed(), "--job"))


def test_files_are_not_overwritten_without_being_asked(here: Path) -> None:
    fixed()
    succeed("import", "fixed.yml", "--out", "recipe.json")
    assert "exists already" in refused("import", "fixed.yml", "--out", "recipe.json")
    succeed("import", "fixed.yml", "--out", "recipe.json", "--overwrite")
    succeed("merge", "recipe.json", "out")
    before = load_file("out/model.safetensors")
    assert "exists already" in refused("merge", "recipe.json", "out")
    succeed("merge", "recipe.json", "out", "--overwrite", "--head", "one")
    assert load_file("out/model.safetensors").keys() == before.keys()
    assert "no earlier export" in refused("merge", "recipe.json", "models", "--overwrite")
    assert sorted(path.name for path in (here / "models").iterdir()) == ["base", "one", "two"]


def test_where_models_are(here: Path) -> None:
    succeed("import", fixed(), "--out", "recipe.json")
    (here / "models").rename(here / "elsewhere")
    message = refused("merge", "recipe.json", "out")
    assert "does not exist" in message and "--root" in message
    named = [word for name in ("base", "one", "two") for word in ("--model", f"{name}=elsewhere/{name}")]
    succeed("merge", "recipe.json", "out", *named)
    (here / "far").mkdir()
    (here / "elsewhere").rename(here / "far" / "models")
    succeed("merge", "recipe.json", "out2", "--root", "far")
    named[-1] = "two=far/models/one"
    assert "not the model 'two'" in refused("merge", "recipe.json", "out3", "--root", "far", *named[-2:])
    assert "write it as NAME=DIRECTORY" in refused("merge", "recipe.json", "out3", "--model", "two")
    assert not Path("out3").exists()


def test_a_candidate_as_it_is_shown(here: Path) -> None:
    recipe = json.loads(succeed("import", fixed()))
    succeed("merge", "-", "out", stdin=json.dumps({"index": 3, "recipe": recipe}))
    assert Path("out/recipe.json").is_file()


def test_an_adapter(here: Path) -> None:
    succeed("import", fixed(), "--out", "recipe.json")
    result = run("merge", "recipe.json", "out", "--as-adapter", "4")
    assert result.exit_code == 0 and "the adapter differs from the merge by" in result.stderr
    assert json.loads(Path("out/adapter_config.json").read_text())["r"] == 4


def test_notes_and_errors(here: Path) -> None:
    result = run("import", fixed(dtype="float16"), "--out", "recipe.json")
    assert "note: dtype is ignored" in result.stderr
    Path("bad.yml").write_text("merge_method: linear\nmodels: [{model: models/base}]\n")
    assert "no weight of models/base is given" in refused("import", "bad.yml", "--recipe")
    Path("bad.yml").write_text("merge_method: linear\nmodels: [{modell: x}]\n")
    assert "bad.yml.models.0.model" in refused("import", "bad.yml")
    assert "'5 apples' is no size" in refused("merge", "recipe.json", "out", "--shard-size", "5 apples")
    assert "is no expert" in refused("merge", "recipe.json", "out", "--head", "three")
    assert "is no model" in refused("merge", "recipe.json", "out", "--tokenizer-from", "three")
    assert not Path("out").exists()
