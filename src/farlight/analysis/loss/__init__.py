"""What is lost by not looking: retained attention, top losses, and hidden states of a real model."""
