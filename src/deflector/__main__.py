"""`python -m deflector`."""

from deflector.cli import main

main()
