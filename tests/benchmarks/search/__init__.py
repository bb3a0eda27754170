"""Benchmarks of the searches: ``python -m tests.benchmarks.search.NAME``, one command each, with fixed seeds."""
