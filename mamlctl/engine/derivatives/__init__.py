"""How losses and their first and second derivatives are computed."""
