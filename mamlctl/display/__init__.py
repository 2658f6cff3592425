"""Events and results on a terminal."""
