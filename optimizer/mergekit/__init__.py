"""mergekit's configuration files, both ways.

A file becomes a recipe that gives what mergekit gives: gradients (lists of numbers) are evaluated layer by layer,
conditions parameter by parameter (`to_recipe`). Or it becomes a part of a job spec: a weight that is a list or a range
is searched between its lowest and highest number (`to_job`). And a recipe becomes a file, where mergekit can express it
(`to_configuration`).
"""

from optimizer.mergekit.format import Configuration, read_configuration
from optimizer.mergekit.jobs import asks_for_search, to_job
from optimizer.mergekit.recipes import Imported, to_recipe
from optimizer.mergekit.references import base_reference, model_names, model_ref, notes_on, vocabulary_rule
from optimizer.mergekit.writing import to_configuration

__all__ = [
    "Configuration",
    "Imported",
    "asks_for_search",
    "base_reference",
    "model_names",
    "model_ref",
    "notes_on",
    "read_configuration",
    "to_configuration",
    "to_job",
    "to_recipe",
    "vocabulary_rule",
]
