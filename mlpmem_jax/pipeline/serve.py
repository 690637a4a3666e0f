"""A finished run as a server over HTTP."""

import importlib
import os
import re
from pathlib import Path
from types import ModuleType

from mlpmem_jax.errors import ConfigError, UserError
from mlpmem_jax.failures import reason_of
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.interpolation import check_finished, interpolation
from mlpmem_jax.pipeline.options import Options

API_KEY = "MLPMEM_API_KEY"
_KEY = re.compile(r"[!-~]{8,512}")


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    config = run.config.serve
    key = api_key(options.api_key_file)
    if key is None and not config.is_loopback:
        raise ConfigError(
            f"serve.host={config.host}: other machines can connect, so requests need a key: give "
            f"--api-key-file FILE or the environment variable {API_KEY}, or use 127.0.0.1"
        )
    server = _server()
    # Artifacts are checked before a device is touched.
    weight = 0.0 if options.without_memory else interpolation(run)
    check_finished(run, with_memory=not options.without_memory)
    if options.dry_run:
        return execute(lambda _: [], run, options)
    with server.bound_socket(config) as listening:
        from mlpmem_jax.pipeline.opened_run import Run

        model = Run(run).model(weight=weight, with_memory=not options.without_memory)
        name = config.model_name or _name(run.config.workdir)
        server.serve(server.start(config, model, name), key, listening)
    return 0


def api_key(file: str | None) -> str | None:
    """Returns the key that requests must bring: of a file, else of the environment; or None.

    Raises:
        UserError: There is one that cannot be used.
    """
    if file is None:
        key, source = os.environ.get(API_KEY), API_KEY
        if not key:
            return None
    else:
        source = f"--api-key-file {file}"
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"{source}: cannot be read ({reason_of(error)})") from None
        except UnicodeDecodeError:
            key = ""
    if not _KEY.fullmatch(key):
        raise UserError(
            f"{source}: a key has 8 to 512 letters, digits and signs of ASCII, without blanks"
        )
    return key


def _server() -> ModuleType:
    try:
        return importlib.import_module("mlpmem_jax.serving.server")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("starlette", "uvicorn"):
            raise
        raise UserError(
            f"serve: the package {package} is not installed; install what serve needs with "
            "`pip install -r requirements-serve.txt`"
        ) from None


def _name(workdir: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", Path(workdir).name) or "model"
