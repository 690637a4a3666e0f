"""Compiles the configurations of docs/compile/ for their topologies and writes the reports.

    python -m benchmarks.compile_configs            what is missing, one after another
    python -m benchmarks.compile_configs NAME ...   these again (llama2_7b.v5p-128.pretrain)
    python -m benchmarks.compile_configs --summary  only docs/compile/README.md, from the reports

Needs requirements-tpu.txt and no TPU. A report that exists is kept, so that a run can be
stopped and continued; each is also what `mlpmem compile --output` writes.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "docs" / "compile"


class Case(NamedTuple):
    """One configuration on one slice."""

    config: str
    sold_as: str
    topology: str
    overrides: tuple[str, ...] = ()
    tensor: int = 1  # Devices that share one copy of the weights in generation,
    prompts: int = 256  # of so many texts at once.


_ON_V5E = ("pretrain.batch_size=512", "train.batch_size=4096")
CASES = (
    Case("gpt2_small", "v5e-8", "v5e:2x4"),
    Case("llama2_7b", "v5p-128", "v5p:4x4x4", tensor=4),
    Case("llama2_70b", "v5p-1024", "v5p:8x8x8", tensor=8),
    Case("llama2_7b", "v5e-256", "v5e:16x16", _ON_V5E, tensor=8),
    Case("gpt2_xl", "v5e-64", "v5e:8x8", tensor=8, prompts=64),
    Case("mistral_7b", "v5p-128", "v5p:4x4x4", tensor=4),
    Case("mistral_7b", "v5e-256", "v5e:16x16", _ON_V5E, tensor=8),
    Case("gpt2_large", "v5e-32", "v5e:4x8"),
    Case("gpt2_medium", "v5e-16", "v5e:4x4"),
)
STEPS = ("pretrain", "train", "embed", "decode")
NOTES = (
    "## Notes",
    "",
    "- Figures below that are in no row: `mlpmem compile` with the command of the row (its",
    "  configuration, `--topology` and `--step`) and the override that is named.",
    "- The memory of GPT-2 small is bound by compute for 123 ms and by memory traffic for 96 ms of",
    "  its 226 ms: the loss reads and writes chunks of float32 logits several times, and a narrow",
    "  network (768 against a vocabulary of 50304) has few operations to hide that.",
    "- Weights of width 4096 over 64 chips are pieces of 64 columns, less than a TPU's row of 128:",
    "  the compiler then gathers some by all-reduce, twice the bytes. With `mesh.data=auto",
    "  mesh.fsdp=32` llama2_7b.v5p-128.train takes 342 ms and not 354 (76 % of peak).",
    "- `auto` attention is JAX's fused kernel on TPUs (`decoder.attention=flash`). Cut into",
    "  blocks (`blocked`), whose scores go through memory, a step of pretraining takes 413 ms for",
    "  gpt2_small on v5e-8 (32 % of peak), 4.16 s for llama2_7b on v5e-256 (43 %) and 2.94 s on",
    "  v5p-128 (52 %). The compiler does not look into a kernel: products are counted in the tiles",
    "  that it computes, bytes as its arguments and results.",
    "- `embed` writes what it computes to storage; that is not in these times (docs/scale.md).",
    "- `index` and `retrieve` are no compiled steps and not in the table. Keys that do not",
    "  fit these slices at once are searched in parts (docs/scale.md).",
    "- `decode` is eight tokens of each of 256 texts (gpt2_xl: 64), with whole",
    "  weights (`mesh.fsdp=1`) or weights cut over `mesh.tensor`: 4 on v5p-128, 8 for gpt2_xl,",
    "  llama2_70b and on v5e-256. Each token reads all weights and the whole cache, so memory is",
    "  the bound.",
    "- Plain attention (`decoder.attention=xla`) writes its float32 scores to memory: training",
    "  configs/llama_1b.yaml on v5p:2x2x2 (fsdp 8, 64 windows) is bound by memory, at most",
    "  34 % of peak.",
)


def name_of(case: Case, step: str) -> str:
    """Returns the name of a report."""
    return f"{case.config}.{case.sold_as}.{step}"


def command_of(case: Case, step: str) -> list[str]:
    """Returns the arguments that make a report."""
    output = REPORTS / f"{name_of(case, step)}.json"
    overrides = case.overrides
    if step == "decode":
        # Weights that are cut over `fsdp` would be gathered again for each token.
        overrides += ("mesh.data=auto", "mesh.fsdp=1", f"mesh.tensor={case.tensor}")
        overrides += (f"compile.num_prompts={case.prompts}",)
    return [
        "compile", "--config", f"configs/{case.config}.yaml", "--topology", case.topology,
        "--step", step, "--output", str(output.relative_to(ROOT)), *overrides,
    ]  # fmt: skip


def summary() -> str:
    """Returns docs/compile/README.md, from the reports that exist."""
    header = (
        "configuration", "slice", "step", "tokens a step", "args", "temp", "total", "of",
        "compute", "memory", "links", "step ≥", "share of peak ≤", "bound by",
    )  # fmt: skip
    rows, missing = [], []
    for step in STEPS:
        for case in CASES:
            path = REPORTS / f"{name_of(case, step)}.json"
            if path.exists():
                rows.append(_row(case, step, json.loads(path.read_text(encoding="utf-8"))))
            else:
                missing.append(name_of(case, step))
    lines = [
        "# What `compile` says about the shipped configurations",
        "",
        "Written by `.venv/bin/python -m benchmarks.compile_configs` from the reports (JSON)",
        "beside it; GiB are bytes on each device. Times are roofline estimates that follow the",
        "compiler's schedule (docs/design.md): lower bounds for a step, upper bounds for the share",
        "of peak. Latencies and the vector unit are not in them. Nothing here ran on a TPU.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * 3 + "---:|" * (len(header) - 4) + "---|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    if missing:
        lines += ["", "Not compiled yet: " + ", ".join(missing) + "."]
    return "\n".join([*lines, "", *NOTES]) + "\n"


def _row(case: Case, step: str, report: dict[str, Any]) -> list[str]:
    memory, line = report["memory"], report["roofline"]
    sizes = [memory[name] for name in ("arguments", "temporaries", "total", "capacity")]
    if line is None:
        times = ["–"] * 5 + ["does not fit"]
    else:
        secs = (line["compute_secs"], line["memory_secs"], line["interconnect_secs"], line["secs"])
        times = [*(_secs(value) for value in secs), f"{100 * line['share_of_peak']:.0f} %"]
        times.append(line["bound"] if memory["fits"] else "does not fit")
    return [
        case.config, case.sold_as, step, f"{report['tokens']:,}", *(map(_gib, sizes)), *times
    ]  # fmt: skip


def _gib(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**30:.2f}"


def _secs(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def main(arguments: list[str]) -> int:
    """Makes reports; returns the exit code."""
    known = {name_of(case, step): (case, step) for step in STEPS for case in CASES}
    unknown = [name for name in arguments if name not in known and name != "--summary"]
    if unknown:
        print(f"error: {unknown[0]}: unknown; names: {', '.join(known)}", file=sys.stderr)
        return 2
    REPORTS.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, (case, step) in known.items():
        exists = (REPORTS / f"{name}.json").exists()
        if "--summary" in arguments or (name not in arguments if arguments else exists):
            continue
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", "mlpmem_jax", *command_of(case, step)]
        failed += subprocess.run(command, cwd=ROOT, check=False).returncode not in (0, 3)
        (REPORTS / "README.md").write_text(summary(), encoding="utf-8")
    (REPORTS / "README.md").write_text(summary(), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
