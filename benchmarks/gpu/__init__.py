"""The steps of `gpu_check.py`: parity, properties, speed, and the page written from the results."""
