"""Records -> tables, plots and documents."""
