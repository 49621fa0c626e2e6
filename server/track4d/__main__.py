"""`python -m track4d`."""

from .cli import main

main()
