"""Which split a document belongs to: a hash of its content, so that duplicates share one."""

import hashlib

from mlpmem_jax.store.array_specs import Split


def hash_fraction(content: bytes, purpose: str) -> float:
    """Returns a number in [0, 1) drawn from the content.

    Args:
        content: UTF-8 text: a document, or its first piece where it has several.
        purpose: Draws for different purposes are independent.
    """
    digest = hashlib.blake2b(content, digest_size=8, person=purpose.encode()).digest()
    # 53 bits are what a float holds without rounding up to 1.
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def split_of(content: bytes, valid_fraction: float, test_fraction: float) -> Split:
    """Returns the split of a document by its content."""
    drawn = hash_fraction(content, "split")
    if drawn < test_fraction:
        return "test"
    return "valid" if drawn < test_fraction + valid_fraction else "train"
