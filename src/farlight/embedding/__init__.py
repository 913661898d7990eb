"""Book embeddings: chapters encoded in one pass each under a sparse pattern, passage search, and the words attended to."""
