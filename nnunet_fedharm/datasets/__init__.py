"""Published datasets as raw datasets with sites, the demo's data, and simulated scanners."""
