"""What approximate search costs the kNN-LM and the memory."""
