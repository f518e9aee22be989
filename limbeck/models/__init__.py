"""Models and their tokenizers: where they come from, how they are loaded, what their heads and vocabularies are.

    name ──► Source ──► LoadedModel ──► decoder + head (limbeck.types.Head)
     resolve   load_model         decoder_of, head_of

A name is a shipped asset, a local directory, a GGUF file or a hub id; see `limbeck.models.sources.resolve`.
It knows neither recipe nor pipeline.
"""
