"""Measuring and planning: benchmark, planner, studies. Nothing in the rest of the package imports it."""
