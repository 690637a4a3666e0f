"""Scores, intervals, the table and the picture."""
