"""From token counts to a weight for each vocabulary entry: counting, recipes, files, and what a table does."""
