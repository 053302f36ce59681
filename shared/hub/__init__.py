"""The Hugging Face hub: names of repositories, bounded requests, what its failures mean."""
