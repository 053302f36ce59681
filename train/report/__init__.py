"""Run folders in, one self-contained HTML page out.

    data -> frontier -> answer ─┐
    data -> figures ────────────┴─> settings -> page

`data` reads and checks, `frontier` is the arithmetic, `answer` and `wording` put it into words, `figures` into plotly,
`settings` keeps apart what cannot be compared (`comparable` says what decides that), `page` renders, `place` says where
it may be written. The page is about 5 MB, nearly all of it plotly.js.
"""

from pathlib import Path

from shared.errors import UserError
from shared.progress import say
from train.report.data import read_runs
from train.report.page import render
from train.report.place import check_place, write_page


def write_report(runs: list[Path], out: Path, overwrite: bool = False) -> Path:
    """Writes the report on evaluated runs to the file `out`, whole or not at all, and returns it. Says which runs were
    left out because nothing could be reported on them.

    Raises UserError when no run is left, and where `out` cannot be written or is something else than a report
    (`overwrite` replaces such a file).
    """
    check_place(out, overwrite)
    found, left_out = read_runs(runs)
    for each in left_out:
        say(f"left out: {each.reason}")
    html = render(found, left_out)
    try:
        write_page(out, html)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror}); name a file in a folder you own"
        ) from error
    return out
