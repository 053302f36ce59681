"""The activation cache as a service: its queue, its catalog, its workers."""
