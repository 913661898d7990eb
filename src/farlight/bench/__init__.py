"""Measuring: attention against what else there is, both sides in one run. `sections.py` lists what can be measured."""
