"""Other libraries' call shapes over this library's methods: change the import and nothing else."""
