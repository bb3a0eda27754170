"""Processes that begin with everything loaded: forks of one server, where a spawned process imports for many seconds."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

# What a process would import on its first use takes longer than all else that it does.
_LAZILY = ["optimizer.mixed_normal", "transformers.models.bert.modeling_bert", "sklearn.cluster"]


def forks() -> ForkServerContext:
    """Return the context; all tests of this process share its server, which is started by the first that needs one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.durability.child", *_LAZILY])
    return context
