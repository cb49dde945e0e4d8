"""`python -m lightloom` is the `lightloom` command."""

from lightloom.cli import main

main()
