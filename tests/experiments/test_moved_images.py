"""Runs on a folder of images: what they print about its classes, and what happens after it has moved."""

import numpy as np
from helpers.shared import ignore
from PIL import Image

from mamlctl.core.events import Notice
from mamlctl.experiments.settings import resolve_settings
from mamlctl.experiments.train import train


def photos(path, names, images=3, shift=0):
    """Class folders of small images, each filled with noise that depends on its name and number."""
    for name in names:
        (path / name).mkdir(parents=True)
        for image in range(images):
            noise = np.random.default_rng([*name.encode(), image, shift]).integers(0, 256, (8, 8))
            Image.fromarray(noise.astype(np.uint8)).save(path / name / f"{image}.png")
    return path


def trained(path, folder, root, notices=None, **settings):
    flags = {"dataset": str(folder), "image_size": 8, "channels": 1, "net": "mlp", "hidden": "4"}
    flags |= {"epochs": 2, "steps_per_epoch": 2, "val_tasks": 4, "ways": 2, "data_root": str(root)}
    config = resolve_settings([("flag", flags | {"algo": "maml"} | settings)]).config
    on_event = ignore if notices is None else lambda event: notices.append(event)
    train(config, out=path, offline=True, time_limit_s=None, command="test", on_event=on_event)
    return path


def texts(events):
    return [event.text for event in events if isinstance(event, Notice)]


def test_every_run_prints_its_classes(tmp_path, glyphs_root):
    folder, notices = photos(tmp_path / "p", [f"c{number:02d}" for number in range(20)]), []
    trained(tmp_path / "run", folder, tmp_path / "root", notices)
    assert texts(notices) == ["classes: 13 train / 3 val / 4 test"]
    notices = []
    trained(tmp_path / "glyphs", "glyphs", glyphs_root, notices, image_size=28)
    assert texts(notices) == ["classes: 300 train / 40 val / 60 test"]
