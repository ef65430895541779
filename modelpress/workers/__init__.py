"""Worker processes that do slices of a stage: `pool` asks them, `process` is what they run, `jobs` what they do."""
