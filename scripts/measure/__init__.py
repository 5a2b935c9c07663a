"""Programs that measure one thing each: times, counts, errors. ``make bench`` runs ``scripts/benchmarks``."""
