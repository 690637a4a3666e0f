"""evaluate-tasks: lm-evaluation-harness over a finished run."""
