"""Device code: Triton kernels and the tables they read. It imports triton, and is therefore imported at the first launch."""
