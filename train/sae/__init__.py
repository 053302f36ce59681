"""The autoencoders: mathematics only. One file an architecture family; none of them knows ranks or files."""
