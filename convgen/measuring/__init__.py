"""What layers take, of convgen's and of torch's, and how near that is to the machine's limits."""
