"""`python -m veneer.cli`: the same as `veneer`."""

from veneer.cli import main

main()
