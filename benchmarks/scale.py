"""Storage, search, network and time of the whole method, on paper, for corpora of any size.

    python -m benchmarks.scale                       the table of docs/scale.md
    python -m benchmarks.scale width=2048 chips=256  with other numbers
    python -m benchmarks.scale --inputs              every number, its value and its source

Everything is a product of the inputs below; replace those that you have measured.
"""

import dataclasses
import math
import sys

from mlpmem_jax.retrieval.groups import compared

DAY = 86_400.0
SIZES = (100e6, 5e9, 300e9)


def _given(value: float, source: str) -> float:
    """Returns a field with a value and where it is from."""
    return dataclasses.field(default=value, metadata={"source": source})


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Numbers of one plan, each with its meaning and its source."""

    width: float = _given(4096, "D, of the keys and of the memory's input (Llama-2-7B)")
    decoder_flops: float = _given(
        1.4e10, "forward pass of a token: 2 · 6.7e9 parameters + attention (Llama-2-7B)"
    )
    memory_flops: float = _given(
        2.43e9, "forward pass of a row: 2 · 1.21e9 parameters (configs/llama2_7b.yaml)"
    )
    text_bytes_per_token: float = _given(4, "English and a vocabulary of 32k to 50k (assumed)")
    read_bytes_per_sec: float = _given(
        116e6,
        "text into documents, by every process (measured: benchmarks.scale_rates --paths, English "
        "with letters beyond ASCII, one core; 440 MB/s where there are none)",
    )
    encode_bytes_per_sec_core: float = _given(
        0.68e6, "text into ids (measured: 1.35 MB/s of Python source on 2 cores)"
    )
    vocab_bytes: float = _given(2, "of a token id in targets (our format); 4 above 65536 entries")
    kept_tokens: float = _given(128, "S, targets.num_tokens (configs/llama2_7b.yaml)")
    exact_passes: float = _given(
        6, "bfloat16 products for one of float32 on a TPU (lax.Precision.HIGHEST, data sheet)"
    )
    neighbors: float = _given(1024, "K (the paper)")
    context_overlap: float = _given(
        2.0, "window / stride: how often a token is read when embedding (chosen)"
    )
    epochs: float = _given(5, "of the memory's training (the paper)")
    chips: float = _given(64, "v5p-128 (chosen)")
    chip_flops: float = _given(459e12, "v5p, bfloat16 (data sheet)")
    share_of_peak: float = _given(0.5, "assumed; `compile` gives an upper bound")
    chip_memory_bytes: float = _given(95 * 2**30, "v5p (data sheet)")
    hosts: float = _given(16, "v5p: 4 chips a host (data sheet)")
    host_ram_bytes: float = _given(448e9, "v5p host (data sheet)")
    host_cores: float = _given(208, "v5p host (data sheet)")
    host_write_bytes_per_sec: float = _given(
        0.5e9, "zarr3 shards, one host (measured: 340-750 MB/s)"
    )
    host_network_bytes_per_sec: float = _given(12.5e9, "100 Gbit/s (assumed)")
    merge_secs_per_list: float = _given(
        0.57e-3 / 16, "of a query: merging lists of K (measured: benchmarks.scale_rates, one core)"
    )
    index_row_bytes: float = _given(8, "leaf numbers of a row on disk (our format)")
    scann_ram_factor: float = _given(
        1.25,
        "of the float32 keys, loaded (measured: 1.10, while it loads 1.23; 120k rows of width 768)",
    )
    scann_dims_per_block: float = _given(2, "retrieval.dims_per_block (its default)")
    # 4000 · 2.29e6 · 60 / 1513 / 2 points a second and core, each of 64 codes.
    scann_codes_per_sec_core: float = _given(
        4000 * 2.29e6 * 60 / 1513 / 2 * 64,
        "measured: 2.29M rows of width 128, 60 of 1513 leaves, 4,000 queries/s on 2 cores",
    )
    scann_build_per_sec_core: float = _given(
        500e3 * 128 * 707 / 9 / 2, "measured: 500k rows of width 128, 707 leaves, 9 s on 2 cores"
    )
    shard_rows: float = _given(1e6, "retrieval.shard_rows (chosen: its default is 4 million)")
    leaf_share: float = _given(0.04, "leaves visited (measured: 60 of 1513, recall@256 0.997)")
    cells: float = _given(
        1e6, "retrieval.cells (chosen: its largest; auto takes a gigabyte of them)"
    )
    rows_of_cell: float = _given(1025, "K + 1, of a cell at least (our format)")
    visited_cells: float = _given(
        15, "cells of a query (measured: benchmarks.routing, 8M rows of width 64, recall 0.92)"
    )
    # 321 queries a second, each 2 · 1024 · (110 + 30 · 909).
    routed_flops_per_sec_core: float = _given(
        321 * 2 * 1024 * (110 + 30 * 909),
        "of a routed search (measured: benchmarks.routing, 100k rows of width 1024, K 1024)",
    )
    targets_rows_per_sec_core: float = _given(
        16.5e3, "neighbours to targets (measured: 33,000 rows/s on 2 cores)"
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a corpus of some size takes. Bytes, seconds, counts."""

    rows: float
    text_bytes: float
    read_secs: float
    encode_secs: float
    keys_bytes: float
    inputs_bytes: float
    targets_bytes: float
    embed_secs: float
    write_secs: float
    index_disk_bytes: float
    index_ram_bytes: float
    index_hosts: float
    index_secs: float
    shards: float
    search_all_secs: float
    search_all_network_secs: float
    merge_secs: float
    routed_centroids_bytes: float
    search_routed_secs: float
    exact_flops: float
    exact_secs: float
    exact_chips_for_keys: float
    targets_secs: float
    train_stored_secs: float
    train_read_secs: float
    train_online_secs: float


def plan(rows: float, given: Inputs) -> Plan:
    """Returns what every stage takes for a corpus of `rows` tokens."""
    flops_per_sec = given.chips * given.chip_flops * given.share_of_peak
    cores = given.hosts * given.host_cores
    state_bytes = 2 * given.width
    shards = max(1.0, math.ceil(rows / given.shard_rows))
    rows_in_shard = min(rows, given.shard_rows)
    codes = given.width / given.scann_dims_per_block
    # Every query against one shard: the points of the leaves visited, their codes.
    shards_of_host = math.ceil(shards / given.hosts)  # Those that have most set the pace.
    query_in_shard = given.leaf_share * rows_in_shard * codes / given.scann_codes_per_sec_core
    cells = max(1.0, min(given.cells, rows / given.rows_of_cell))
    compared_cells = compared(int(cells)) + given.visited_cells * rows / cells
    network = given.host_network_bytes_per_sec
    text = rows * given.text_bytes_per_token
    answer_bytes = 12 * given.neighbors  # row int64, distance float32
    build = rows * given.width * math.sqrt(rows_in_shard) / given.scann_build_per_sec_core
    exact = 2 * rows * rows * given.width
    row_bytes = given.kept_tokens * (given.vocab_bytes + 2) + 8
    stored_read = given.epochs * rows * (state_bytes + row_bytes)
    train_flops = 3 * given.epochs * rows * given.memory_flops
    ram_of_shard = rows_in_shard * 4 * given.width * given.scann_ram_factor
    shards_in_ram = max(1, int(0.8 * given.host_ram_bytes / ram_of_shard))
    return Plan(
        rows=rows,
        text_bytes=text,
        read_secs=text / given.read_bytes_per_sec,
        encode_secs=text / (given.encode_bytes_per_sec_core * cores),
        keys_bytes=rows * state_bytes,
        inputs_bytes=rows * state_bytes,
        targets_bytes=rows * row_bytes,
        embed_secs=rows * given.context_overlap * given.decoder_flops / flops_per_sec,
        write_secs=2 * rows * state_bytes / (given.hosts * given.host_write_bytes_per_sec),
        index_disk_bytes=rows * (4 * given.width + codes + given.index_row_bytes),
        index_ram_bytes=shards * ram_of_shard,
        index_hosts=math.ceil(shards / shards_in_ram),
        index_secs=build / cores,
        shards=shards,
        search_all_secs=rows * shards_of_host * query_in_shard / given.host_cores,
        # Each host reads every query, and is sent what each of them has found for it.
        search_all_network_secs=rows * (state_bytes + given.hosts * answer_bytes) / network,
        merge_secs=rows / given.hosts * min(shards, given.hosts) * given.merge_secs_per_list,
        routed_centroids_bytes=4 * cells * given.width,
        search_routed_secs=2
        * given.width
        * rows
        * compared_cells
        / (given.routed_flops_per_sec_core * cores),
        exact_flops=exact,
        exact_secs=given.exact_passes * exact / flops_per_sec,
        # float32 on the devices, whatever is stored.
        exact_chips_for_keys=math.ceil(rows * 4 * given.width / (0.8 * given.chip_memory_bytes)),
        targets_secs=rows / (given.targets_rows_per_sec_core * cores),
        train_stored_secs=train_flops / flops_per_sec,
        train_read_secs=stored_read / (given.hosts * given.host_network_bytes_per_sec),
        train_online_secs=(train_flops + 0.7 * given.epochs * rows * given.decoder_flops)
        / flops_per_sec,
    )


_ROWS = (
    ("tokenize", "text", "text_bytes"),
    ("tokenize", "reading, every process all of it", "read_secs"),
    ("tokenize", "encoding, shared", "encode_secs"),
    ("storage", "keys (float16)", "keys_bytes"),
    ("storage", "memory inputs (float16)", "inputs_bytes"),
    ("storage", "targets", "targets_bytes"),
    ("embed", "decoder over the corpus", "embed_secs"),
    ("embed", "writing keys and inputs", "write_secs"),
    ("index", "on disk, ScaNN (float32)", "index_disk_bytes"),
    ("index", "RAM of ScaNN over all shards", "index_ram_bytes"),
    ("index", "hosts for that RAM", "index_hosts"),
    ("index", "shards", "shards"),
    ("index", "building", "index_secs"),
    ("retrieve", "every query, every shard", "search_all_secs"),
    ("retrieve", "its network", "search_all_network_secs"),
    ("retrieve", "merging, beside the search", "merge_secs"),
    ("retrieve", "routed, centroids in every host", "routed_centroids_bytes"),
    ("retrieve", "routed", "search_routed_secs"),
    ("retrieve", "exact on the mesh, flops", "exact_flops"),
    ("retrieve", "exact on the mesh", "exact_secs"),
    ("retrieve", "chips that hold all keys", "exact_chips_for_keys"),
    ("retrieve", "neighbours to targets", "targets_secs"),
    ("train", "memory, inputs stored", "train_stored_secs"),
    ("train", "reading inputs and targets", "train_read_secs"),
    ("train", "memory, decoder in the step", "train_online_secs"),
)


def table(plans: list[Plan]) -> str:
    """Returns the plans side by side, in Markdown."""
    sizes = [_count(each.rows) + " tokens" for each in plans]
    lines = [
        "| stage | | " + " | ".join(sizes) + " |",
        "|---|---|" + "---:|" * len(plans),
    ]
    for stage, name, field in _ROWS:
        cells = [_shown(field, getattr(each, field)) for each in plans]
        lines.append(f"| {stage} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def inputs_table() -> str:
    """Returns every input with its value and its source, one a line."""
    fields = dataclasses.fields(Inputs)
    names = max(len(field.name) for field in fields)
    return "\n".join(
        f"{field.name:<{names}} = {field.default:<12g} {field.metadata['source']}"
        for field in fields
    )


def _shown(field: str, value: float) -> str:
    if field.endswith("_bytes"):
        return _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB", "EB"))
    if field.endswith("_secs"):
        return _duration(value)
    return f"{value:.1e}" if value >= 1e7 else f"{value:,.0f}"


def _duration(secs: float) -> str:
    for unit, size in (("years", 365 * DAY), ("days", DAY), ("h", 3600.0), ("min", 60.0)):
        if secs >= 2 * size:
            return (
                f"{secs / size:,.0f} {unit}" if secs >= 20 * size else f"{secs / size:.1f} {unit}"
            )
    return f"{secs:.1f} s"


def _count(value: float) -> str:
    return _scaled(value, ("", " thousand", " M", " B")).strip()


def _scaled(value: float, units: tuple[str, ...]) -> str:
    place = 0
    while value >= 999.5 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    unit = units[place]
    number = f"{value:.0f}" if value >= 99.5 or value == int(value) else f"{value:.1f}"
    return f"{number}{unit}" if unit.startswith(" ") or not unit else f"{number} {unit}"


def main(arguments: list[str]) -> int:
    """Prints the table, or the inputs."""
    names = {field.name for field in dataclasses.fields(Inputs)}
    given, sizes = {}, list(SIZES)
    for argument in arguments:
        name, _, value = argument.partition("=")
        if argument == "--inputs":
            print(inputs_table())
            return 0
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name not in names | {"tokens"} or not number > 0:
            print(
                f"error: {argument}: must be NAME=NUMBER above 0; names: tokens, "
                + ", ".join(sorted(names)),
                file=sys.stderr,
            )
            return 2
        if name == "tokens":
            sizes = [number]
        else:
            given[name] = number
    inputs = Inputs(**given)
    print(table([plan(size, inputs) for size in sizes]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
