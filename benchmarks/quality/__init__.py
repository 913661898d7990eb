"""Loss of a language model under the rules of the literature; `losses.py` is the program."""
