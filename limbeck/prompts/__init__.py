"""Prompts: from the built-in set, files and `datasets`, and their token ids.

`sources.load_prompts` reads and splits, `templates.encode_prompts` and `encode_responses` make token ids,
`lengths.check_lengths` sees that they fit, `record.write_prompts` and `read_prompts` keep them in the run directory.
"""
