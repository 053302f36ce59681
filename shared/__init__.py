"""What both stages agree on: configuration, the store on disk, the model, the record of a run."""
