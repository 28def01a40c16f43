"""Features of a case: radiomics and image quality, for each channel, region and intensity scale."""
