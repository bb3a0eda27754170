"""Which items an evaluation on a part of them uses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def item_order(seed: int, items: int) -> NDArray[np.int64]:
    """Return the order in which evaluations on the first so many items take them, shape (items,).

    It depends on the job's seed and the number of items of the objective, and on nothing else: whoever evaluates
    whatever candidate, an evaluation on fewer items uses some of those that one on more uses, in the same order.
    """
    random = np.random.Generator(np.random.PCG64([seed, items]))
    return random.permutation(items).astype(np.int64)
