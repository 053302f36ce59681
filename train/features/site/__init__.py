"""Turns the Parquet files of `sagsae features` into a page that opens by double click.

    tokens ──> tokens.parquet ─┐
    latents, examples, pairs ──┴─> build: index.html, app.js, style.css, data/

`build` writes the folder from the files alone, `cards` and `search` make its data, `columns` reads Parquet, `pack`
packs numbers into scripts. Under file:// a browser loads classic scripts and nothing else: no fetch, no modules.
"""
