"""Carrying a run out: the loop yields events, and prints and writes nothing."""
