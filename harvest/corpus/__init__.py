"""Corpora: files, folders, data sets and arrays of ids to rows of token ids."""
