"""From runs and records to one self-contained HTML file."""
