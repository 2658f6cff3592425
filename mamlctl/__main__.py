"""python -m mamlctl is mamlctl."""

from mamlctl.cli import main

main()
