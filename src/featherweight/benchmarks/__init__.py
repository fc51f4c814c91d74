"""What `featherweight bench` runs: random weights of real shapes, timed beside the machine's measured peaks."""
