"""Search spaces of other forms than a table of coefficients, one file each; a job names one under ``merge.space``.

The parameter space of evolutionary model merging (Akiba et al. 2024, arXiv 2403.13187) needs none of them: it is the
usual space of an operator with options that vary by group and expert::

    merge:
      operator: dare_ties
      granularity: {layers: each}
      options:
        density: {low: 0.01, high: 1.0, per_group: true, per_expert: true}
"""
