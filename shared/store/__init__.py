"""The store on disk: its format, and how it is written, read, listed and verified."""
