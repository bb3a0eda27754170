"""Search spaces of other forms than a table of coefficients, one file each."""
