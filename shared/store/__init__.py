"""The store on disk: its format, how it is written, read, listed and verified."""
