"""Language models: which one a name means, its hookpoints, and running it."""
