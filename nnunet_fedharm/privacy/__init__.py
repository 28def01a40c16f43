"""What leaves a site and how it is accounted for: mechanisms, the ledger, secure sums. Reads no image, knows no network."""
