"""How a benchmark ends: with its result, or one line for an error that its user can mend."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

from mlpmem_jax.console import complain
from mlpmem_jax.errors import EXIT_USER_ERROR
from mlpmem_jax.failures import explain, user_error_in


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs a benchmark as the whole of this process."""
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:  # A command, which has printed why.
        sys.exit(error.returncode)
    except Exception as error:
        mistake, reason = user_error_in(error), explain(error)
        if os.environ.get("MLPMEM_TRACEBACK") == "1" or not (mistake or reason):
            raise
        for line in mistake.messages if mistake else [reason]:
            complain(line)
        sys.exit(mistake.exit_code if mistake else EXIT_USER_ERROR)
