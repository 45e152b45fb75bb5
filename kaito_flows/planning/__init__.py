"""What a run will take, before anything is started: memory, GPU sizes that fit, steps, time, cost, and its identity."""
