"""The shapes of bodies that cross HTTP."""
