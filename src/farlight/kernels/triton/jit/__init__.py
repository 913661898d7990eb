"""The device code: Triton kernels and nothing else. Imported only when a kernel is about to run, because it imports triton."""
