"""What is wrong with a storage, a cluster, a tracker or a recipe, and what would be right."""
