"""Measures trained autoencoders: metrics, latents, decoder directions, recovery of known features."""
