"""Methods that do each a thing that none of the project's own does yet; one file each."""
