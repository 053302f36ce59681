"""Run folders in, one self-contained HTML page out.

    data -> frontier -> answer ─┐
    data -> figures ────────────┴─> settings -> page

`data` reads and checks, `frontier` is the arithmetic, `answer` and `wording` put it into words, `figures` into plotly,
`settings` keeps apart what cannot be compared, and `page` renders. The page is about 5 MB, nearly all of it plotly.js.
"""

import os
from pathlib import Path

from shared.errors import UserError
from train.report.data import read_runs
from train.report.page import render


def write_report(runs: list[Path], out: Path) -> Path:
    """Writes the report on evaluated runs to the file `out`, whole or not at all, and returns it.

    Raises UserError for a folder that is no run or has not been evaluated, and where `out` cannot be written.
    """
    if os.path.isdir(out):
        raise UserError(f"--out {out}: is a folder; name a file in it, such as {out / 'report.html'}")
    html = render(read_runs(runs))
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(html, encoding="utf-8", errors="replace")
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror}); name a file in a folder you own"
        ) from error
    return out
