"""The site report of a federation: what sites send of their features, and what the server finds from it."""
