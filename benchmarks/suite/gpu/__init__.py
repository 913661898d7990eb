"""Sections for a GPU: parity and properties of the Triton backend, its speed, and a router's whole step."""
