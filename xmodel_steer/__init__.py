"""Find a behaviour's direction in a small language model and carry it into a larger one."""
