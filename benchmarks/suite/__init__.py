"""The measurements: attention beside what else there is, both sides timed in one run. `sections.py` lists the sections."""
