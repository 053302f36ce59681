"""Names for the poles of latents, written and tested by a language model behind an endpoint."""
