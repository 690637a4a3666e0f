"""Tables of several runs: scores, statistics over seeds, costs, reports and pictures."""
