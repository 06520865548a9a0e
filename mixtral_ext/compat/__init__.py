"""Functions with the names and arguments of other libraries, computed by mixtral_ext's ops."""
