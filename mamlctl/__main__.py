"""Run `mamlctl` as `python -m mamlctl`."""

from mamlctl.cli.app import main

main()
