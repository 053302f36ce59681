"""Where bytes are: local folders, object stores, web servers; locks, open files, the cache of ranges."""
