"""Files to pixels: images, videos and their containers. Everything untrusted is refused here."""
