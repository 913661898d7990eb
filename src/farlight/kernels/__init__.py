"""The backends. Each answers `reasons(request)`, an empty list when it can run, and computes; none imports another."""
