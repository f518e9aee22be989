"""Client for OpenAI-compatible HTTP servers."""
