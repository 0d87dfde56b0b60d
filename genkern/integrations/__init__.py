"""Drop-ins for other projects' libraries, one module each."""
