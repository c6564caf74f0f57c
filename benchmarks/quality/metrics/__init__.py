"""Scores of generated texts: words, one text against its reference, and whole sets of texts over resampled prompts.

`per_text` gives one number for each text. `corpus` adds them up, and counts word types, over the prompts that each
resample has. `benchmarks.quality.intervals` draws those resamples and turns the results into intervals.
"""
