"""The one HTTP client of the package: JSON to and from an OpenAI-compatible server."""
