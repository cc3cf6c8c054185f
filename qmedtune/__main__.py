"""`python -m qmedtune`."""

from qmedtune.cli import main

main()
