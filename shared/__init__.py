"""Shared by both stages: configuration, the store on disk, the model, the record of a run."""
