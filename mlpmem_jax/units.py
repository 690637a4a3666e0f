"""Numbers as people read them."""


def human_bytes(number: float) -> str:
    """Returns a size with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 1024 or unit == "TiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError


def short_number(value: float, units: str = "kMBT", form: str = ".3g") -> str:
    """Returns a number with a unit of a thousand, million, …: 1.5 k."""
    for power in range(len(units), 0, -1):
        if value >= 1000**power:
            return f"{value / 1000**power:{form}} {units[power - 1]}"
    return f"{value:.3g}"
