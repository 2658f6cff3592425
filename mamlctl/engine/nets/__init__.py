"""The networks and their batch norm."""
