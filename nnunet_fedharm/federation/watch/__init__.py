"""A run as somebody who watches it sees it: read from the server's event log alone, so that watching disturbs nothing."""
