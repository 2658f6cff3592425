"""Stand-in until merged."""

import csv

SPLITS = {}


def listed_split(name: str) -> dict[str, str]:
    out = {}
    for split in ("train", "val", "test"):
        for r in csv.DictReader(open(f"/work/shared/data/splits/miniImagenet/{split}.csv")):
            out[r["label"]] = split
    return out
