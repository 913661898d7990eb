"""From stored rows to words: tables, sentences, targets and plots. Every figure comes from the results file."""
