"""What this project is measured against, and what those measurements share; each side is a process of its own."""
