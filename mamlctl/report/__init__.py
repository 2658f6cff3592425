"""Tables of runs, figures and HTML pages."""
