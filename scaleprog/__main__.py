"""`python -m scaleprog` is the command `scaleprog`."""

from scaleprog.cli import main

main()
