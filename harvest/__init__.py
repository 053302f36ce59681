"""Stage one: a language model and a corpus in, an activation store out."""
