"""`sagsae view`: finds the page of a run, loads the language model and serves both until it is stopped."""

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from shared.errors import BusyError, DamagedError, UserError
from shared.progress import say
from shared.schemas.view import ViewConfig
from shared.stop import stop_requests
from train.features.site.build import is_current, write_site
from train.view.live import LiveModel
from train.view.server import ServedPage, ViewServer, sentence

ABOUT: Final = "about.json"
TICK_S: Final = 0.1


def view(config: ViewConfig, started: Callable[[str, ServedPage], None]) -> None:
    """Serves until SIGTERM or SIGINT. `started` is called with the address once the server answers. Raises UserError
    where there is no page, BusyError when the port is taken."""
    folder = page_folder(config)
    if not is_current(folder):
        write_site(folder)
    page = served_page(config, folder)
    with listening(page, config.port) as server, stop_requests() as stop_asked, server.serving() as url:
        started(url, page)
        while not stop_asked():
            time.sleep(TICK_S)


def listening(page: ServedPage, port: int) -> ViewServer:
    """A server that listens. Raises BusyError when the port is taken."""
    try:
        return ViewServer(page, port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise BusyError(
            f"--port {port}: cannot be listened on ({error.strerror}). Stop what uses it, or give another one"
        ) from error


def page_folder(config: ViewConfig) -> Path:
    """RUN/features/NAME. Raises UserError when there is none, or several and no --sae."""
    run, sae = config.run.resolve(), config.sae
    if (run / ABOUT).is_file() and (run / "latents.parquet").is_file():
        if sae not in (None, run.name):
            raise UserError(f"--sae {sae}: {config.run} is the page of {run.name}. Leave out --sae, or give the run")
        return run
    names = sorted(file.parent.name for file in run.glob(f"features/*/{ABOUT}"))
    if (sae is not None and sae not in names) or not names:
        again = f"sagsae features {config.run}{f' --sae {sae}' if sae else ''}"
        raise UserError(f"{config.run}: holds no features of {sae or 'an autoencoder'}. Run: {again}")
    if sae is None and len(names) > 1:
        listed = "\n".join(f"  {name}" for name in names)
        raise UserError(f"{config.run}: holds the features of {len(names)} autoencoders. Choose with --sae:\n{listed}")
    return run / "features" / (sae or names[0])


def served_page(config: ViewConfig, folder: Path) -> ServedPage:
    """The page, with the model where it can be loaded."""
    if config.no_model:
        return ServedPage(folder, None, "sagsae view was started with --no-model. Start it again without")
    if folder.parent.name != "features" or not (folder.parent.parent / "config.json").is_file():
        return ServedPage(folder, None, f"{folder} is not inside its run, which names the model. Give the run's folder")
    try:
        asked = config.model_copy(update={"run": folder.parent.parent, "sae": folder.name})
        say("loading the language model")
        return ServedPage(folder, LiveModel.load(asked, folder), "")
    except (UserError, DamagedError) as error:
        return ServedPage(folder, None, sentence(error))
