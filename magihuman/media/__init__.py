"""Media files and images: decoding, mp4 writing, resizing, contact sheets."""
