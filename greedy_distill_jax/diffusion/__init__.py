"""Flow-matching arithmetic, noise schedules, guidance and solvers; no models in here."""
