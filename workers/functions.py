"""What a measure written in Python says about itself, so that objectives can use it: ``evaluator: python``.

A measure is a function in an installed package that the server's ``entry_points`` setting names. It asks for what it needs
by the names of its parameters::

    from workers.functions import measure

    @measure({"accuracy": "maximise"})
    def score(model, rows, tokenizer, threshold=0.5):
        ...
        return {"accuracy": [1.0, 0.0, …]}     # one number for each row

=================  ====================================================================================================
``model``          the resident merged model, in evaluation mode and without gradients, on the worker's device
``rows``           list of dictionaries, one a row of the objective's data; ``data.columns`` gives columns other names
``tokenizer``      of the checkpoint; the function must not change it
``processor``      image processor of the checkpoint
``batch_size``     of the objective's options
``cancelled``      function to call between batches; when it returns True, raise ``Cancelled``, or return anything
any other          from the objective's option ``arguments``; without a default it must be there
=================  ====================================================================================================

It returns a dictionary with every declared metric: an array-like of one number (NaN and infinity too) for each row, or a
tuple of two, the numbers and the positive weights that they have in the mean. A measure that has no scores of single rows
is declared with ``aggregate=True`` and returns one number for each metric: then it counts as one item, and nothing that
works on items (niches, racing, estimates) can help it.

The same model and rows must give the same numbers: seed what is drawn. The model's weights must stay as they are. A
function that hangs is ended by the job's ``workers.timeout_s``, where the pool is Ray; a thread cannot be ended, so that
without Ray it must look at ``cancelled``.

Packages that do not import mergeopt set the attribute ``mergeopt_measure`` of the function to a dictionary with the
arguments of `measure`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from optimizer.spec import Direction
from workers.evaluators.base import Cancelled

ATTRIBUTE = "mergeopt_measure"

F = TypeVar("F", bound=Callable[..., Any])


def measure(
    metrics: Mapping[str, Direction],
    *,
    aggregate: bool = False,
    auto_class: str = "AutoModelForCausalLM",
) -> Callable[[F], F]:
    """Declare a function as a measure.

    Args:
        metrics: metric to ``maximise`` or ``minimise``; the first is the default.
        aggregate: whether it returns one number for each metric in place of one for each row.
        auto_class: class of ``transformers`` that opens the models it scores.
    """

    def decorate(function: F) -> F:
        setattr(function, ATTRIBUTE, {"metrics": metrics, "aggregate": aggregate, "auto_class": auto_class})
        return function

    return decorate


__all__ = ["Cancelled", "measure"]
