"""Recipes: YAML files with overrides, checked before any work begins; `shipped/` has those that come along."""
