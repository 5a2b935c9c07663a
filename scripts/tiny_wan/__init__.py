"""How the sample pipeline ``samples/tiny-wan`` was trained, and what its tests compare with."""
