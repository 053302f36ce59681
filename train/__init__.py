"""Stage two: an activation store in, trained sparse autoencoders, their evaluation and a report out."""
