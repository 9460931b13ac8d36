"""Planning: budgets, allocation of sizes, plans, and estimates of memory and time."""
