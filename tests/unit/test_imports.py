"""Every module can be imported, and the configuration without JAX."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import mlpmem_jax

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(mlpmem_jax.__path__, "mlpmem_jax.")
    if not module.name.endswith("__main__")
)
# What an optional package alone makes importable, and it is none of the tests' requirements.
NEEDS = {f"mlpmem_jax.studies.tasks.{name}": "lm_eval" for name in (
    "adapter", "domain_task", "harness")}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed")
    importlib.import_module(name)


def test_configuration_and_registry_do_not_import_jax():
    program = (
        "import sys; import mlpmem_jax.__main__, mlpmem_jax.config.describe, mlpmem_jax.pipeline;"
        "heavy = {'jax', 'flax', 'tensorstore', 'orbax', 'grain', 'scann'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
