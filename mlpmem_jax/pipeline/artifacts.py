"""artifacts: what the store of a configuration holds, and removal of what no run uses."""

import time

from mlpmem_jax.console import say
from mlpmem_jax.pipeline.corpus_record import CorpusRecord
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.store.listing import Entry, entries, remove_unused
from mlpmem_jax.units import human_bytes

_DAY = 86_400.0


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    store = run.store
    listed = entries(store, run.workdir, lambda workdir: CorpusRecord.read(workdir).kept)
    unused = [one for one in listed if not one.users]
    if options.remove_unused and not options.dry_run:
        removed = remove_unused(listed)
        say(f"{store}: removed {_in_all(removed)}")
        for one in removed:
            say(_line(one))
        return 0
    say(f"{store}: {_in_all(listed)}")
    for one in unused if options.remove_unused else listed:
        say(_line(one))
    if unused:
        say(
            f"unused: {_in_all(unused)}; "
            + ("--dry-run: none is removed" if options.remove_unused else _HINT)
        )
    return 0


_HINT = "`artifacts --remove-unused` removes them (add --dry-run to list them alone)"


def _in_all(listed: list[Entry]) -> str:
    total = human_bytes(sum(one.num_bytes for one in listed))
    return f"{len(listed)} {'artifact' if len(listed) == 1 else 'artifacts'}, {total}"


def _line(one: Entry) -> str:
    age = "not finished" if one.manifest is None else _age(time.time() - one.manifest.created)
    named = [user for user in one.users if ": " in user]
    # A work directory that uses it in a role and through what is made from it is named once.
    through = [
        user for user in one.users if not any(role.startswith(f"{user}: ") for role in named)
    ]
    users = "; ".join(sorted({*named, *through})) or "unused"
    name = one.artifact.relative
    return f"  {name:<30} {human_bytes(one.num_bytes):>10}  {age:<12}  {users}"


def _age(seconds: float) -> str:
    if seconds < _DAY:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / _DAY:.1f} days"
