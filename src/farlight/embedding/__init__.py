"""Books as vectors: chapters read in one pass each, passages ranked for a question, and the words that were looked at."""
