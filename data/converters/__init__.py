"""From the files that people download to image folders: one file a benchmark, and what the converters share."""
