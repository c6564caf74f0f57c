"""Tables, plots and docs/evidence.md, from the records alone."""
