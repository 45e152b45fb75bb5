"""What renting nodes costs in time and money, by simulated latencies."""
