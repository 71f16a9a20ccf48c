"""What happens, in which order, on which data: config, rounds, run folder, reports. Meets `stages` and `cluster`."""
