"""The engine: requests in, token events out. Scheduler and BlockPool are plain Python; the runner owns the device."""
