"""One pass over a run's store that collects what a page on a latent needs, for both of its poles."""
