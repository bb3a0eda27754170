"""`python -m api` is `mergeopt`."""

from api.cli import main

main()
