"""What a pattern loses: retained attention probability, the heaviest lost links, fidelity of a model's hidden states."""
