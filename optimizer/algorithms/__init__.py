"""Search algorithms: one file each, registered by `algorithm`, found by themselves."""

from optimizer.algorithms.base import ALGORITHMS, Algorithm, AlgorithmContext, Outcome, Proposal, algorithm

__all__ = ["ALGORITHMS", "Algorithm", "AlgorithmContext", "Outcome", "Proposal", "algorithm"]
