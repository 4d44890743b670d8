"""The one loop: steps, optimizer, meter, checkpoints, guards. It knows neither methods nor tasks by name."""
