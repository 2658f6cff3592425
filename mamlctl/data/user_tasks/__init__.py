"""Tasks that the user's own code makes (`--dataset tasks.py:Tasks`)."""
