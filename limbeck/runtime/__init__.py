"""Run directories, atomic files, locks, interruptions and the console."""
