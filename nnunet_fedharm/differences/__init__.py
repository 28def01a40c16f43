"""How different are the sites? Statistics of feature tables; no image is read here."""
