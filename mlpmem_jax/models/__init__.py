"""Networks with logical axes: decoder, memory and what combines them."""
