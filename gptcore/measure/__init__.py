"""Measuring: memory, peaks of the machine, and what a generation cost."""
