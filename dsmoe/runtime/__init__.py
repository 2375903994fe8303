"""What every command needs around the work: command line, signals, step timer, buffers, environment."""
