"""Metrics that judge attribution maps. Each returns values per image and a record of how they were computed."""
