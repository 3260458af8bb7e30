"""The web page at `/`: three files that a browser loads from here and nowhere else, no build step."""
