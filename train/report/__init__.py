"""Turns run folders into one self-contained HTML page.

    data -> frontier -> answer ─┐
    data -> figures ────────────┴─> settings -> page

`data` reads and checks the runs, `frontier` does the arithmetic, `answer` and `wording` make sentences of it, `figures`
makes plotly figures. `settings` separates runs that cannot be compared (`comparable` decides which), `naming` gives
runs and autoencoders short names, `page` renders and `place` checks where the page may be written. The page is about
5 MB, nearly all of it plotly.js.
"""

from pathlib import Path

from shared.files.local import error_kind
from shared.progress import say
from train.report.data import read_runs
from train.report.page import latent_pages, render
from train.report.place import check_place, write_page


def write_report(runs: list[Path], out: Path, overwrite: bool = False) -> Path:
    """Writes the report on evaluated runs to the file `out`, atomically, and returns its path. Prints which runs were
    left out because they could not be read or were not evaluated.

    Raises UserError when no run is left, when `out` cannot be written, and when `out` is another file than a report
    (`overwrite` replaces such a file).
    """
    check_place(out, overwrite)
    found, left_out = read_runs(runs)
    for each in left_out:
        say(f"left out: {each.reason}")
    html = render(found, left_out, latent_pages(found, out))
    try:
        write_page(out, html)
    except OSError as error:
        raise error_kind(error)(
            f"--out {out}: cannot be written ({error.strerror}); name a file in a folder you own"
        ) from error
    return out
