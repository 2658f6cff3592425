"""Make the models that ship with the package from runs of the record: `python -m records.models`.

A model is a run folder without what only training needs. Its receipt is beside the other files.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from mamlctl.core.files import read_object, read_text, write_json, write_text
from mamlctl.display.console import say, stderr_console
from mamlctl.engine.training.checkpoints import BEST
from mamlctl.experiments.training_images import DIGESTS
from mamlctl.run_folder import CLASSES, CONFIG, ENVIRONMENT, STATUS, run_state
from records import receipts
from records.experiments import FAST_5, FAST_20, Experiment, experiments
from records.runs import RUNS, RecordedRun

FOLDER = Path(__file__).parents[2] / "mamlctl" / "models"
# Name -> experiment and seed: the one with the best validation accuracy of those that had been trained since
# commit 368ff2d, which keeps running statistics of all inner steps, when the model was made.
MODELS = {"omniglot-5w1s": (FAST_5, 1), "omniglot-20w1s": (FAST_20, 2)}
KEPT = (CLASSES, STATUS, DIGESTS)
RECEIPT = "receipt.json"


def ship(name: str, experiment: Experiment, seed: int, runs: Path) -> Path:
    """Write a model, and return its folder.

    Args:
        name: of the model.
        experiment: the experiment of the run that becomes the model.
        seed: the seed of that run, which has a receipt.
        runs: the folder of the run folders.
    """
    run = RecordedRun(experiment, seed, runs).path
    assert run_state(run).status == "finished"
    model = FOLDER / name
    shutil.rmtree(model, ignore_errors=True)
    (model / "checkpoints").mkdir(parents=True)
    for file in (*KEPT, f"checkpoints/{BEST}"):
        shutil.copyfile(run / file, model / file)
    config = read_text(run / CONFIG)  # of the machine that trained; users may have a CUDA device
    write_text(model / CONFIG, re.sub(r"(?m)^device: .*$", "device: auto", config))
    environment = read_object(run / ENVIRONMENT)
    write_json(model / ENVIRONMENT, {key: environment[key] for key in environment if key != "executable"})
    shutil.copyfile(receipts.receipt_file(experiment, seed, receipts.FOLDER), model / RECEIPT)
    return model


if __name__ == "__main__":
    for model_name, (experiment_name, of_seed) in MODELS.items():
        (chosen,) = experiments(only=experiment_name)
        say(stderr_console(), f"wrote {ship(model_name, chosen, of_seed, RUNS)}")
