"""Steering: changes a latent's value inside the language model, and tests whether that moves the next tokens."""
