"""GPU sections of the suite: parity and properties of the Triton backend, its speed, and whole router steps."""
