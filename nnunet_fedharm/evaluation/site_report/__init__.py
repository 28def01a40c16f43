"""The site report: measure, find differences, draw slices and charts, write one page."""
