"""Run `mamlctl` as `python -m mamlctl`."""

from mamlctl.cli.app import run_program

run_program()
