"""Programs: whether the code of an answer passes the row's tests, in a sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import regex
from pydantic import Field

from optimizer.errors import InvalidInput
from workers import sandbox
from workers.evaluators.base import Cancelled
from workers.graders.base import Answers, Grader, GraderInputs, grader

_FENCED = regex.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", regex.DOTALL | regex.IGNORECASE)


@grader("code")
class Code(Grader):
    """1 if the answer and then the row's tests run to their end without an exception, else 0, also at a limit.

    Python's standard library is there, nothing else. See `workers.sandbox` for what holds a program back. It cannot keep
    a program from deceiving its own tests, which run in the same interpreter.
    """

    summary: ClassVar[str] = (
        "Whether the answer's Python code passes the row's tests, in a sandbox, if the server allows."
    )
    columns: ClassVar[dict[str, str]] = {
        "tests": "Python code that raises an exception where the answer is wrong, such as assertions.",
        "before": "Python code that the answer continues, such as a function's head (optional).",
    }

    class Options(Grader.Options):
        """Options of programs."""

        seconds: int = Field(
            default=5,
            ge=1,
            le=600,
            description="Processor time of each process of a program; three times as much may pass on the clock.",
        )
        memory_mb: int = Field(default=256, ge=64, le=65536, description="Memory of each process of a program, in MiB.")
        processes: int = Field(default=16, ge=1, le=256, description="Processes and threads of a program.")
        parallel: int = Field(default=2, ge=1, le=64, description="Programs that run at once.")
        fenced: bool = Field(
            default=True, description="Take what stands in the first fenced code block, where there is one."
        )

    options: Options

    def __init__(self, options: Options, inputs: GraderInputs) -> None:
        super().__init__(options, inputs)
        if not inputs.policy.code_execution:
            raise InvalidInput(
                "this server does not run programs that models write",
                field=f"{inputs.field}.name",
                remedy="have its operator set MERGEOPT_CODE_EXECUTION=true, or use another grader",
            )
        rows = inputs.rows
        self._tests = rows.texts("tests")
        for row, text in enumerate(self._tests):
            try:
                compile(text, "tests", "exec", dont_inherit=True)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise rows.error("tests", row, f"not Python code: {error}") from error
        self._before = rows.texts("before") if rows.has("before") else [""] * len(rows)
        try:
            sandbox.check()
        except sandbox.SandboxUnavailable as error:
            raise InvalidInput(error.message, field=f"{inputs.field}.name", remedy="use a worker on Linux") from error
        self._limits = sandbox.Limits(
            seconds=3 * options.seconds,
            cpu_seconds=options.seconds,
            memory_bytes=options.memory_mb * 2**20,
            processes=options.processes,
        )

    def grade(self, answers: Answers) -> Sequence[float]:
        """See `Grader.grade`."""
        programs = [
            [before + self._code(text), tests]
            for before, text, tests in zip(self._before, answers.texts, self._tests, strict=True)
        ]
        with ThreadPoolExecutor(self.options.parallel) as pool:
            return list(pool.map(lambda parts: self._passes(parts, answers), programs))

    def _passes(self, parts: list[str], answers: Answers) -> float:
        if answers.cancelled():
            raise Cancelled("the evaluation was called off")
        return float(sandbox.run(parts, self._limits, answers.cancelled).status == "passed")

    def _code(self, text: str) -> str:
        fenced = _FENCED.search(text) if self.options.fenced else None
        return str(fenced[1]) if fenced else text
