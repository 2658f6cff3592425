"""Settings: their schema, rules, presets and merging."""
