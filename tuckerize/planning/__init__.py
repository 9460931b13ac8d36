"""What decides sizes: budgets, allocation, plans, and estimates of memory and time."""
