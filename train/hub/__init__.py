"""Publishes autoencoders and stores on the Hugging Face hub, and brings autoencoders back."""
