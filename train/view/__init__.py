"""Serves the page of the latents to this machine's browser, with the language model behind it.

`run` finds the page's folder and loads the model, `live` steers and encodes with it, `server` answers requests, one at
a time where the model is needed, and `doors` says who may ask.
"""
