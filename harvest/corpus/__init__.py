"""Corpora: turns files, folders, datasets and arrays of ids into rows of token ids."""
