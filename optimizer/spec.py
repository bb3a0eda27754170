"""The job spec: one pydantic model for REST, CLI files, the Python client and the UI's form.

Unknown keys are refused everywhere. Every field has a description, and bounds or examples where they exist,
because the JSON schema of `JobSpec` *is* the form that users fill in.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from optimizer.errors import from_validation
from optimizer.geometry import ModuleKind

USUAL_HEADS = ["classifier.*", "score.*", "qa_outputs.*"]
"""Patterns of the parameters that transformers' models for one task add to a shared model."""

USUAL: dict[str, JsonValue] = {"x-usual": True}
"""Marks optional fields that most specs fill in: forms show them open."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Direction = Literal["maximise", "minimise"]
Use = Literal["objective", "constraint", "report"]
Scalar = bool | int | float | str


class Strict(BaseModel):
    """Refuses unknown keys, NaN and infinities; immutable once made."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelRef(Strict):
    """Where a checkpoint is: a path under one of the server's roots, or a hub id with its revision."""

    path: str | None = Field(
        default=None,
        max_length=4096,
        description="Directory of a Hugging Face checkpoint, relative to one of the server's roots, or absolute inside one.",
        examples=["experts/language"],
    )
    hub: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$",
        description="Hub id, for servers that reach a hub.",
        examples=["org/model"],
    )
    revision: str | None = Field(
        default=None,
        pattern=r"^[\w./-]{1,200}$",
        description="Commit, tag or branch of the hub id; required with `hub`, so that the job can be repeated.",
        examples=["main"],
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:  # a bare string is the path
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelRef:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of `path` and `hub`")
        if (self.hub is None) != (self.revision is None):
            raise ValueError("`hub` and `revision` go together")
        return self

    def plain(self) -> ModelRef:
        """Return the reference alone, without what a subclass adds."""
        return ModelRef(path=self.path, hub=self.hub, revision=self.revision)

    def __str__(self) -> str:
        return self.path if self.path is not None else f"{self.hub}@{self.revision}"


class Expert(ModelRef):
    """A fine-tuned model to merge."""

    name: Name = Field(description="Short name, unique in the job.", examples=["language"])


class Bounds(Strict):
    """Lower and upper bound of every coefficient."""

    low: float = Field(description="Lower bound.", ge=-10, le=10, examples=[-0.2])
    high: float = Field(description="Upper bound.", ge=-10, le=10, examples=[1.2])

    @model_validator(mode="after")
    def _ordered(self) -> Bounds:
        if self.low >= self.high:
            raise ValueError(f"`low` must be below `high`, not {self.low} and {self.high}: swap them?")
        return self


class RangeVariable(Strict):
    """An operator option that the search varies between two bounds."""

    low: float = Field(description="Lower bound.")
    high: float = Field(description="Upper bound.")
    integer: bool = Field(default=False, description="Whole numbers only.")
    per_group: bool = Field(default=False, description="A value of its own for each coefficient group.")
    per_expert: bool = Field(
        default=False, description="A value of its own for each expert, where the operator says its option `varies`."
    )

    @model_validator(mode="after")
    def _ordered(self) -> RangeVariable:
        if self.low >= self.high:
            raise ValueError(f"`low` must be below `high`, not {self.low} and {self.high}: swap them?")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"the bounds of an integer must be whole numbers, not {self.low} and {self.high}")
        return self


class ChoiceVariable(Strict):
    """An operator option that the search chooses from a list."""

    choices: list[Scalar] = Field(min_length=2, max_length=64, description="The values to choose from.")


class Granularity(Strict):
    """How many coefficients each expert gets: layer groups × module groups."""

    layers: Literal["whole", "groups", "each", "tensors"] = Field(
        default="each",
        description=(
            "`whole`: one coefficient for the whole model; `groups`: one for every `group_size` layers; `each`: one "
            "a layer. With these two, what stands before the first layer (embeddings) and after the last one each "
            "have their own. `tensors`: one for every parameter tensor."
        ),
    )
    group_size: int = Field(default=4, ge=1, le=512, description="Layers that share a coefficient with `groups`.")
    modules: list[list[ModuleKind]] = Field(
        default_factory=list,
        max_length=8,
        description=(
            "Sets of module kinds that get coefficients of their own in every layer group; all kinds not listed share "
            "one more set."
        ),
        examples=[[["attention"], ["mlp"]]],
    )

    @field_validator("modules")
    @classmethod
    def _disjoint(cls, value: list[list[ModuleKind]]) -> list[list[ModuleKind]]:
        kinds = [kind for group in value for kind in group]
        if len(kinds) != len(set(kinds)) or not all(value):
            raise ValueError("each module kind may stand in one set only, and no set may be empty")
        return value


class DataSpec(Strict):
    """The items an objective is measured on."""

    path: str = Field(
        max_length=4096,
        description=(
            "JSONL, CSV or Parquet file; a directory with one such file per split (`search.jsonl`); an image folder "
            "(`split/class/image.png`); or a directory written by `datasets.save_to_disk`."
        ),
        examples=["data/language"],
    )
    split: str | None = Field(
        default=None,
        max_length=200,
        description="Which split, where the data has several.",
        examples=["search"],
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        max_length=32,
        description="Which column plays which role, where the names differ from the evaluator's.",
        examples=[{"text": "word", "label": "language"}],
    )
    limit: int | None = Field(default=None, ge=1, description="Use the first this many items only.", examples=[200])


class Calibration(Strict):
    """Data that an operator such as Fisher merging or RegMean measures a model on; best not the search's."""

    evaluator: str = Field(
        description="Kind of measure that can read the items; GET /api/v1/evaluators lists them.",
        examples=["text_classification"],
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the evaluator.")
    data: DataSpec = Field(description="The items; the first 256, which are usual, where there is no `limit`.")
    head: str | None = Field(
        default=None, description="Name of the expert whose head is used; the model's own by default."
    )


class SpaceSpec(Strict):
    """A search space of another form than a table of coefficients."""

    name: str = Field(
        description="GET /api/v1/spaces lists them with their options.", examples=["layer_swap", "data_flow", "prune"]
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the space.")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:  # a bare string is the name
        return {"name": value} if isinstance(value, str) else value


class Modifier(Strict):
    """A change to each expert before, or to the result after, the merge."""

    operator: str = Field(description="An operator that says it is a `modifier`.", examples=["prune", "lines"])
    target: Literal["experts", "merged"] = Field(description="What it changes.")
    options: dict[str, Scalar | RangeVariable | ChoiceVariable] = Field(
        default_factory=dict, max_length=32, description="Its options; {low, high} or {choices} makes one a variable."
    )


class MergeSpec(Strict):
    """What is merged how, and what the search may vary."""

    operator: str = Field(
        default="task_arithmetic",
        description="How tensors are combined; GET /api/v1/operators lists them with their options.",
        examples=["task_arithmetic", "ties"],
    )
    options: dict[str, Scalar | list[float] | RangeVariable | ChoiceVariable] = Field(
        default_factory=dict,
        max_length=32,
        description=(
            "Options of the operator. A value is fixed, a list has a fixed value for each expert; {low, high} or {choices} "
            "makes the option a variable of the search."
        ),
        examples=[{"density": {"low": 0.1, "high": 1.0}}],
    )
    modifiers: list[Modifier] = Field(
        default_factory=list, max_length=8, description="Changes before and after the merge, in this order."
    )
    calibration: dict[Name, Calibration] = Field(
        default_factory=dict,
        description="By model (`base` or an expert), the data that the operator measures it on, where it needs any.",
    )
    granularity: Granularity = Field(default_factory=Granularity, description="How many coefficients each expert gets.")
    space: SpaceSpec | None = Field(
        default=None,
        description="What the search varies, where not the operator's coefficients and options.",
    )
    bounds: Bounds | None = Field(
        default=None, description="Bounds of the coefficients; the operator's own by default."
    )
    frozen: list[ModuleKind] = Field(
        default_factory=list,
        description="Module kinds that are not merged but kept as the base has them.",
        examples=[["embeddings"]],
    )
    vocabulary: Literal["refuse", "base", "union"] = Field(
        default="refuse",
        description=(
            "Where a token has different numbers in different models, or only some have it: `refuse` the job; merge the "
            "rows of the `base`'s tokens and drop the others; or the `union` of all tokens, the base's first."
        ),
    )
    heads: list[str] = Field(
        default=USUAL_HEADS,
        max_length=64,
        description=(
            "Patterns (`*` matches anything) of parameters that experts do not share: they stay the expert's own, and an "
            "objective names whose head it uses."
        ),
    )


class Constraint(Strict):
    """A candidate that violates it ranks behind every one that does not."""

    at_least: float | None = Field(default=None, description="Lowest allowed value of the metric.")
    at_most: float | None = Field(default=None, description="Highest allowed value of the metric.")

    @model_validator(mode="after")
    def _some(self) -> Constraint:
        if self.at_least is None and self.at_most is None:
            raise ValueError("give `at_least`, `at_most` or both")
        return self


class Objective(Strict):
    """A named measure with a direction on a data split."""

    name: Name = Field(description="Unique in the job; the front's axis.", examples=["language"])
    evaluator: str = Field(
        description="Kind of measure; GET /api/v1/evaluators lists them with their options and metrics.",
        examples=["text_classification"],
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the evaluator.")
    data: DataSpec | None = Field(
        default=None,
        description="The items it is measured on; left out where the evaluator brings its own.",
        json_schema_extra=USUAL,
    )
    set: Name | None = Field(
        default=None,
        description="Name of a set of the owner's to measure on, in place of `data`, where an `endpoint` has the models.",
    )
    test: DataSpec | None = Field(
        default=None,
        description=(
            "Items that the search never sees, none of them one of `data`; what is best in the end is measured on them, "
            "which shows what the search owes to luck with its own."
        ),
    )
    test_set: Name | None = Field(
        default=None, description="Name of a set of the owner's in place of `test`, where an `endpoint` has the models."
    )
    metric: str | None = Field(
        default=None, description="One of the evaluator's metrics; its first by default.", examples=["loss"]
    )
    direction: Direction | None = Field(
        default=None, description="Whether more or less is better; the metric's own by default."
    )
    use: Use = Field(
        default="objective",
        description=(
            "`objective`: an axis of the front; `constraint`: only its bounds count; `report`: measured and shown, and "
            "nothing else."
        ),
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1e6,
        description="Weight where an algorithm needs one number for all objectives.",
    )
    constraint: Constraint | None = Field(default=None, description="Bounds the metric must keep.")
    head: str | None = Field(
        default=None, description="Name of the expert whose head is used; needed where experts have heads."
    )

    @model_validator(mode="after")
    def _bounded(self) -> Objective:
        if self.use == "constraint" and self.constraint is None:
            raise ValueError("constraint: it is used as a constraint, so give it bounds: `at_least`, `at_most` or both")
        return self


class EndpointSpec(Strict):
    """A merge-and-score endpoint: a service that holds the models, merges them, and tells the scores only."""

    url: str = Field(
        max_length=2000,
        pattern=r"^https?://",
        description="Where it is; its host must be among those that the server allows.",
        examples=["https://models.example.org/merge/v1"],
    )
    token: Name | None = Field(default=None, description="Name of the secret that is its access token.")


class AlgorithmSpec(Strict):
    """Who proposes candidates."""

    name: str = Field(
        default="auto",
        description="GET /api/v1/algorithms lists them with their options.",
        examples=["auto", "cma_es", "nsga2", "random"],
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the algorithm.")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:  # a bare string is the name
        return {"name": value} if isinstance(value, str) else value


class Phase(Strict):
    """A part of a search with an algorithm of its own, which begins from all that was found before."""

    algorithm: AlgorithmSpec = Field(description="Who proposes candidates in this phase.")
    share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of the job's evaluations; phases without one divide what the others leave evenly.",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Go on to the next phase after this many evaluations in a row that do not improve the front.",
    )
    keep_experts: int | None = Field(
        default=None,
        ge=1,
        description="Search among so many experts only: those that count most in the best candidates so far.",
    )


_Requests = Annotated[float, Field(gt=0, le=1e12)]
_Tokens = Annotated[float, Field(gt=0, le=1e15)]
_Money = Annotated[float, Field(gt=0, le=1e12)]


class Budget(Strict):
    """When to stop: whichever comes first."""

    evaluations: int = Field(
        ge=1, le=10_000_000, description="Candidates to evaluate; duplicates cost none.", examples=[200]
    )
    wall_time_s: float | None = Field(
        default=None, gt=0, description="Seconds of running time, pauses and preemptions not counted."
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after this many evaluations in a row that do not improve the front.",
    )
    requests: _Requests | None = Field(
        default=None, description="Most requests to services; the job pauses before it would exceed them."
    )
    tokens: _Tokens | None = Field(
        default=None, description="Most tokens that services read and write; the job pauses before."
    )
    money: _Money | None = Field(
        default=None,
        description="Most money that services charge, by the prices in evaluators' options; the job pauses before.",
    )


class RaisedBudget(Strict):
    """Budgets that a job gets in place of those that it has used up. What it searches stays as it was."""

    requests: _Requests | None = Field(default=None, description="Most requests in all; null for as before.")
    tokens: _Tokens | None = Field(default=None, description="Most tokens in all; null for as before.")
    money: _Money | None = Field(default=None, description="Most money in all; null for as before.")


class Racing(Strict):
    """Stops the evaluation of a candidate once it is clear that it loses."""

    enabled: bool = Field(
        default=False,
        description=(
            "Measure on more and more items, and stop where a candidate loses beyond doubt to those that the algorithm has "
            "already. GET /api/v1/algorithms says which algorithms race. Objectives must be means over their items."
        ),
    )
    first_items: int = Field(
        default=32, ge=8, le=1_000_000, description="Items of each objective before the first comparison."
    )
    factor: int = Field(default=2, ge=2, le=10, description="So many times as many before each further one.")
    error: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="Highest probability that a candidate is stopped which is no worse over all items.",
    )


class Estimation(Strict):
    """Measures the search's candidates on a few items of each objective and estimates the rest."""

    method: Literal["none", "mean", "weighted", "regression", "mp_irt", "gmp_irt"] = Field(
        default="none",
        description=(
            "`mean` of random items; `weighted`: items that stand for clusters on which the candidates that the job begins "
            "with score alike; `regression` on the scores of these; `mp_irt` and `gmp_irt`: item-response models (MERGE³) "
            "for scores that are right or wrong, else `regression`."
        ),
    )
    items: int = Field(
        default=50, ge=8, le=100_000, description="Items of each objective; all where an objective has no more."
    )


class Verification(Strict):
    """What is measured anew when the search is over, where objectives have test items or values are estimates."""

    candidates: int = Field(
        default=16,
        ge=0,
        le=10_000,
        description=(
            "Most candidates of the front, the best by weighted loss first; where values are estimates, so many of the best "
            "by weighted loss whether on the front or not. With 0 nothing is measured anew."
        ),
    )
    baselines: bool = Field(
        default=True,
        description=(
            "Also the base, the experts and the uniform merge, which no search has chosen: where they are worse on the test "
            "items as well, these are harder."
        ),
    )


class Fitness(Strict):
    """How candidates are judged with fewer evaluations of items."""

    cache: bool = Field(
        default=True,
        description=(
            "Take the scores of items that an earlier candidate, of this job or another, has for the same merge, instead of "
            "measuring them again. They may differ in the last bits from what other batches would give."
        ),
    )
    racing: Racing = Field(
        default_factory=Racing, description="Stops the evaluation of a candidate once it is clear that it loses."
    )
    estimation: Estimation = Field(
        default_factory=Estimation,
        description="Measures the search's candidates on a few items of each objective and estimates the rest.",
    )
    verification: Verification = Field(
        default_factory=Verification, description="What is measured anew when the search is over."
    )


class WarmStarts(Strict):
    """Candidates evaluated before the algorithm's own, and shown as baselines in the UI."""

    base: bool = Field(default=True, description="The base alone, where the operator can express it.")
    experts: bool = Field(default=True, description="Each expert alone.")
    uniform: bool = Field(default=True, description="The uniform merge of all experts.")
    jobs: list[str] = Field(
        default_factory=list,
        max_length=16,
        description="Ids of earlier jobs over the same models, whose best candidates are evaluated first.",
    )
    candidates: list[CandidateInput] = Field(
        default_factory=list, max_length=1000, description="Candidates of the user's own, evaluated first."
    )


class CandidateInput(Strict):
    """A candidate that a user enqueues: by coefficients, values, genome, or as a complete recipe. Exactly one."""

    label: str | None = Field(default=None, max_length=100, description="Shown in the UI beside the candidate.")
    coefficients: dict[str, float | list[float]] | None = Field(
        default=None,
        description="For each expert one number, or one number for each coefficient group; what is left out is 0.",
        examples=[{"language": 0.6, "polarity": [0.2, 0.2, 0.4]}],
    )
    values: dict[str, Scalar] | None = Field(
        default=None,
        description="In a job without checkpoints, the value of each parameter.",
        examples=[{"weight": 0.3, "model": "small"}],
    )
    genome: list[float] | None = Field(
        default=None,
        min_length=1,
        max_length=100_000,
        description="The search vector itself, in the job's order.",
    )
    recipe: dict[str, Any] | None = Field(
        default=None,
        description="A complete recipe over the job's models, as another candidate's page shows it.",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> CandidateInput:
        if sum(part is not None for part in (self.coefficients, self.values, self.genome, self.recipe)) != 1:
            raise ValueError("give exactly one of `coefficients`, `values`, `genome` and `recipe`")
        return self


class Workers(Strict):
    """The Ray actors that evaluate candidates, and what each one takes."""

    count: int = Field(default=1, ge=1, le=4096, description="Number of workers.")
    cpus: float = Field(default=1, gt=0, le=1024, description="CPU cores of each worker; also its torch threads.")
    gpus: float = Field(default=0, ge=0, le=64, description="GPUs of each worker; a fraction shares one.")
    memory_gb: float | None = Field(default=None, gt=0, description="Memory that Ray reserves for each worker, in GiB.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="`auto` takes the GPU that the worker was given with `gpus`."
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Type of the resident merged model.")
    timeout_s: float = Field(default=3600, gt=0, description="Longest allowed evaluation of one candidate, in seconds.")
    attempts: int = Field(
        default=3,
        ge=1,
        le=20,
        description="Tries for a candidate whose worker dies, before it counts as failed.",
    )


class JobSpec(Strict):
    """A search that a user submits."""

    name: str = Field(
        default="merge search",
        min_length=1,
        max_length=200,
        description="Shown in lists.",
        examples=["three word tasks"],
    )
    base: ModelRef | None = Field(
        default=None, description="The common ancestor of the experts.", json_schema_extra=USUAL
    )
    experts: list[Expert] = Field(
        default_factory=list,
        max_length=1000,
        description="The fine-tuned models to merge.",
        json_schema_extra=USUAL,
    )
    endpoint: EndpointSpec | None = Field(
        default=None, description="Who holds the models, in place of `base` and `experts`."
    )
    parameters: dict[Name, RangeVariable | ChoiceVariable] = Field(
        default_factory=dict,
        max_length=1000,
        description=(
            "What the search varies where no checkpoint is at hand, in place of `base` and `experts`: services that the "
            "objectives ask make of the values what they will."
        ),
        examples=[{"weight": {"low": 0, "high": 1}, "model": {"choices": ["small", "large"]}}],
    )
    merge: MergeSpec = Field(default_factory=MergeSpec, description="What is merged how, and what the search may vary.")
    objectives: list[Objective] = Field(
        min_length=1, max_length=16, description="What the merged model must be good at."
    )
    algorithm: AlgorithmSpec = Field(default_factory=AlgorithmSpec, description="Who proposes candidates.")
    phases: list[Phase] = Field(
        default_factory=list,
        max_length=16,
        description="Several algorithms, one after the other, in place of `algorithm`.",
    )
    budget: Budget = Field(description="When to stop.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="The same seed gives the same search.")
    workers: Workers = Field(default_factory=Workers, description="The Ray actors that evaluate candidates.")
    parallel_evaluations: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Candidates in flight at once; the number of workers by default.",
    )
    asynchronous: bool = Field(
        default=False,
        description=(
            "Tell the algorithm each outcome as it comes, so that no worker waits for a slow one; what it proposes then "
            "depends on who was faster, and two runs with the same seed differ. A resumed job goes on exactly all the same."
        ),
    )
    warm_starts: WarmStarts = Field(default_factory=WarmStarts, description="Candidates evaluated first.")
    fitness: Fitness = Field(
        default_factory=Fitness, description="How candidates are judged with fewer evaluations of items."
    )

    @model_validator(mode="after")
    def _consistent(self) -> JobSpec:
        self._check_source()
        experts = [expert.name for expert in self.experts]
        _unique(experts, "experts")
        _unique([objective.name for objective in self.objectives], "objectives")
        for number, objective in enumerate(self.objectives):
            if objective.head is not None and objective.head not in experts and self.endpoint is None:
                raise ValueError(
                    f"objectives.{number}.head: {objective.head!r} is no expert; use one of: {', '.join(experts)}"
                )
        if not any(objective.use == "objective" for objective in self.objectives):
            raise ValueError("objectives: at least one must have the use `objective`")
        if self.phases and self.algorithm != AlgorithmSpec():
            raise ValueError("phases: they stand in place of `algorithm`; leave one of the two out")
        if sum(phase.share or 0 for phase in self.phases) > 1 + 1e-9:
            raise ValueError("phases: the shares add up to more than 1")
        if "base" in experts:
            raise ValueError("experts: the name 'base' is taken by the base model; rename the expert")
        return self

    def _check_source(self) -> None:
        given = [name for name in ("base", "endpoint", "parameters") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError("base: give exactly one of `base` (with `experts`), `endpoint` and `parameters`")
        for number, objective in enumerate(self.objectives):
            for name, instead in (("set", "data"), ("test_set", "test")):
                named = getattr(objective, name) is not None
                if named and (self.endpoint is None or getattr(objective, instead) is not None):
                    raise ValueError(
                        f"objectives.{number}.{name}: it is for jobs with an `endpoint`, and in place of `{instead}`; "
                        "leave it out"
                    )
        if (self.base is None) != (not self.experts):
            raise ValueError("experts: `base` and `experts` go together")

    @model_serializer(mode="wrap")
    def _without_what_phases_replace(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the algorithm where there are phases: it has no part in the job."""
        data: dict[str, Any] = dump(self)
        if self.phases:
            data.pop("algorithm", None)
        return data

    @property
    def in_flight(self) -> int:
        """Candidates that may be in flight at once."""
        return self.parallel_evaluations or self.workers.count


def _unique(names: list[str], field: str) -> None:
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"{field}: the names must be unique, but these are not: {', '.join(doubled)}")


def parse_spec(data: object) -> JobSpec:
    """Validate plain data into a `JobSpec`; raises `InvalidInput` that names the field."""
    try:
        return JobSpec.model_validate(data)
    except ValidationError as error:
        raise from_validation(error) from error


WarmStarts.model_rebuild()
JobSpec.model_rebuild()
