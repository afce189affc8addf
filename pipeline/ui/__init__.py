"""A local page: two brushes, hole and sketch, and the fill beside the original."""
