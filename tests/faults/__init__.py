"""An attack on mamlctl: kills, damaged files, full disks, random settings and malformed input."""
