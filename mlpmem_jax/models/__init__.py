"""Networks, written for one device: decoder, memory and what combines them."""
