"""Token dispatchers, one a file, behind the contract of `dsmoe.moe.dispatch`. Each registers itself by its name."""
