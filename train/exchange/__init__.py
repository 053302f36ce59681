"""Autoencoders of other tools: files for them, files from them, and the Hugging Face hub."""
