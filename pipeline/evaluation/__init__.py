"""How good a generator is: metrics, evaluation, sample sheets."""
