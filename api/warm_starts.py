"""Warm starts from earlier jobs: their best candidates become candidates of the new job, which then stands alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.store.candidates import check_candidate
from api.store.ports import JobStore
from optimizer.errors import InvalidInput, NotFound
from optimizer.problem import Problem
from optimizer.recipe import ModelId, Recipe
from optimizer.spec import CandidateInput, JobSpec, WarmStarts

MOST = 20
"""Candidates taken from each job: the best of its front by weighted mean loss."""


def resolve(spec: JobSpec, problem: Problem, store: JobStore) -> JobSpec:
    """Return ``spec`` with the best candidates of ``warm_starts.jobs`` as recipes among ``warm_starts.candidates``.

    The jobs are not named any more, as what they find later is nothing to the new one; the labels say where each candidate
    came from. Models may have other names in the two jobs, but must be the same by digest.

    Args:
        problem: the new job's inputs, with the digests of its models.

    Raises:
        InvalidInput: naming ``warm_starts.jobs.N``: no such job, one without candidates, or one over other models.
    """
    wanted = spec.warm_starts
    found: dict[str, CandidateInput] = {}
    for number, job_id in enumerate(wanted.jobs):
        for recipe, candidate in _candidates(job_id, f"warm_starts.jobs.{number}", spec, problem, store):
            found.setdefault(recipe.fingerprint, candidate)
    if not wanted.jobs:
        return spec
    candidates = [*wanted.candidates, *found.values()]
    most = next(part.max_length for part in WarmStarts.model_fields["candidates"].metadata)
    if len(candidates) > most:
        raise InvalidInput(
            f"with those of other jobs there are {len(candidates)} candidates, more than {most}",
            field="warm_starts.candidates",
            remedy="leave some out",
        )
    return spec.model_copy(update={"warm_starts": wanted.model_copy(update={"jobs": [], "candidates": candidates})})


def _candidates(
    job_id: str, field: str, spec: JobSpec, problem: Problem, store: JobStore
) -> list[tuple[Recipe, CandidateInput]]:
    try:
        best = store.best(job_id, MOST)
    except NotFound as error:
        raise InvalidInput(
            f"there is no job {job_id!r}", field=field, remedy="GET /api/v1/jobs lists the jobs"
        ) from error
    if not best.recipes:
        raise InvalidInput(
            f"job {job_id} has no candidate that could be begun with",
            field=field,
            remedy="wait until it has evaluated some, or leave it out",
        )
    out = []
    for index, data in best.recipes.items():
        recipe = Recipe.parse(_renamed(data, best.models, problem, job_id, field))
        label = f"job {job_id[:4]}… candidate {index}"
        if index in best.labels:
            label = f"{label} ({best.labels[index]})"[:100]
        candidate = CandidateInput(label=label, recipe=recipe.to_json())
        try:
            check_candidate(candidate, spec, problem)
        except InvalidInput as error:
            raise InvalidInput(f"{label}: {error.message}", field=field, remedy=error.remedy) from error
        out.append((recipe, candidate))
    return out


def _renamed(
    recipe: dict[str, Any], models: Mapping[str, ModelId], problem: Problem, job_id: str, field: str
) -> dict[str, Any]:
    """The recipe in the new job's names, with those of its models only that it is made from."""
    names: dict[str, str] = {}
    for name in sorted(Recipe.parse(recipe).used):
        same = _same_model(name, models[name], problem.models)
        if same is None:
            raise InvalidInput(
                f"job {job_id} merges the model {name!r} ({models[name].ref}), which this one does not have",
                field=field,
                remedy="use the same checkpoints, unchanged, or leave the job out",
            )
        names[name] = same
    models_of_this = {name: model.model_dump(mode="json") for name, model in problem.models.items()}
    used = {name: models_of_this[name] for name in problem.models if name in names.values()}
    # What operators measure models on is this job's own data.
    out = {"format": recipe["format"], "models": used, "root": _rename(recipe["root"], names)}
    if "layers" in recipe:
        out["layers"] = [
            planned | ({"node": _rename(planned["node"], names)} if "node" in planned else {})
            for planned in recipe["layers"]
        ]
    return out


def _same_model(name: str, model: ModelId, models: Mapping[str, ModelId]) -> str | None:
    """The name under which the new job has a model; the base is its base only, as operators know it by its name."""
    others = [other for other in models if (other == "base") == (name == "base")]
    # An equal name goes first: two experts may have the same weights.
    for other in sorted(others, key=lambda other: other != name):
        known = models[other]
        if (known.digest, known.vocabulary) == (model.digest, model.vocabulary):
            return other
    return None


def _rename(node: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A node of a recipe, as plain data, with the models at its leaves renamed."""
    if "model" in node:
        return node | {"model": names[node["model"]]}
    inputs = [_rename(child, names) for child in node["inputs"]]
    return node | {"base": _rename(node["base"], names), "inputs": inputs}
