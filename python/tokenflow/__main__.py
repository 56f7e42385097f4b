"""`python -m tokenflow` is `tokenflow`."""

from tokenflow.cli import main

main()
