"""The operators, one file each; `workers.merging.operator.OPERATORS` finds them."""
