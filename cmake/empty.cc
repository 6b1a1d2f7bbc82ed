// A room with no sources yet still links.
