"""Training and reporting of the miniature world: teachers, evaluation tasks, demo and tables."""
