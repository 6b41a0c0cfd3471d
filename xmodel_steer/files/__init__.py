"""Files that are whole or absent, artefacts, readers, wheels of the package index, the cache, resuming. No model is called here."""
