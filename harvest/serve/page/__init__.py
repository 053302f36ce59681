"""The page of the activation cache: its templates, its style, its script, and the words and plots that it shows."""
