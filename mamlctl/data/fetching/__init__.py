"""Downloads that resume, with mirrors and locks."""
