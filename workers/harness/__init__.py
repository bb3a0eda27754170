"""lm-evaluation-harness on a resident model: its tasks, read safely, and its language model, without loading one.

Everything here but `files` and `contained` imports the harness, which is an optional extra; `workers.evaluators.lm_eval`
imports it only where an objective asks for it.
"""
