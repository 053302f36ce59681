"""Where bytes are: local folders, object stores, web servers; with locks, open files and the cache of byte ranges."""
