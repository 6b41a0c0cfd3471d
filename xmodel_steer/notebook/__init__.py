"""Steering by hand in a notebook."""
