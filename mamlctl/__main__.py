"""python -m mamlctl is mamlctl."""

from mamlctl.cli.app import main

main()
