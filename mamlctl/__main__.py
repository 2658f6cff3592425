"""The entry point of the process, for `mamlctl` and `python -m mamlctl`."""

import os

try:
    from mamlctl.core.process import prepare_process
except KeyboardInterrupt:  # Ctrl-C before the first call of `prepare_process`, which handles it from there on
    os._exit(130)


def run() -> None:
    """Run the command line; its imports take long, so they follow the preparation."""
    prepare_process()
    from mamlctl.cli.app import run_program

    run_program()


if __name__ == "__main__":
    run()
