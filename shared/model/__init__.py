"""Language models: resolving a name, finding hookpoints, and running the model."""
