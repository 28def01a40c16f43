"""The report of a study: one page, its numbers as JSON and CSV, methods and references."""
