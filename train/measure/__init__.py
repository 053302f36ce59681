"""What an autoencoder is worth: metrics, latents, directions, recovery of known features."""
