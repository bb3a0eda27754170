"""The catalog: what jobs may name, with option schemas; and the schema of the job spec itself."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from api.routes.common import answers
from api.views import AlgorithmView, SpaceView
from optimizer.algorithms.base import ALGORITHMS
from optimizer.problem import EvaluatorInfo, GraderInfo, OperatorInfo
from optimizer.space import SPACES
from optimizer.spec import JobSpec

router = APIRouter(tags=["catalog"])


@router.get(
    "/algorithms",
    summary="Search algorithms",
    response_description="All algorithms, by name.",
    responses=answers(
        example=[
            AlgorithmView(
                name="random",
                summary="Draws candidates uniformly from the search space.",
                reference="Bergstra and Bengio 2012",
                multi_objective=True,
                options_schema={"type": "object", "properties": {}},
            )
        ]
    ),
)
def list_algorithms() -> list[AlgorithmView]:
    """Return the algorithms that `algorithm.name` may name."""
    return [
        AlgorithmView(
            name=name,
            summary=cls.summary,
            reference=cls.reference,
            multi_objective=cls.multi_objective,
            needs_items=cls.needs_items,
            races=cls.races,
            options_schema=cls.Options.model_json_schema(),
        )
        for name, cls in ALGORITHMS.items()
    ]


@router.get(
    "/spaces",
    summary="Search spaces",
    response_description="All search spaces of another form than a table of coefficients, by name.",
    responses=answers(
        example=[
            SpaceView(
                name="layer_swap",
                summary="Takes each layer from one of the models.",
                reference="Akiba et al. 2024 (arXiv:2403.13187)",
                options_schema={"type": "object", "properties": {}},
            )
        ]
    ),
)
def list_spaces() -> list[SpaceView]:
    """Return the search spaces that `merge.space` may name."""
    return [
        SpaceView(
            name=name,
            summary=kind.summary,
            reference=kind.reference,
            options_schema=kind.options.model_json_schema(),
        )
        for name, kind in SPACES.items()
    ]


@router.get(
    "/operators",
    summary="Merge operators",
    response_description="All operators, by name.",
    responses=answers(
        example=[
            OperatorInfo(name="linear", summary="Weighted sum of the experts.", reference="arXiv:2203.05482", high=1.0)
        ]
    ),
)
def list_operators() -> list[OperatorInfo]:
    """Return the operators that `merge.operator` may name."""
    from workers.merging.operator import OPERATORS

    return [operator.info for operator in OPERATORS.values()]


@router.get(
    "/evaluators",
    summary="Evaluators",
    response_description="All evaluators, by name.",
    responses=answers(
        example=[
            EvaluatorInfo(
                name="text_classification",
                summary="Classifies texts.",
                metrics={"accuracy": "maximise", "loss": "minimise"},
                columns={"text": "the text", "label": "its class"},
            )
        ]
    ),
)
def list_evaluators() -> list[EvaluatorInfo]:
    """Return the evaluators that an objective's `evaluator` may name."""
    from workers.evaluators.base import EVALUATORS

    return [evaluator.info() for evaluator in EVALUATORS.values()]


@router.get(
    "/graders",
    summary="Graders of generated answers",
    response_description="All graders, by name.",
    responses=answers(
        example=[
            GraderInfo(
                name="exact_match",
                summary="Whether an answer is one of the right ones.",
                direction="maximise",
                columns={"answer": "the right answer, or a list of them"},
            )
        ]
    ),
)
def list_graders() -> list[GraderInfo]:
    """Return the graders that the option `graders` of evaluators of generated answers may name."""
    from workers.graders.base import GRADERS

    return [grader.info() for grader in GRADERS.values()]


@router.get(
    "/schema/job",
    summary="The job spec's JSON schema",
    response_description="A JSON schema with descriptions, bounds, defaults and examples.",
    responses=answers(example={"title": "JobSpec", "type": "object", "properties": {}}),
)
def get_job_schema() -> dict[str, Any]:
    """Return the JSON schema that the UI makes its form of."""
    return JobSpec.model_json_schema()
