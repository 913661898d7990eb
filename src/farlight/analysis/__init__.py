"""Understanding a pattern: what it keeps of full attention, what it costs, what it loses on a real model."""
